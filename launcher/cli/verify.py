"""`launcher verify`: re-reads every byte of a run's checkpoints, or of one, against the manifest."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from launcher.base import manifest
from launcher.base.errors import UserError
from launcher.base.paths import RunPaths, checkpoint_step
from launcher.checkpoint.writer import DELETED_PREFIX


def check(folder: Path) -> list[str]:
    """The problems of one checkpoint; also a step that is not the folder's name."""
    try:
        problems = manifest.verify(folder, threads=os.cpu_count() or 1)
    except FileNotFoundError:
        return ["manifest.json is missing: not a checkpoint of this tool, or its manifest was deleted"]
    step = checkpoint_step(folder)
    if not problems and step is not None and manifest.read(folder).step != step:
        problems.append(f"manifest.json is of step {manifest.read(folder).step}")
    return problems


def main(argv: list[str]) -> int:
    """0: whole. 1: something is damaged. 2: there is nothing to verify."""
    parser = argparse.ArgumentParser(
        prog="launcher verify",
        description="Re-read every byte of a checkpoint, or of all of a run, against its manifest.",
        epilog="example: launcher verify outputs/arithmetic/checkpoint-500",
    )  # fmt: skip
    parser.add_argument("path", type=Path, help="a run's output_dir or one checkpoint")
    path: Path = parser.parse_args(argv).path
    if not path.is_dir():
        raise UserError(f"{path} is no folder. Give the output_dir of a run, or a checkpoint-N folder")
    if (path / manifest.NAME).is_file() or ".damaged" in path.name or checkpoint_step(path) is not None:
        folders = [path]
    else:
        folders = [folder for _, folder in RunPaths(path).checkpoint_dirs()]
        folders += sorted(p for p in path.glob("checkpoint-*.damaged*") if p.is_dir())
    if not folders:
        raise UserError(f"{path} holds no checkpoint-N folder")
    damaged = False
    for folder in folders:
        is_foreign = not (folder / manifest.NAME).is_file() and folder != path
        problems = [] if is_foreign else check(folder)
        for problem in problems:
            print(f"{folder.name}: {problem}")
        damaged = damaged or bool(problems)
        if is_foreign:
            print(f"{folder.name}: no manifest.json of ours, not checked")
        elif not problems:
            found = manifest.read(folder)
            print(f"{folder.name}: whole, {len(found.files)} files, {found.total_bytes:,} bytes")
            for name in manifest.unknown_files(folder, found):
                print(f"{folder.name}: {name} is not part of the checkpoint and is ignored")
    leftovers = [p.name for p in path.glob(f"{DELETED_PREFIX}*")] + [p.name for p in path.glob(".tmp-checkpoint-*")]
    for name in leftovers:
        print(f"{name}: left by an interrupted save or deletion; the next start removes it")
    return 1 if damaged else 0
