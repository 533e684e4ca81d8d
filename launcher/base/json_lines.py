"""JSON Lines: a file that grows by a line at a time, whose last one a crash may have cut off. Standard library only."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launcher.base.files import open_fd, open_read, parse_json

_MAX_LINE_BYTES = 16 * 2**20
_BACKWARDS_BYTES = 2**16


def append(
    path: Path, lines: bytes, *, within: Path | None = None, mode: int = 0o644, max_bytes: int | None = None
) -> None:
    """Adds lines, all of them or, where the disk refuses, none. They begin a line of their own, whatever was cut off.

    Args:
        max_bytes: what would make the file longer is left out.

    Raises:
        OSError: the disk is full, for example.
    """
    fd = open_fd(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, within=within, mode=mode)
    try:
        before, written = os.fstat(fd).st_size, 0
        if max_bytes is not None and before + len(lines) > max_bytes:
            return
        is_cut_off = before > 0 and os.pread(fd, 1, before - 1) != b"\n"
        data = b"\n" * is_cut_off + lines
        try:
            while written < len(data):
                written += os.write(fd, data[written:])
        except OSError:
            if os.fstat(fd).st_size == before + written:  # else somebody else has added something since
                os.ftruncate(fd, before)
            raise
    finally:
        os.close(fd)


def read(path: Path, *, within: Path | None = None, is_required: bool = False) -> Iterator[dict[str, Any]]:
    """The whole lines of a JSON Lines file; a line that a crash cut off is left out, and a file that cannot be read.

    Raises:
        OSError: with `is_required`, where it cannot be read.
    """
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open_read(path, within=within))
        except OSError:
            if is_required:
                raise
            return
        while line := file.readline(_MAX_LINE_BYTES):
            with contextlib.suppress(ValueError):
                value = parse_json(line.decode("utf-8", "replace"))
                if isinstance(value, dict):
                    yield value


def read_backwards(path: Path, key: str | None = None, *, within: Path | None = None) -> Iterator[dict[str, Any]]:
    """As `read`, from the last line to the first: what is new in a long file is found at once.

    Args:
        key: only lines that hold this name are parsed.
    """
    wanted = b"" if key is None else json.dumps(key).encode()
    try:
        with open_read(path, within=within) as file:
            start, rest = file.seek(0, os.SEEK_END), b""
            while start:
                end, start = start, max(0, start - _BACKWARDS_BYTES)
                file.seek(start)
                first, *lines = (file.read(end - start) + rest).split(b"\n")
                rest = first if len(first) <= _MAX_LINE_BYTES else b""
                for line in reversed(lines if start else [first, *lines]):
                    if wanted not in line:
                        continue
                    with contextlib.suppress(ValueError):
                        value = parse_json(line.decode("utf-8", "replace"))
                        if isinstance(value, dict):
                            yield value
    except OSError:
        return
