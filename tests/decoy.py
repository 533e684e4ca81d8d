"""A folder that nobody has business with: whether anything in it was read, written, made or deleted."""

from __future__ import annotations

import os
from pathlib import Path

_LONG_AGO = (10**18, 10**18 + 10**10)  # ns; read before written, so that also relatime notes the next read


class Decoy:
    """Some files in `root`; `disturbed()` says what happened to them since the last call."""

    NAMES = ("a", "deep/b", "deep/er/c", "model.safetensors", "config.json", "manifest.json", "trainer_state.json")

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in self.NAMES:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text("precious")
        self._expected = self._reset()

    def _reset(self) -> dict[str, tuple[int, ...]]:
        for path in self.root.rglob("*"):
            os.utime(path, ns=_LONG_AGO)
        return self._seen()

    def _seen(self) -> dict[str, tuple[int, ...]]:
        """Times of access, of change and of the names of each file; folders that were listed do not count."""
        found, pending = {}, [str(self.root)]
        while pending:
            with os.scandir(pending.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
                    else:
                        stat = entry.stat(follow_symlinks=False)
                        found[entry.path] = (stat.st_atime_ns, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_nlink)
        return found

    def disturbed(self) -> list[str]:
        seen = self._seen()
        changed = sorted(p for p in {*seen, *self._expected} if seen.get(p) != self._expected.get(p))
        if changed:
            self._expected = self._reset()
        return changed
