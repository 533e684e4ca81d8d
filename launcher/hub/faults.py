"""What an error from the Hub means: try again, read the head again, or only the user can help."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from launcher.base.secrets import redacted

_BEARER = re.compile(r"(?i:bearer)\s+\S+")
_URL_PASSWORD = re.compile(r"(?<=://)[^\s/@'\"]+@")
_SIGNED_URL = re.compile(r"(https?://[^\s?'\"]+)\?[^\s'\"]*")
_XET_STATUS = re.compile(
    r"(?i:status|http|code)\D{0,24}\b([45]\d\d)\b|\b([45]\d\d) (?:Unauthorized|Forbidden|Not Found)"
)
_QUOTA = re.compile(r"(?i)quota|storage|exceed|limit reached|payment|upgrade")


@dataclass(frozen=True)
class Fault:
    """`kind`: transient (worth retrying), conflict (the head moved), permanent (the user must act), card (refused).

    `retry_after_s` is what the server asked for, in seconds.
    """

    kind: str
    message: str
    cure: str = ""
    retry_after_s: float | None = None


_token: str | None = None


def remember_token(token: str | None) -> None:
    """The token in use, also where it came from the token file: `redact` removes it."""
    global _token
    _token = token


def redact(text: str) -> str:
    """Removes whatever is or looks like a secret, users and passwords in URLs, and signatures of storage services."""
    for token in (os.environ.get("HF_TOKEN"), os.environ.get("HUGGING_FACE_HUB_TOKEN"), _token):  # however short
        if token:
            text = text.replace(token, "***")
    return _BEARER.sub("***", redacted(_SIGNED_URL.sub(r"\1", _URL_PASSWORD.sub("", text))))


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def _response(error: BaseException) -> Any:
    """The HTTP answer behind an error, also where the client wrapped it in another one."""
    for link in _chain(error):
        response = getattr(link, "response", None)
        if response is not None and getattr(response, "status_code", None):
            return response
    return None


def _status(error: BaseException) -> int | None:
    response = _response(error)
    if response is not None:
        return int(response.status_code)
    for link in _chain(error):  # hf_xet raises plain exceptions with the status in their text
        if type(link).__module__.startswith(("hf_xet", "builtins")) and (match := _XET_STATUS.search(str(link))):
            return int(match[1] or match[2])
    return None


def short(error: BaseException) -> str:
    """The error on one line, without a token."""
    server_message = next((m for e in _chain(error) if (m := getattr(e, "server_message", None))), None)
    text = str(error) or repr(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    first = lines[0] if lines else repr(error)
    if server_message and server_message not in first:
        first = f"{first} {server_message}"
    return redact(" ".join(first.split()))[:300]


def retry_after_s(headers: Any) -> float | None:
    """Seconds from Retry-After or from the Hub's `RateLimit: "api";r=0;t=55`."""
    value = headers.get("Retry-After", "")
    if value.strip().isdigit():
        return float(value)
    match = re.search(r"r=0\s*;\s*t=(\d+)", headers.get("RateLimit", ""))
    return float(match[1]) if match else None


def classify(error: BaseException, repo_id: str) -> Fault:
    """Sorts an error; whatever is not known to be permanent is worth retrying."""
    names = {type(link).__name__ for link in _chain(error)}
    text, status, response = short(error), _status(error), _response(error)
    url = str(response.request.url) if response is not None else ""
    if "Invalid metadata in README.md" in str(error) or ("validate-yaml" in url and status and status < 500):
        return Fault("card", text)
    if "EndpointError" in names:
        return Fault("permanent", text, "is HF_ENDPOINT the Hub, or a gateway to it that you trust?")
    if "OfflineModeIsEnabled" in names:
        cure = "HF_HUB_OFFLINE is set: send it from a machine with internet"
        return Fault("permanent", "the Hub client is in offline mode", cure)
    if "LocalTokenNotFoundError" in names:
        return Fault("permanent", "there is no token", "set HF_TOKEN or run `hf auth login`")
    if "RateLimited" in names or status == 429:
        headers = response.headers if response is not None else {}
        return Fault("transient", text, retry_after_s=getattr(error, "retry_after_s", None) or retry_after_s(headers))
    if status in (409, 412):
        return Fault("conflict", text)
    if status == 408 or status is None or status >= 500 or "RequestTimeout" in text:  # S3 calls that a 400
        after = retry_after_s(response.headers) if response is not None else None
        return Fault("transient", text, retry_after_s=after)
    return Fault("permanent", text, _cure(status, text, names, repo_id))


def _cure(status: int, text: str, names: set[str], repo_id: str) -> str:
    if status in (402, 403, 413) and _QUOTA.search(text):
        return (
            "the storage quota is full: delete old files or squash the history on the Hub, set hub.save_total_limit, "
            "or choose another hub.hub_model_id"
        )
    if status == 403:
        return f"the token may not write to {repo_id}: use one with write access (HF_TOKEN or `hf auth login`)"
    if status == 404 or "RepositoryNotFoundError" in names:
        return (
            f"{repo_id} is not there, or the token may not see it: was it deleted or renamed? "
            "Create it again or set hub.hub_model_id"
        )
    if status == 401:
        return "the token is missing or not valid: set HF_TOKEN or run `hf auth login`"
    return "the Hub refuses this upload for good"


class Backoff:
    """Waiting times between tries: exponential, with jitter so that many runs do not come back at once."""

    def __init__(self, base_s: float, max_s: float) -> None:
        self._base_s, self._max_s, self._tries = base_s, max_s, 0

    def next_s(self, retry_after_s: float | None = None) -> float:
        """Seconds to wait; never less than the server asked for."""
        ceiling = min(self._max_s, self._base_s * 2.0**self._tries)
        self._tries = min(self._tries + 1, 30)
        jittered = ceiling * random.uniform(0.5, 1.0)
        if retry_after_s is None:
            return jittered
        return retry_after_s + random.uniform(0.0, min(5.0, 0.1 * retry_after_s + self._base_s))


def next_commit_delay_s(commit_times: list[float], now: float, per_hour: int) -> float:
    """Seconds until the next commit fits into the Hub's rate.

    The first half of the hourly budget is free; then commits are spread evenly, so that saves in quick succession
    share commits instead of using the budget up and stalling for the rest of the hour.
    """
    recent = [t for t in commit_times if now - 3600.0 < t <= now]
    if len(recent) < per_hour // 2:
        return 0.0
    if len(recent) >= per_hour:
        return recent[-per_hour] + 3600.0 - now
    return max(0.0, recent[-1] + 2 * 3600.0 / per_hour - now)
