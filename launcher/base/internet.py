"""Whether the Hub can be reached at all, in seconds: its client tries for most of a minute. Standard library only."""

from __future__ import annotations

import os
import socket
import urllib.parse
import urllib.request

_WAIT_S = 3.0


def why_unreachable() -> str | None:
    """Host and reason where no connection to the Hub can be made; None where one can, where a proxy stands between, or
    offline."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return None
    address = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    if address.hostname is None or urllib.request.getproxies():
        return None
    try:
        port = address.port or (80 if address.scheme == "http" else 443)
        socket.create_connection((address.hostname, port), _WAIT_S).close()
    except (OSError, ValueError) as error:
        return f"{address.hostname} cannot be reached: {error}"
    return None
