"""What has to be written on a full disk, too: how a run stands. Standard library only."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

from launcher.base import files


def rewrite_json(path: Path, value: Any) -> None:
    """As `files.write_json`; where a full disk refuses a new file, in the blocks of the old one, if they are enough.

    How a run ended has to be told then, too. A power cut in that moment may leave half of each.
    """
    try:
        files.write_json(path, value)
    except OSError as error:
        shortest = json.dumps(value, separators=(",", ":")).encode()
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not _overwrite(path, shortest):
            raise


def _overwrite(path: Path, data: bytes) -> bool:
    """False where the file's blocks do not suffice."""
    fd = files.open_fd(path, os.O_WRONLY)
    try:
        info = os.fstat(fd)
        if len(data) > info.st_blocks * 512:
            return False
        files.write_at(fd, data.ljust(info.st_size), 0, path)  # JSON may end with spaces
        os.ftruncate(fd, len(data))
        files.fsync_file(fd, path)
    finally:
        os.close(fd)
    return True
