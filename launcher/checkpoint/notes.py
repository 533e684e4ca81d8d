"""What the writers of one machine tell each other about a save, so that it need not wait for the steps of training.

Standard library only: part of the writer process.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from launcher.base import files

FOLDER = ".notes"
_MAX_BYTES = 2**26


class Notes:
    """Small files in the temporary folder of a save, one of each kind by each writer; gone before it gets its name.

    They tell, they prove nothing: what they are about is durable before, and whoever misses one only waits for what the
    processes agree on.

    Args:
        folder: the temporary folder of the save.
        identity: of this very attempt; what an earlier one left behind does not count.
    """

    def __init__(self, folder: Path, identity: str, rank: int, world_size: int) -> None:
        self._folder, self._root = folder / FOLDER, folder.parent
        self._identity, self._rank, self._world_size = identity, rank, world_size
        self._found: dict[str, dict[int, str]] = {}

    def _path(self, kind: str, rank: int) -> Path:
        return self._folder / f"{kind}-{self._identity}-{rank}"

    def begin(self) -> None:
        """Makes room for them: once, since a save that was given up must not come back. Raises: OSError."""
        if self._world_size > 1:
            files.make_dirs(self._folder, within=self._root)

    def leave(self, kind: str, text: str = "") -> None:
        """Tells the others. Raises: OSError."""
        if self._world_size > 1:
            path = self._path(kind, self._rank)
            unfinished = path.with_name(f".{path.name}")
            fd = files.create_exclusive(unfinished, within=self._root)
            try:
                files.write_at(fd, text.encode(), 0, path)
            finally:
                os.close(fd)
            unfinished.rename(path)  # closed before anybody sees it: NFS keeps what is deleted while it is open
        self._found.setdefault(kind, {})[self._rank] = text

    def of_all(self, kind: str) -> list[str] | None:
        """What every writer has left, by rank; None until all have. Raises: OSError, if the save was given up."""
        found = self._found.setdefault(kind, {})
        for rank in range(self._world_size):
            if rank not in found:
                try:
                    text = files.read_bytes(self._path(kind, rank), _MAX_BYTES).decode()
                except FileNotFoundError:
                    self._folder.stat()
                    return None
                found[rank] = text
        return [found[rank] for rank in range(self._world_size)]


def remove(folder: Path) -> None:
    """All notes in the temporary folder of a save; it may have none.

    Raises:
        OSError: something of them is still there, and must not become part of the checkpoint.
    """
    files.remove_tree(folder / FOLDER)
    if files.is_taken(folder / FOLDER):
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(folder / FOLDER))
