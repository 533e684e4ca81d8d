"""Reading files of a folder that may come from elsewhere: no link is followed, nothing outside is read, no pipe hangs.

A folder that was received can hold links to anything its new owner may read; what is read through them would be sent to
the Hub. The exception is a snapshot in the Hub client's cache, which consists of links to the blobs beside it.
Standard library only.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from launcher.base.errors import UnsafeFileError

MAX_JSON_BYTES = 64 * 2**20
_CACHED_REPO = re.compile(r"(models|datasets)--[\w.-]+(--[\w.-]+)?")
_SHARED_BLOB = re.compile(r"blobs/[0-9a-f]{2}/[0-9a-f]{64}")


def is_inner_path(path: Any) -> bool:
    """Whether a text can name a file inside of a folder: relative, in its shortest form, one line."""
    if not isinstance(path, str) or not 0 < len(path) <= 1024 or not path.isprintable():
        return False
    return not any(part in ("", ".", "..") for part in path.split("/"))


@contextmanager
def open_regular(path: Path) -> Iterator[BinaryIO]:
    """Opens a file for reading; its own name may be no link.

    Raises:
        OSError: it is not there, a link, or no regular file (a pipe would wait for its other end).
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "it is a link, which is not followed", str(path)) from None
        raise
    with os.fdopen(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        yield file


def read_regular(path: Path, max_bytes: int) -> bytes:
    """The content of a file of at most `max_bytes`.

    Raises:
        OSError: as `open_regular`, or it is larger.
    """
    with open_regular(path) as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise OSError(errno.EFBIG, f"it has more than {max_bytes} bytes", str(path))
    return data


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        OSError: as `read_regular`. ValueError: it is no JSON object.
    """
    try:
        value = json.loads(read_regular(path, MAX_JSON_BYTES))
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object")
    return value


def inner_file(folder: Path, name: str) -> Path:
    """Where the regular file `name` below `folder` lies; the folder's own path is the caller's to trust.

    Raises:
        UnsafeFileError: some part of its path is a link, unless it is one of a Hub cache that stays inside of it; or it
            is no regular file. OSError: it is not there.
    """
    if not is_inner_path(name):
        raise UnsafeFileError(f"{name!r} is no name of a file inside {folder}")
    path = folder
    for part in PurePosixPath(name).parts:
        path = path / part
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            if (blob := _blob_of_snapshot(folder, path)) is not None:
                return blob
            raise UnsafeFileError(
                f"{path} is a link to {str(path.readlink())!r}, and links are not followed: what they lead to may lie "
                "outside. Put the file itself in its place"
            )
    if not stat.S_ISREG(mode):
        raise UnsafeFileError(f"{path} is no regular file")
    return path


def _blob_of_snapshot(folder: Path, link: Path) -> Path | None:
    """The blob behind a link of `models--ORG--NAME/snapshots/COMMIT`, None where it leads elsewhere.

    It lies in the `blobs` beside the snapshots, or is itself a link to one that several repositories share.
    """
    folder = Path(os.path.normpath(folder.absolute()))
    repo = folder.parent.parent
    if folder.parent.name != "snapshots" or not _CACHED_REPO.fullmatch(repo.name):
        return None
    blob = Path(os.path.normpath(folder / link.absolute().relative_to(folder).parent / link.readlink()))
    if blob.parent != repo / "blobs" or blob.parent.is_symlink():
        return None
    if blob.is_symlink():
        blob = Path(os.path.normpath(blob.parent / blob.readlink()))
        inside = blob.relative_to(repo.parent).as_posix() if blob.is_relative_to(repo.parent) else ""
        if not _SHARED_BLOB.fullmatch(inside) or blob.parent.is_symlink() or blob.parent.parent.is_symlink():
            return None
    return blob if stat.S_ISREG(blob.lstat().st_mode) else None
