"""What the Hub client reads from its environment. It does so when it is imported, so this comes before."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from launcher.hub.items import UploadSettings

_HUB_HOST = re.compile(r"([a-z0-9-]+\.)*(huggingface\.co|hf\.co)")
_PACKAGE_PARENT = Path(__file__).resolve().parents[2]


def is_xet_trusted(endpoint: str, environment: Mapping[str, str]) -> bool:
    """Whether Xet may be used with an endpoint.

    hf_xet stores and reads where an answer's casUrl says, also in a folder of this machine (`local:///…`), and asks for
    that answer itself. So the endpoint must be the Hub, or be declared trustworthy by HF_HUB_DISABLE_XET=0.
    """
    url = urlsplit(endpoint)
    is_hub = url.scheme == "https" and bool(_HUB_HOST.fullmatch(url.hostname or ""))
    return is_hub or environment.get("HF_HUB_DISABLE_XET", "").strip().lower() in ("0", "false", "no", "off")


def distrust_xet() -> None:
    """For a process in which other libraries download from the Hub; before they are imported."""
    if not is_xet_trusted(os.environ.get("HF_ENDPOINT") or "https://huggingface.co", os.environ):
        os.environ["HF_HUB_DISABLE_XET"] = "1"


def client_environment(settings: UploadSettings) -> dict[str, str]:
    """Variables for a process that uploads.

    hf_xet has clocks of its own and no bandwidth cap, so with a cap repositories are pushed over plain HTTP; buckets
    know only Xet, and are given their bytes slowly.
    """
    seconds = f"{settings.timeout_s:.0f}s"
    env = {
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_VERBOSITY": "error",  # its warnings quote signed URLs; what matters is told by us
        "HF_XET_CLIENT_READ_TIMEOUT": os.environ.get("HF_XET_CLIENT_READ_TIMEOUT", seconds),
        "HF_XET_CLIENT_RETRY_MAX_DURATION": os.environ.get("HF_XET_CLIENT_RETRY_MAX_DURATION", seconds),
    }
    if settings.max_bytes_per_s is not None and settings.bucket is None:
        env["HF_HUB_DISABLE_XET"] = "1"
    return env


def uploader_environment(settings: UploadSettings) -> dict[str, str]:
    """The trainer's own, without what could make the client write a token into a log."""
    env = {k: v for k, v in os.environ.items() if k != "HF_DEBUG"}
    env["PYTHONPATH"] = os.pathsep.join([str(_PACKAGE_PARENT), *filter(None, [env.get("PYTHONPATH")])])
    return {**env, **client_environment(settings), "PYTHONUNBUFFERED": "1"}
