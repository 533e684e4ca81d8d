"""The file layer: every durable write, rename and delete of a run goes through here. Standard library only.

`on_operation` is called before each operation with its name and path, so that the fault tests can kill the process
at every single one of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

on_operation: Callable[[str, Path], None] | None = None


def _operation(name: str, path: Path) -> None:
    if on_operation is not None:
        on_operation(name, path)


def fsync_dir(path: Path) -> None:
    """Makes the names inside a folder durable."""
    _operation("fsync_dir", path)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_file(fd: int, path: Path) -> None:
    _operation("fsync", path)
    os.fsync(fd)


def write_at(fd: int, data: memoryview | bytes, offset: int, path: Path) -> None:
    """Writes all of `data` at a byte offset."""
    _operation("write", path)
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view[: 1 << 26], offset)
        view, offset = view[written:], offset + written


def write_file(path: Path, data: bytes) -> None:
    """Writes a whole new file and makes its bytes (not yet its name) durable."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        write_at(fd, data, 0, path)
        fsync_file(fd, path)
    finally:
        os.close(fd)


def replace_file(path: Path, data: bytes) -> None:
    """Atomically replaces a file; after a crash either the old or the new content is there."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        write_file(temporary, data)
        rename(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def rename(source: Path, target: Path) -> None:
    """Renames and makes both names durable."""
    _operation("rename", target)
    source.rename(target)
    fsync_dir(target.parent)


def remove_tree(path: Path) -> None:
    """Deletes a folder, file by file; a missing one is fine."""
    for folder, _, files in os.walk(path, topdown=False):
        for name in files:
            file = Path(folder) / name
            _operation("delete", file)
            with contextlib.suppress(FileNotFoundError):
                file.unlink()
    _operation("delete", path)
    shutil.rmtree(path, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Atomically replaces a JSON file."""
    replace_file(path, (json.dumps(value, indent=2) + "\n").encode())


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def read_json_or(path: Path, default: Any) -> Any:
    """The content of a JSON file, or `default` where it is missing or broken."""
    try:
        return read_json(path)
    except (OSError, ValueError):
        return default


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a JSON Lines file; a line cut off by a crash is left out."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                value = json.loads(line)
            except ValueError:
                continue
            if isinstance(value, dict):
                yield value


def free_bytes(path: Path) -> int:
    """Bytes that this user may still write on the file system of `path`."""
    stats = os.statvfs(path)
    return stats.f_bavail * stats.f_frsize
