"""Where the benchmarks put what they write."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def in_memory(needed_bytes: int) -> str | None:
    """A folder in memory with so much room; None: there is none, and the usual place for temporary files has to do.

    It is $SHM_WORK under run.sh, which removes what a part leaves there that was killed at its limit.
    """
    folder = Path(os.environ.get("SHM_WORK", "/dev/shm"))
    try:
        folder.mkdir(exist_ok=True)
        return str(folder) if shutil.disk_usage(folder).free > needed_bytes else None
    except OSError:
        return None
