"""The code that a job runs: a copy that no later edit changes. Standard library only.

In a git checkout the tracked Python files are copied, and what is named: by a `_target_` or by launch.code_files. An
untracked file may be private, and a link may lead anywhere, so neither is copied silently: what is left out is said.
"""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.base import files
from launcher.base.errors import UserError

_PACKAGE = Path(__file__).resolve().parent.parent
_RECORD = "snapshot.json"
_MAX_FILE_BYTES = 2**26
_NUM_SHOWN = 5


@dataclass(frozen=True)
class Source:
    """A file by its content, or a link by where it leads inside of the copy. `mode` is the original's."""

    mode: int
    data: bytes = b""
    link: str | None = None


@dataclass(frozen=True)
class Snapshot:
    """What is copied, by path inside the copy, a digest of it, and what a user should know of what is not."""

    sources: Mapping[str, Source]
    digest: str
    revision: str | None
    notices: tuple[str, ...] = ()

    def write(self, target: Path) -> None:
        """Copies into `target`, unless it holds the same already; another snapshot there is replaced.

        The copies are read-only, for those who may read the originals, in a folder of their owner's alone. A
        `.gitignore` keeps them out of the next snapshot of a checkout around them. After a crash only a `.tmp` folder
        can remain beside it.
        """
        if files.read_json_or(target / _RECORD, {}).get("digest") == self.digest:
            return
        temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}")
        files.remove_tree(temporary)
        temporary.mkdir(mode=0o700)
        for name, source in self.sources.items():
            copy = temporary / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            if source.link is not None:
                copy.symlink_to(source.link)
                continue
            fd = files.create_exclusive(copy, within=temporary, mode=0o600)
            with os.fdopen(fd, "wb") as file:
                file.write(source.data)
                os.fchmod(fd, source.mode & 0o555 | 0o400)
        record: dict[str, Any] = {"digest": self.digest, "git_revision": self.revision, "cwd": str(Path.cwd())}
        files.write_json(temporary / _RECORD, record)
        (temporary / ".gitignore").write_text("*\n", encoding="utf-8")
        if target.is_symlink() or target.exists():
            files.remove_tree(target)
        files.rename(temporary, target)


def take_snapshot(targets: Iterable[str] = (), named: Iterable[str] = ()) -> Snapshot:
    """This package as it runs now, and the Python files of the working directory, where `_target_` classes live.

    Args:
        targets: import paths of classes; where their modules lie in the working directory they are copied.
        named: further files of the working directory, as paths or globs.
    """
    cwd = Path.cwd()
    wanted = {*_module_files(cwd, targets), *_named_files(cwd, named)}
    own = _Collected(cwd, "")
    tracked = _tracked_files(cwd, python_only=True)
    own.add(wanted | set(_python_files(cwd) if tracked is None else tracked))
    others = [] if tracked is None else _untracked_python_files(cwd)
    untracked = [n for n in others if n not in wanted and not (cwd / n).is_relative_to(_PACKAGE)]
    package = _Collected(_PACKAGE, f"{_PACKAGE.name}/")
    package.add(_package_files())
    sources = {name: s for name, s in own.sources.items() if not name.startswith(f"{_PACKAGE.name}/")}
    sources |= package.sources
    digest = hashlib.sha256()
    for name, source in sorted(sources.items()):
        digest.update(f"{name}\0{source.mode:o}\0{source.link}\0".encode(errors="surrogateescape"))
        digest.update(hashlib.sha256(source.data).digest())
    notices = [*_notice_of_untracked(untracked), *_notice_of_left_out([*own.left_out, *package.left_out])]
    return Snapshot(dict(sorted(sources.items())), digest.hexdigest(), _revision(cwd), tuple(notices))


def _notice_of_untracked(names: list[str]) -> Iterator[str]:
    if names:
        yield (
            f"not tracked by git, so the job does not get: {_shown(names)}. `git add` what it needs, or name it: "
            f"launch.code_files=[{names[0]}]"
        )


def _notice_of_left_out(names: list[str]) -> Iterator[str]:
    if names:
        yield (
            f"left out of the job's code: {_shown(names)}: a link that leads elsewhere, a file behind one, or no plain "
            "file. Put the file itself there, or install it as a package"
        )


def _shown(names: list[str]) -> str:
    more = f" and {len(names) - _NUM_SHOWN} more" if len(names) > _NUM_SHOWN else ""
    return ", ".join(sorted(names)[:_NUM_SHOWN]) + more


class _Collected:
    """Files below one folder, read without following links. `left_out` names what cannot be part of the copy."""

    def __init__(self, root: Path, prefix: str) -> None:
        self._root, self._prefix = root.resolve(), prefix
        self.sources: dict[str, Source] = {}
        self.left_out: list[str] = []

    def add(self, names: Iterable[str]) -> None:
        links = []
        for name in sorted(names):
            path = self._root / name
            try:
                if path.is_symlink():
                    links.append(name)
                    continue
                with files.open_read(path, within=self._root) as file:
                    info = os.fstat(file.fileno())
                    if info.st_size > _MAX_FILE_BYTES:
                        raise OSError(f"{name} is too large to be code")
                    self.sources[self._prefix + name] = Source(stat.S_IMODE(info.st_mode), file.read())
            except FileNotFoundError:
                continue  # tracked, and deleted in the working tree
            except (OSError, ValueError):
                self.left_out.append(self._prefix + name)
        self._add_links(links)

    def _add_links(self, names: list[str]) -> None:
        """Links to what is copied stay links; others could show the job, or a reader of the copy, anything."""
        folders = {str(p) for name in self.sources for p in Path(name.removeprefix(self._prefix)).parents}
        for name in names:
            target = (self._root / name).resolve()
            inside = str(target.relative_to(self._root)) if target.is_relative_to(self._root) else ""
            if inside in folders - {"."} or self._prefix + inside in self.sources:
                self.sources[self._prefix + name] = Source(0o777, link=os.path.relpath(inside, Path(name).parent))
            else:
                self.left_out.append(self._prefix + name)


# --------------------------------------------------------------------------- what is copied


def _tracked_files(folder: Path, *, python_only: bool) -> set[str] | None:
    """What git tracks below a folder, links of any name among it; None where it is no checkout or git tracks nothing.

    An installed package inside of somebody's checkout is one of which git tracks nothing.
    """
    listed = _git(folder, "ls-files", "-z", "--stage", "--cached")
    if not listed:
        return None if listed is None or not python_only else set()
    found = set()
    for line in listed.split("\0"):
        head, _, name = line.partition("\t")
        mode = head.partition(" ")[0]
        if mode == "160000" or not name or "__pycache__" in name:  # another repository
            continue
        if not python_only or name.endswith(".py") or mode == "120000":
            found.add(name)
    return found


def _untracked_python_files(folder: Path) -> list[str]:
    listed = _git(folder, "ls-files", "-z", "--others", "--exclude-standard", "--", "*.py") or ""
    return [name for name in listed.split("\0") if name]


def _python_files(cwd: Path) -> Iterator[str]:
    """Outside of a checkout: the top-level modules and packages.

    A home directory must not be walked, so folders that are no packages are left out.
    """
    yield from (p.name for p in cwd.glob("*.py"))
    for package in cwd.glob("*/__init__.py"):
        if package.parent.is_symlink():
            yield package.parent.name
        else:
            yield from (name for name in _files_below(package.parent, cwd) if name.endswith(".py"))


def _package_files() -> set[str]:
    """Of this package, so that a job can import all that runs here: a new module of its own too, tracked or not."""
    tracked = _tracked_files(_PACKAGE, python_only=False)
    if tracked is None:  # installed
        return set(_files_below(_PACKAGE, _PACKAGE))
    return tracked | set(_untracked_python_files(_PACKAGE))


def _files_below(folder: Path, root: Path) -> Iterator[str]:
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name != "__pycache__" and not name.startswith(".")]
        yield from (str((Path(parent) / name).relative_to(root)) for name in names)


def _module_files(cwd: Path, targets: Iterable[str]) -> Iterator[str]:
    """The modules of `PACKAGE.MODULE.CLASS` that lie in the working directory, with their packages' `__init__.py`."""
    for target in targets:
        parts = target.split(".")
        if not all(part.isidentifier() for part in parts):
            continue
        for count in range(1, len(parts)):
            stem = "/".join(parts[:count])
            yield from (name for name in (f"{stem}.py", f"{stem}/__init__.py") if os.path.lexists(cwd / name))


def _named_files(cwd: Path, named: Iterable[str]) -> Iterator[str]:
    """Files that launch.code_files names.

    Raises:
        UserError: a name leads out of the working directory, or to nothing.
    """
    for pattern in named:
        path = Path(pattern)
        if path.is_absolute() or ".." in path.parts or not pattern.strip():
            raise UserError(f"launch.code_files: {pattern} must be a path below the working directory {cwd}")
        found = [p for p in sorted(cwd.glob(pattern)) if p.is_symlink() or not p.is_dir()]
        for folder in [p for p in sorted(cwd.glob(pattern)) if p.is_dir() and not p.is_symlink()]:
            found += [cwd / name for name in _files_below(folder, cwd)]
        if not found:
            raise UserError(f"launch.code_files: {pattern} matches no file in {cwd}")
        yield from (str(p.relative_to(cwd)) for p in found)


def _revision(cwd: Path) -> str | None:
    """The commit, with `-dirty` where the checkout differs from it."""
    described = _git(cwd, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    return described.strip() if described else None


def _git(cwd: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(("git", *arguments), cwd=cwd, capture_output=True, check=False)
    except OSError:
        return None
    return os.fsdecode(done.stdout) if done.returncode == 0 else None
