"""`launcher status`: what runs, where it is, how fast. Reads files only; imports no torch."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launcher.base import files
from launcher.base.errors import EXIT_DONE, EXIT_USER
from launcher.base.paths import RunPaths, checkpoint_step
from launcher.base.text import printable
from launcher.config.settings import CheckpointConfig
from launcher.sweep.jobs import SweepPaths, SweepTable, is_sweep
from launcher.sweep.runs import RUNNING, Metric, RunStatus, is_run, read_run
from launcher.sweep.table import count_states, ranked, short, show_table, steps

_MAX_DEPTH = 4
_EXAMPLE = """examples:
  launcher status                      every run and sweep below this folder
  launcher status outputs/run          one run
  launcher status outputs/sweep --json the jobs of a sweep, for a script"""


def main(argv: list[str]) -> int:
    """Prints how a run, a sweep, or everything below a folder stands; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="launcher status", description="What runs, where it is, how fast.", epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "dir", nargs="?", default=".", type=Path, metavar="DIR", help="a run, a sweep or a folder of them"
    )
    parser.add_argument("--json", action="store_true", help="for a script")
    options = parser.parse_args(argv)
    root: Path = options.dir.expanduser()
    if not root.is_dir():
        print(
            f"DIR={options.dir} is no folder. It must be the output_dir of a run or sweep, or a folder above",
            file=sys.stderr,
        )
        return EXIT_USER
    if is_sweep(root):
        _show_sweep(root, as_json=options.json)
    elif is_run(root):
        _show_run(read_run(root, run_metric(root)), as_json=options.json)
    else:
        _show_folder(root, as_json=options.json)
    return EXIT_DONE


def run_metric(root: Path) -> Metric:
    """What a run is judged by, as its config.yaml says."""
    import yaml

    try:
        config = yaml.safe_load(files.read_text(RunPaths(root).config))
        own, strategy = config["checkpoint"], config["eval"]["eval_strategy"]
        checkpoint = CheckpointConfig(
            metric_for_best_model=own["metric_for_best_model"], greater_is_better=own["greater_is_better"]
        )
        return Metric.of(checkpoint, "no" if strategy is False else strategy)
    except (OSError, ValueError, yaml.YAMLError, LookupError, TypeError, AttributeError, RecursionError):
        return Metric.of(CheckpointConfig(), "steps")


# --------------------------------------------------------------------------- a sweep


def _show_sweep(root: Path, *, as_json: bool) -> None:
    table = SweepTable(SweepPaths(root))
    assert table.metric is not None
    statuses = table.statuses()
    if as_json:
        _print_json(sweep_data(root, table, statuses))
    else:
        show_table(root, statuses, table.metric)


def sweep_data(root: Path, table: SweepTable, statuses: dict[str, RunStatus]) -> dict[str, Any]:
    assert table.metric is not None
    states = [status.state for status in statuses.values()]
    return {
        "kind": "sweep", "dir": str(root), "metric": table.metric.key,
        "greater_is_better": table.metric.is_greater_better,
        "states": {state: states.count(state) for state in sorted(set(states))},
        "jobs": [
            {"name": name, "swept": table.jobs[name]["swept"], **asdict(status)}
            for name, status in ranked(statuses, table.metric)
        ],
    }  # fmt: skip


# --------------------------------------------------------------------------- a run


def _show_run(status: RunStatus, *, as_json: bool) -> None:
    if as_json:
        _print_json({"kind": "run", **asdict(status)})
        return
    for name, value in run_lines(status):
        print(f"{name:<12} {printable(value)}")


def run_lines(status: RunStatus) -> Iterator[tuple[str, str]]:
    """(name, text) of what is known of a run."""
    yield "run", status.dir
    reason = f" ({status.reason})" if status.reason else ""
    code = f", exit code {status.exit_code}" if status.exit_code else ""
    yield "state", f"{status.state}{reason}{code}"
    epoch = f", epoch {status.epoch:.3g}" if status.epoch is not None else ""
    yield "step", f"{steps(status)}{epoch}"
    if status.loss is not None:
        yield "loss", short(status.loss)
    if status.tokens_per_second is not None:
        yield "speed", f"{status.tokens_per_second:,.0f} tokens/s"
    if status.best_metric is not None and status.metric != "loss":
        yield "best", f"{status.metric} {short(status.best_metric)} at step {status.best_step}"
    kept = ", ".join(str(step) for step in status.checkpoints)
    yield "checkpoints", kept or "none"
    if status.hub:
        yield (
            "hub",
            ", ".join(
                f"{printable(key)} {_brief(value)}" for key, value in status.hub.items() if value not in (None, [], "")
            ),
        )
    if status.host:
        yield "where", status.host + (f", job {status.job_id}" if status.job_id else "")
    if status.updated_at is not None and status.state == RUNNING:
        yield "updated", f"{max(0.0, time.time() - status.updated_at):.0f} s ago"


def _brief(value: Any) -> str:
    return printable(", ".join(map(str, value)) if isinstance(value, list) else value)


# --------------------------------------------------------------------------- a folder of runs and sweeps


def find(root: Path) -> Iterator[Path]:
    """Runs and sweeps below a folder, four levels deep; the jobs of a sweep belong to it and are left out."""
    for name, folders, _ in os.walk(root):
        path = Path(name)
        if is_sweep(path) or is_run(path):
            folders.clear()
            yield path
            continue
        depth = len(path.relative_to(root).parts)
        is_deep = depth >= _MAX_DEPTH
        folders[:] = [] if is_deep else sorted(f for f in folders if f[0] != "." and checkpoint_step(Path(f)) is None)


def _show_folder(root: Path, *, as_json: bool) -> None:
    sweeps, runs = [], []
    for path in find(root):
        if is_sweep(path):
            table = SweepTable(SweepPaths(path))
            sweeps.append((path, table, table.statuses()))
        else:
            runs.append(read_run(path, run_metric(path)))
    if as_json:
        _print_json(
            {
                "kind": "folder",
                "dir": str(root),
                "runs": [{"kind": "run", **asdict(status)} for status in runs],
                "sweeps": [sweep_data(path, table, statuses) for path, table, statuses in sweeps],
            }
        )
        return
    if not runs and not sweeps:
        print(f"no runs and no sweeps below {root}")
    for status in runs:
        speed = (
            f"{status.tokens_per_second:,.0f} tokens/s" if status.tokens_per_second and status.state == RUNNING else ""
        )
        best = f"{status.metric} {short(status.best_metric)}" if status.best_metric is not None else ""
        parts = (f"{status.state:<11}", status.dir, f"step {steps(status)}", best, speed)
        print(printable("  ".join(filter(None, parts))))
    for path, _, statuses in sweeps:
        print(f"sweep        {path}  {count_states(statuses)}")


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))
