"""Content hashes of data files, remembered, so that a restart does not read terabytes again."""

from __future__ import annotations

import contextlib
import hashlib
import time
from pathlib import Path
from typing import Any

from launcher.base.files import read_json_or, write_json

_SETTLED_S = 2.0  # a file changed this recently may change again within one tick of its clock


class FileHashes:
    """sha256 of files by (path, bytes, mtime, inode), kept in one JSON file of the cache folder.

    Concurrent processes may lose each other's additions, never gain a wrong one.
    """

    def __init__(self, cache_dir: Path) -> None:
        self._path = cache_dir / "file-hashes.json"

    def sha256(self, path: Path) -> str:
        stat = path.stat()
        mark = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
        known = self._read().get(str(path.resolve()))
        if isinstance(known, list) and known[:-1] == mark:
            return str(known[-1])
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if time.time() - stat.st_mtime > _SETTLED_S:
            with contextlib.suppress(OSError):  # a full or unwritable cache: the tokens' own error names it
                self._path.parent.mkdir(parents=True, exist_ok=True)
                write_json(self._path, {**self._read(), str(path.resolve()): [*mark, digest]})
        return digest

    def _read(self) -> dict[str, Any]:
        value = read_json_or(self._path, {})
        return value if isinstance(value, dict) else {}
