"""`launcher init DIR`: a small project of the user's own on top of the installed package. Imports no torch."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
from pathlib import Path

from launcher.base.errors import EXIT_DONE, UserError

_PROJECT = Path(__file__).with_name("project")
_RENAMED = {"gitignore": ".gitignore"}
"""A file that would change how this package itself is built has another name in it."""


def main(argv: list[str]) -> int:
    """Writes the project; returns the exit code.

    Raises:
        UserError: the folder is not empty, or cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog="launcher init",
        description="A small project of your own: an experiment, data, a metric and an optimizer, a Makefile.",
        epilog="example: launcher init my && cd my && make train", allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("dir", type=Path, metavar="DIR", help="a folder that does not exist yet, or an empty one")
    folder: Path = parser.parse_args(argv).dir.expanduser()
    written = create(folder)
    print(f"{folder}: {', '.join(written)}")
    where = os.path.relpath(folder) if folder.is_relative_to(Path.cwd()) else folder
    print(f"next: cd {shlex.quote(str(where))} && make train")
    return EXIT_DONE


def create(folder: Path) -> list[str]:
    """Writes the project into a folder; the paths of its files in it. What exists is never changed.

    Raises:
        UserError: the folder is not empty, or cannot be written.
    """
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            what = "is not empty" if folder.is_dir() else "is a file"
            raise UserError(f"DIR={folder} {what}. Give a folder that does not exist yet: launcher init DIR")
        if folder.is_symlink() and not folder.exists():
            raise UserError(f"DIR={folder} is a link to {folder.readlink()}, which is not there. Make that first")
        folder.mkdir(parents=True, exist_ok=True)
        written = []
        for source in sorted(
            path for path in _PROJECT.rglob("*") if path.is_file() and "__pycache__" not in path.parts
        ):
            name = source.relative_to(_PROJECT)
            target = folder / name.with_name(_RENAMED.get(name.name, name.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
            written.append(str(target.relative_to(folder)))
    except OSError as error:
        raise UserError(
            f"DIR={folder} cannot be written: {error.strerror}. Give another one: launcher init DIR"
        ) from error
    return written
