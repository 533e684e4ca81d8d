"""The Hub client with what it lacks: time-outs, a bandwidth cap, and no silent waits. Imports huggingface_hub."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections.abc import Iterator
from typing import Any

from huggingface_hub import HfApi, constants, get_token, set_client_factory
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils._http import default_client_factory

from launcher import __version__
from launcher.base.errors import HubError, LauncherError, ResumeError, UserError
from launcher.hub.answers import EndpointError, check_answer
from launcher.hub.environment import is_xet_trusted
from launcher.hub.faults import classify, redact, remember_token, retry_after_s

CONNECT_TIMEOUT_S = 15.0
MAX_SILENT_WAIT_S = 10.0
_SLICE_BYTES = 1 << 16
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)


class RateLimited(Exception):
    """The server asks to wait longer than the client should sleep on its own."""

    def __init__(self, wait_s: float) -> None:
        super().__init__(f"429 Too Many Requests, retry after {wait_s:.0f} s")
        self.retry_after_s = wait_s


class _Api(HfApi):
    """Does without the check of a card's header where an endpoint (a mirror, a gateway) does not have it."""

    def _validate_yaml(self, content: str, **details: Any) -> None:
        try:
            super()._validate_yaml(content, **details)
        except HfHubHTTPError as error:
            if error.response.status_code != 404:
                raise
        except ValueError as error:  # also an answer that is no JSON
            if "Invalid metadata" in str(error):
                raise


class Throttle:
    """Lets at most `bytes_per_s` through, over all threads, and counts what went through."""

    def __init__(self, bytes_per_s: float | None) -> None:
        self._bytes_per_s = bytes_per_s
        self.is_capped = bytes_per_s is not None
        self._lock = threading.Lock()
        self._free_at = time.monotonic()
        self.sent_bytes = 0

    def pass_through(self, num_bytes: int) -> None:
        """Blocks until these bytes may be sent."""
        with self._lock:
            self.sent_bytes += num_bytes
            if self._bytes_per_s is None:
                return
            now = time.monotonic()
            self._free_at = max(self._free_at, now) + num_bytes / self._bytes_per_s
            wait_s = self._free_at - now
        time.sleep(max(0.0, wait_s))


def connect(timeout_s: float, throttle: Throttle | None = None) -> HfApi:
    """A client of the endpoint in HF_ENDPOINT, with the token of HF_TOKEN or of the token file.

    Args:
        timeout_s: silence on a connection, in seconds, after which it is given up. The client's own default is none,
            so that a server that accepts and stays silent would hang it for ever.
    """

    def limit(request: Any) -> None:
        if throttle is not None and request.method in ("PUT", "POST"):
            request.stream = _throttled(request.stream, throttle)

    def check(response: Any) -> None:
        check_answer(response)
        # The client would sleep for as long as the server asks, an hour maybe, and nobody would know.
        if response.status_code == 429:
            wait_s = retry_after_s(response.headers)
            if wait_s is not None and wait_s > MAX_SILENT_WAIT_S:
                raise RateLimited(wait_s)

    def factory() -> Any:
        client = default_client_factory()
        client.headers["Accept-Encoding"] = "gzip"  # what check_answer can unpack
        client.timeout = (min(CONNECT_TIMEOUT_S, timeout_s), timeout_s, timeout_s, timeout_s)
        hooks = client.event_hooks
        client.event_hooks = {
            "request": [*hooks.get("request", []), limit],
            "response": [*hooks.get("response", []), check],
        }
        return client

    if not is_xet_trusted(constants.ENDPOINT, os.environ):
        constants.HF_HUB_DISABLE_XET = True
    remember_token(get_token())
    set_client_factory(factory)
    return _Api(library_name="launcher", library_version=__version__)


@contextlib.contextmanager
def connected() -> Iterator[HfApi]:
    """As `connect`, in a process whose other libraries use the client too: they get it back as it was."""
    try:
        yield connect(timeout_s=60.0)
    finally:
        set_client_factory(default_client_factory)


def require_xet(name: str) -> None:
    """
    Raises:
        EndpointError: a bucket's only transport is not used with this endpoint.
    """
    if not is_xet_trusted(constants.ENDPOINT, os.environ):
        raise EndpointError(
            f"bucket {name} needs Xet, which stores wherever the endpoint says and is not used with an endpoint like "
            f"{constants.ENDPOINT} by itself: set HF_HUB_DISABLE_XET=0 if you trust it"
        )


def _throttled(stream: Any, throttle: Throttle) -> Any:
    class Throttled(type(stream)):  # type: ignore[misc]  # the transport checks for the stream's class
        def __init__(self) -> None:
            pass

        def __iter__(self) -> Iterator[bytes]:
            for chunk in stream:
                for start in range(0, len(chunk), _SLICE_BYTES):
                    piece = chunk[start : start + _SLICE_BYTES]
                    throttle.pass_through(len(piece))
                    yield piece

        def close(self) -> None:
            stream.close()

    return Throttled()


@contextlib.contextmanager
def readable_errors(uri: str) -> Iterator[None]:
    """Turns the client's errors while downloading into ours."""
    try:
        yield
    except LauncherError:
        raise
    except ValueError as error:
        raise ResumeError(f"{uri} cannot be read: {redact(str(error))}") from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            raise UserError(f"{uri} cannot be downloaded: {error}. Make room there, or set another folder") from None
        fault = classify(error, uri)
        if fault.kind == "permanent":
            raise ResumeError(f"{uri} cannot be read: {fault.message}. {fault.cure}") from None
        raise HubError(f"{uri} cannot be reached now: {fault.message}. Run the same command again") from None
