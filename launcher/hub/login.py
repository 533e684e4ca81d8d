"""Whether the Hub answers, and as whom."""

from __future__ import annotations

import contextlib
import http.client
import os
import urllib.error
import urllib.request
from dataclasses import dataclass

from launcher.hub.environment import distrust_xet
from launcher.hub.faults import redact, short

_ANSWER_S = 5.0


@dataclass(frozen=True)
class LoginState:
    """`problem` is why nothing can be pushed, `fix` the command that mends it; both None where all is well."""

    endpoint: str
    user: str | None = None
    is_offline: bool = False
    problem: str | None = None
    fix: str | None = None


def login_state() -> LoginState:
    """Asks the Hub who we are; waits at most a few seconds. Never raises."""
    distrust_xet()
    from huggingface_hub import HfApi, constants, get_token

    endpoint, shown = constants.ENDPOINT, redact(constants.ENDPOINT)
    if constants.HF_HUB_OFFLINE:
        return LoginState(shown, is_offline=True)
    token = get_token()
    try:
        with contextlib.suppress(urllib.error.HTTPError):  # an answer, whatever it says
            urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=_ANSWER_S).close()
    except (OSError, ValueError, http.client.HTTPException) as error:
        given = os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy")
        proxy = f" (through the proxy {redact(given)})" if given else ""
        return LoginState(shown, problem=f"cannot be reached{proxy}: {short(error)}", fix=(
            "HF_HUB_OFFLINE=1 with models and data in folders or prefetched (launcher prefetch); "
            "pushes are kept until it can be reached"))  # fmt: skip
    if token is None:
        return LoginState(shown, problem="nobody is logged in", fix="hf auth login, or export HF_TOKEN=…")
    try:
        return LoginState(shown, user=str(HfApi(endpoint=endpoint).whoami(token)["name"]))
    except Exception as error:  # the client raises its own, httpx's and OSError
        return LoginState(shown, problem=f"the token is refused: {short(error)}", fix="hf auth login")
