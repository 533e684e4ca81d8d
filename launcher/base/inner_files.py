"""Reading files of a folder that may come from elsewhere: no link is followed, nothing outside is read, no pipe hangs.

A folder that was received can hold links to anything its new owner may read; what is read through them would be sent to
the Hub. The exception is a snapshot in the Hub client's cache, which consists of links to the blobs beside it.
Standard library only.
"""

from __future__ import annotations

import stat
from pathlib import Path, PurePosixPath
from typing import Any

from launcher.base import files
from launcher.base.cached_blobs import cached_blob
from launcher.base.errors import UnsafeFileError


def is_inner_path(path: Any) -> bool:
    """Whether a text can name a file inside of a folder: relative, in its shortest form, one line."""
    if not isinstance(path, str) or not 0 < len(path) <= 1024 or not path.isprintable():
        return False
    return not any(part in ("", ".", "..") for part in path.split("/"))


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        OSError, ValueError: as `files.read_json`, or it is no JSON object.
    """
    value = files.read_json(path)
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
            if (blob := cached_blob(path)) is not None:
                return blob
            raise UnsafeFileError(
                f"{path} is a link to {str(path.readlink())!r}, and links are not followed: what they lead to may lie "
                "outside. Put the file itself in its place"
            )
    if not stat.S_ISREG(mode):
        raise UnsafeFileError(f"{path} is no regular file")
    return path
