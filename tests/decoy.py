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
        self._reset()

    def _reset(self) -> None:
        for path in self.root.rglob("*"):
            os.utime(path, ns=_LONG_AGO)

    def disturbed(self) -> list[str]:
        """Files that were read, changed, made or deleted; folders that were listed do not count."""
        found = sorted(p for p in self.root.rglob("*") if not p.is_dir())
        read = [str(p) for p in found if p.lstat().st_atime_ns != _LONG_AGO[0]]
        names = sorted(str(p.relative_to(self.root)) for p in found)
        changed = [n for n in self.NAMES if not (self.root / n).is_file() or (self.root / n).read_text() != "precious"]
        self._reset()
        return read + changed + sorted(set(names) ^ set(self.NAMES))
