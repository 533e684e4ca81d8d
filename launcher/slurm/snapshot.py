"""The code that a job runs: a copy that no later edit changes. Standard library only."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.base import files

_PACKAGE = Path(__file__).resolve().parent.parent
_RECORD = "snapshot.json"


@dataclass(frozen=True)
class Snapshot:
    """The files to copy, by their path inside the copy, and a digest of names and contents."""

    sources: Mapping[str, Path]
    digest: str
    revision: str | None

    def write(self, target: Path) -> None:
        """Copies into `target`, unless it holds the same already; another snapshot there is replaced.

        The copies are read-only. A `.gitignore` keeps them out of the next snapshot of a checkout around them.
        After a crash only a `.tmp` folder can remain beside it.
        """
        if files.read_json_or(target / _RECORD, {}).get("digest") == self.digest:
            return
        temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}")
        for name, source in self.sources.items():
            copy = temporary / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(source.read_bytes())
            copy.chmod(0o444)
        record: dict[str, Any] = {"digest": self.digest, "git_revision": self.revision, "cwd": str(Path.cwd())}
        files.write_json(temporary / _RECORD, record)
        (temporary / ".gitignore").write_text("*\n", encoding="utf-8")
        if target.exists():
            files.remove_tree(target)
        files.rename(temporary, target)


def take_snapshot() -> Snapshot:
    """This package as it runs now, and the Python files of the working directory, where `_target_` classes live."""
    cwd = Path.cwd()
    sources = {str(p.relative_to(cwd)): p for p in sorted(_python_files(cwd))}
    sources = {name: p for name, p in sources.items() if not name.startswith(f"{_PACKAGE.name}/")}
    sources |= {f"{_PACKAGE.name}/{p.relative_to(_PACKAGE)}": p for p in sorted(_files_below(_PACKAGE))}
    digest = hashlib.sha256()
    for name, source in sources.items():
        digest.update(f"{name}\0".encode() + hashlib.sha256(source.read_bytes()).digest())
    return Snapshot(sources, digest.hexdigest(), _revision(cwd))


def _python_files(cwd: Path) -> Iterator[Path]:
    """In a checkout everything that git does not ignore; elsewhere the top-level modules and packages only.

    A home directory must not be walked, so folders that are no packages are left out.
    """
    listed = _git(cwd, "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", "*.py")
    if listed is not None:
        yield from (p for name in listed.split("\0") if name and (p := cwd / name).is_file())
        return
    yield from (p for p in cwd.glob("*.py") if p.is_file())
    for package in cwd.glob("*/__init__.py"):
        yield from (p for p in _files_below(package.parent) if p.suffix == ".py")


def _files_below(folder: Path) -> Iterator[Path]:
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name != "__pycache__" and not name.startswith(".")]
        yield from (Path(root) / name for name in names)


def _revision(cwd: Path) -> str | None:
    """The commit, with `-dirty` where the checkout differs from it."""
    described = _git(cwd, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    return described.strip() if described else None


def _git(cwd: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(("git", *arguments), cwd=cwd, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None
