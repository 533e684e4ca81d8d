"""`launcher verify`: re-reads every byte of a run's checkpoints, or of one, against the manifest."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

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
        epilog="example: launcher verify outputs/arithmetic/checkpoint-500", allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("path", type=Path, help="a run's output_dir or one checkpoint")
    parser.add_argument("--json", action="store_true", help="for a script: {ok, checkpoints: […], leftovers: […]}")
    options = parser.parse_args(argv)
    path: Path = options.path
    rows = [_examined(folder, is_asked_for=folder == path) for folder in _folders(path)]
    leftovers = [p.name for p in path.glob(f"{DELETED_PREFIX}*")] + [p.name for p in path.glob(".tmp-checkpoint-*")]
    damaged = any(row["state"] == "damaged" for row in rows)
    if options.json:
        print(json.dumps({"ok": not damaged, "checkpoints": rows, "leftovers": leftovers}, indent=1))
        return 1 if damaged else 0
    for row in rows:
        _show(row)
    for name in leftovers:
        print(f"{name}: left by an interrupted save or deletion; the next start removes it")
    return 1 if damaged else 0


def _folders(path: Path) -> list[Path]:
    if not path.is_dir():
        raise UserError(f"{path} is no folder. Give the output_dir of a run, or a checkpoint-N folder")
    if (path / manifest.NAME).is_file() or ".damaged" in path.name or checkpoint_step(path) is not None:
        return [path]
    folders = [folder for _, folder in RunPaths(path).checkpoint_dirs()]
    folders += sorted(p for p in path.glob("checkpoint-*.damaged*") if p.is_dir())
    if not folders:
        raise UserError(f"{path} holds no checkpoint-N folder")
    return folders


def _examined(folder: Path, *, is_asked_for: bool) -> dict[str, Any]:
    """What --json says of a checkpoint. One that is not ours is damaged only where nothing else was asked for."""
    row: dict[str, Any] = {"checkpoint": folder.name, "state": "foreign", "problems": []}
    if not (folder / manifest.NAME).is_file() and not is_asked_for:
        return row
    if problems := check(folder):
        return {**row, "state": "damaged", "problems": problems}
    found = manifest.read(folder)
    counts = {"step": found.step, "files": len(found.files), "bytes": found.total_bytes}
    return {**row, "state": "whole", **counts, "ignored_files": manifest.unknown_files(folder, found)}


def _show(row: dict[str, Any]) -> None:
    name = row["checkpoint"]
    if row["state"] == "foreign":
        print(f"{name}: no manifest.json of ours, not checked")
    for problem in row["problems"]:
        print(f"{name}: {problem}")
    if row["state"] == "whole":
        print(f"{name}: whole, {row['files']} files, {row['bytes']:,} bytes")
        for ignored in row["ignored_files"]:
            print(f"{name}: {ignored} is not part of the checkpoint and is ignored")
