"""`launcher checkpoints`: what a run has saved."""

from __future__ import annotations

import argparse
import itertools
import json
import math
from pathlib import Path
from typing import Any

from launcher.base import evaluations, files, manifest, words
from launcher.base.errors import DamagedCheckpointError, UserError
from launcher.base.paths import CheckpointPaths, RunPaths
from launcher.base.text import printable
from launcher.hub import as_of_now
from launcher.sweep.runs import is_run

_MAX_NAMED = 5


def list_checkpoints(root: Path) -> list[dict[str, Any]]:
    """One entry per `checkpoint-N` folder of ours, by rising step; reads manifests and small JSON files only.

    Of the other files it sees that they are there, at their length; their bytes are `launcher verify`'s.
    """
    paths = RunPaths(root)
    info = files.read_json_or(paths.run_state, {})
    pushed = (as_of_now(info.get("hub"), paths) or {}).get("pushed") or []
    evaluated = set(evaluations.steps(paths))
    rows: list[dict[str, Any]] = []
    for step, folder in paths.checkpoint_dirs():
        try:
            found = manifest.read(folder)
        except FileNotFoundError:
            rows.append({"checkpoint": folder.name, "step": step, "state": "foreign (no manifest.json)"})
            continue
        except DamagedCheckpointError as error:
            rows.append({"checkpoint": folder.name, "step": step, "state": f"damaged: {printable(error)}"})
            continue
        if not manifest.is_complete(folder, found) and (problems := manifest.structural_problems(folder, found)):
            rows.append({"checkpoint": folder.name, "step": step, "state": f"damaged: {printable(problems[0])}"})
            continue
        judged = evaluations.read(paths, step) if step in evaluated else None
        trainer = files.read_json_or(CheckpointPaths(folder).trainer_state, {}, files.MAX_HISTORY_BYTES)
        history = trainer.get("log_history")
        metrics = {
            printable(k): v for line in (history if isinstance(history, list) else [])
            if isinstance(line, dict) and line.get("step") == step for k, v in line.items()
            if k == "loss" or (k.startswith("eval_") and k != "eval_runtime_s")
        } | ({printable(k): v for k, v in judged.values.items()} if judged is not None else {})  # fmt: skip
        rows.append(
            {
                "checkpoint": folder.name,
                "step": step,
                "epoch": _number(trainer.get("epoch")),
                "metrics": metrics,
                "bytes": found.total_bytes,
                "world_size": found.world_size,
                "zero_stage": found.zero_stage,
                "is_best": False,
                "is_latest": False,
                "on_hub": folder.name in pushed,
                "state": "whole",
                "best_step": trainer.get("best_global_step"),
            }
        )
    whole = [row for row in rows if row["state"] == "whole"]
    if whole:
        whole[-1]["is_latest"] = True
        # Evaluated in the background, the best is known later than a checkpoint is saved.
        told = info.get("best_step") if evaluated else None
        best = whole[-1]["best_step"] if told is None else told
        for row in whole:
            row["is_best"] = row["step"] == best
    for row in whole:
        del row["best_step"]
    return rows


def _number(value: Any) -> float | None:
    """A number that can be shown; files of another tool may hold anything."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= 2**53
    return value if is_number else None


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """NaN and infinities as null: JSON has no names for them, and other parsers refuse Python's."""
    metrics: dict[str, Any] = row.get("metrics", {})
    known = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
    return {**row, "metrics": known} if "metrics" in row else row


def main(argv: list[str]) -> int:
    """Exit code 0; 2 where the folder is no run."""
    parser = argparse.ArgumentParser(
        prog="launcher checkpoints", description="List the checkpoints of a run.",
        epilog="example: launcher checkpoints outputs/arithmetic --json", allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("run", type=Path, help="the run's output_dir")
    parser.add_argument("--json", action="store_true", help="for machines")
    options = parser.parse_args(argv)
    if not options.run.is_dir():
        raise UserError(f"{options.run} is no folder. Give the output_dir of a run")
    rows = list_checkpoints(options.run)
    if options.json:
        print(json.dumps([_plain(row) for row in rows], indent=1))
    elif not rows:
        print(printable(f"{options.run} holds no checkpoint{_runs_below(options.run)}"))
    else:
        _print_table(rows)
    return 0


def _runs_below(root: Path) -> str:
    """A hint where somebody named the folder of runs instead of a run."""
    from launcher.cli.status import find

    below = (path for child in sorted(root.iterdir()) if child.is_dir() for path in find(child))
    runs = [] if is_run(root) else list(itertools.islice(below, _MAX_NAMED + 1))
    more = ", …" if len(runs) > _MAX_NAMED else ""
    named = ", ".join(str(path) for path in runs[:_MAX_NAMED])
    return f". It holds runs; name one: {named}{more}" if runs else ""


def _print_table(rows: list[dict[str, Any]]) -> None:
    from launcher.base.tables import plain_table

    table: list[tuple[str, ...]] = [("checkpoint", "epoch", "metrics", "size", "processes", "ZeRO", "", "Hub")]
    for row in rows:
        if row["state"] != "whole":
            table.append((row["checkpoint"], "", row["state"], *[""] * 5))
            continue
        metrics = "  ".join(f"{k} {v:.4g}" for k, v in row["metrics"].items() if _number(v) is not None)
        marks = " ".join(m for m, on in (("best", row["is_best"]), ("latest", row["is_latest"])) if on)
        table.append((
            row["checkpoint"], f"{row['epoch']:.3f}" if row["epoch"] is not None else "", metrics,
            words.size(row["bytes"]), str(row["world_size"]), str(row["zero_stage"] or "-"), marks,
            "yes" if row["on_hub"] else "",
        ))  # fmt: skip
    print(plain_table(table))
