"""The spool's small files: journal, ledger, status and news. A value of another type than ours counts as missing.

Standard library only.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launcher.base import files
from launcher.base.inner_files import read_json_object

MAX_NEWS_BYTES = 2**20


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) for v in value)


def _is_pushed(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(e, dict) and isinstance(e.get("commit"), str) and isinstance(e.get("step"), (int, type(None)))
        for e in value.values()
    )


def _is_tags(value: Any) -> bool:
    return isinstance(value, dict) and _is_names(value.get("move")) and _is_names(value.get("delete"))


def _is_card(value: Any) -> bool:
    types = {"metadata": dict, "text": str, "notices": list}
    return isinstance(value, dict) and all(isinstance(value.get(k, t()), t) for k, t in types.items())


_Checks = dict[str, tuple[Callable[[], Any], Callable[[Any], bool]]]
"""Key → what stands for a missing value, and what a value must be."""

_JOURNAL: _Checks = {
    "target": (lambda: None, _is_text),
    "repo_id": (lambda: None, _is_text),
    "pushed": (dict, _is_pushed),
    "failed": (dict, lambda v: isinstance(v, dict) and _is_names(list(v.values()))),
    "passed_over": (list, _is_names),
    "commit_times": (list, lambda v: isinstance(v, list) and all(map(_is_number, v))),
    "last_squash": (lambda: None, _is_number),
    "commits_since_squash": (int, lambda v: type(v) is int),
    "tags_due": (lambda: None, _is_tags),
    "pull_requests_before": (lambda: None, _is_names),
    "told_notices": (list, _is_names),
    "unmarked": (list, _is_names),
    "card": (dict, _is_card),
}
_LEDGER: _Checks = {"passed_over": (list, _is_names), "dropped": (list, _is_names)}
_STATUS: _Checks = {
    "state": (str, _is_text),
    "item": (lambda: None, _is_text),
    "last_error": (lambda: None, _is_text),
    "tried_at": (float, _is_number),
    "sent_bytes": (int, _is_number),
}


def read_journal(path: Path) -> dict[str, Any]:
    """What the uploader knows of the Hub; every key is there. What is lost of it, the Hub is asked for again."""
    return _checked(path, _JOURNAL)


def read_ledger(path: Path) -> dict[str, Any]:
    """Uploads that will not be made."""
    return _checked(path, _LEDGER)


def read_status(path: Path) -> dict[str, Any]:
    """What the uploader does now."""
    return _checked(path, _STATUS)


def _checked(path: Path, checks: _Checks) -> dict[str, Any]:
    raw: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        raw = read_json_object(path)
    return {key: raw[key] if key in raw and is_right(raw[key]) else default()
            for key, (default, is_right) in checks.items()}  # fmt: skip


def write_quietly(path: Path, value: Any) -> None:
    """Replaces a JSON file atomically but without fsync: it may be lost in a power cut, and nobody waits for a disk."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}-{threading.get_ident()}")
    with contextlib.suppress(OSError):
        temporary.unlink(missing_ok=True)
        write_new(temporary, json.dumps(value).encode())
        temporary.rename(path)


def write_new(path: Path, data: bytes) -> None:
    """Writes a file that must not be there yet; readable by its owner only."""
    with os.fdopen(files.create_exclusive(path, mode=0o600), "wb") as file:
        file.write(data)


def lines_from(path: Path, offset: int) -> tuple[list[str], int]:
    """The news told in a file since an offset, and the offset after them; a line that is cut off is left for later.

    Raises:
        OSError: it is there and cannot be read.
    """
    try:
        with files.open_read(path) as file:
            file.seek(offset)
            data = file.read(MAX_NEWS_BYTES)
    except FileNotFoundError:
        return [], offset
    whole = data if len(data) == MAX_NEWS_BYTES and b"\n" not in data else data[: data.rfind(b"\n") + 1]
    texts = []
    for line in whole.splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
            text = json.loads(line)["text"]
            texts.append("".join(c if c.isprintable() else " " for c in text))  # no escape sequence for the terminal
    return texts, offset + len(whole)
