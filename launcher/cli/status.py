"""`launcher status`: what runs, where it is, how fast. Reads files only; imports no torch."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launcher.base import files, words
from launcher.base.errors import EXIT_DONE, UserError
from launcher.base.paths import RunPaths, checkpoint_step
from launcher.base.text import printable
from launcher.config.settings import CheckpointConfig
from launcher.slurm.queue import job_states, submitted_id
from launcher.sweep.jobs import SweepPaths, SweepTable, is_sweep
from launcher.sweep.runs import PENDING, RUNNING, Metric, RunStatus, is_run, read_run
from launcher.sweep.table import count_states, ranked, short, show_table, steps

_MAX_DEPTH = 4
_WATCH_S = 2.0
_STALE_S = 120.0
_EXAMPLE = """examples:
  launcher status                      every run and sweep below this folder
  launcher status outputs/run          one run
  launcher status outputs/sweep --json the jobs of a sweep, for a script
  launcher status --watch              all of it, again and again, until Ctrl-C
  launcher status --watch --json       a line of JSON now, and one whenever something has changed"""


def main(argv: list[str]) -> int:
    """Prints how a run, a sweep, or everything below a folder stands; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="launcher status", description="What runs, where it is, how fast.", epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument(
        "dir", nargs="?", default=".", type=Path, metavar="DIR", help="a run, a sweep or a folder of them"
    )
    parser.add_argument("--json", action="store_true", help="for a script")
    parser.add_argument("--watch", action="store_true", help=f"again every {_WATCH_S:.0f} s, until Ctrl-C")
    options = parser.parse_args(argv)
    root: Path = options.dir.expanduser()
    if not root.is_dir():
        raise UserError(
            f"DIR={options.dir} is no folder. It must be the output_dir of a run or sweep, or a folder above"
        )
    with contextlib.suppress(KeyboardInterrupt) if options.watch else contextlib.nullcontext():
        if options.watch and options.json:
            for value in changes(root):
                print(json.dumps(value), flush=True)
        elif options.watch:
            _watch(root)
        elif options.json:
            print(json.dumps(as_data(root), indent=2))
        else:
            _show(root)
    return EXIT_DONE


def _show(root: Path) -> None:
    if is_sweep(root):
        _show_sweep(root)
    elif is_run(root) or submitted_id(root) is not None:
        for name, value in run_lines(_read(root)):
            print(f"{name:<12} {printable(value)}")
    else:
        _show_folder(root)


def _read(root: Path) -> RunStatus:
    (status,) = with_slurm([read_run(root, run_metric(root))])
    return status


def as_data(root: Path) -> dict[str, Any]:
    """The same for a script."""
    if is_sweep(root):
        return sweep_data(root, *_read_sweep(root))
    if is_run(root) or submitted_id(root) is not None:
        return {"kind": "run", **asdict(_read(root))}
    runs, sweeps = _read_folder(root)
    return {
        "kind": "folder", "dir": str(root), "runs": [{"kind": "run", **asdict(status)} for status in runs],
        "sweeps": [sweep_data(*sweep) for sweep in sweeps],
    }  # fmt: skip


def changes(root: Path) -> Iterator[dict[str, Any]]:
    """How it stands now, and again whenever that has changed; that a run was written down anew (`updated_at`) is no
    change."""
    before = None
    while True:
        value = as_data(root)
        if (now := _lasting(value)) != before:
            before = now
            yield value
        time.sleep(_WATCH_S)


def _lasting(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lasting(inner) for key, inner in value.items() if key != "updated_at"}
    return [_lasting(inner) for inner in value] if isinstance(value, list) else value


def _watch(root: Path) -> None:
    """Shows it again and again: in a terminal in place, so that nothing flickers; else one after the other."""
    while True:
        text = io.StringIO()
        with contextlib.redirect_stdout(text):
            _show(root)
        if sys.stdout.isatty():
            lines = text.getvalue().splitlines()[: shutil.get_terminal_size().lines - 1]
            print("\x1b[H" + "".join(f"{line}\x1b[K\n" for line in lines) + "\x1b[J", end="", flush=True)
        else:
            print(text.getvalue(), flush=True)
        time.sleep(_WATCH_S)


def with_slurm(statuses: list[RunStatus]) -> list[RunStatus]:
    """Adds what Slurm says of their jobs: one that waits in the queue is pending, however its last start ended."""
    states = job_states(Path(status.dir) for status in statuses)
    for status in statuses:
        if (found := states.get(Path(status.dir))) is None:
            continue
        job_id, state, reason = (printable(part) for part in found)
        status.job_id = job_id
        status.slurm = state.lower() + (f" ({reason})" if reason not in ("", "None") else "")
        if state == "PENDING" and status.state != RUNNING:
            status.state, status.reason = PENDING, None
    return statuses


def stale(status: RunStatus) -> str:
    """For how long a run that lives has told nothing; empty where that is normal."""
    if status.state != RUNNING or status.updated_at is None:
        return ""
    silent_s = time.time() - status.updated_at
    return f"no step for {words.duration(silent_s)}" if silent_s > _STALE_S else ""


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


def _read_sweep(root: Path) -> tuple[SweepTable, dict[str, RunStatus]]:
    table = SweepTable(SweepPaths(root))
    statuses = table.statuses()
    with_slurm(list(statuses.values()))
    return table, statuses


def _show_sweep(root: Path) -> None:
    table, statuses = _read_sweep(root)
    assert table.metric is not None
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


def run_lines(status: RunStatus) -> Iterator[tuple[str, str]]:
    """(name, text) of what is known of a run."""
    yield "run", status.dir
    reason = f" ({status.reason})" if status.reason else ""
    if note := stale(status):
        reason += f", {note}"
    code = f", exit code {status.exit_code}" if status.exit_code else ""
    yield "state", f"{status.state}{reason}{code}"
    epoch = f", epoch {status.epoch:.3g}" if status.epoch is not None else ""
    yield "step", f"{steps(status)}{epoch}"
    if status.loss is not None:
        yield "loss", short(status.loss)
    if status.tokens_per_second is not None:
        yield "speed", f"{words.count(status.tokens_per_second)} tokens/s"
    if status.best_metric is not None and status.metric != "loss":
        yield "best", f"{status.metric} {short(status.best_metric)} at step {status.best_step}"
    kept = ", ".join(str(step) for step in status.checkpoints)
    yield "checkpoints of steps", kept or "none"
    if status.hub:
        yield (
            "hub",
            ", ".join(
                f"{printable(key)} {_brief(value)}" for key, value in status.hub.items() if value not in (None, [], "")
            ),
        )
    if status.host:
        yield "where", status.host + (f", job {status.job_id}" if status.job_id else "")
    if status.slurm:
        yield "slurm", status.slurm
    if status.updated_at is not None and status.state == RUNNING:
        yield "updated", f"{max(0.0, time.time() - status.updated_at):.0f} s ago"


def _brief(value: Any) -> str:
    return printable(", ".join(map(str, value)) if isinstance(value, list) else value)


# --------------------------------------------------------------------------- a folder of runs and sweeps


def find(root: Path) -> Iterator[Path]:
    """Runs and sweeps below a folder, four levels deep; the jobs of a sweep belong to it and are left out."""
    for name, folders, _ in os.walk(root):
        path = Path(name)
        if is_sweep(path) or is_run(path) or submitted_id(path) is not None:
            folders.clear()
            yield path
            continue
        depth = len(path.relative_to(root).parts)
        is_deep = depth >= _MAX_DEPTH
        folders[:] = [] if is_deep else sorted(f for f in folders if f[0] != "." and checkpoint_step(Path(f)) is None)


def _read_folder(root: Path) -> tuple[list[RunStatus], list[tuple[Path, SweepTable, dict[str, RunStatus]]]]:
    sweeps, runs = [], []
    for path in find(root):
        if is_sweep(path):
            sweeps.append((path, *_read_sweep(path)))
        else:
            runs.append(read_run(path, run_metric(path)))
    return with_slurm(runs), sweeps


def _show_folder(root: Path) -> None:
    runs, sweeps = _read_folder(root)
    if not runs and not sweeps:
        print(f"no runs and no sweeps below {root}")
    for status in runs:
        is_shown = status.tokens_per_second and status.state == RUNNING
        speed = f"{words.count(status.tokens_per_second or 0)} tokens/s" if is_shown else ""
        best = f"{status.metric} {short(status.best_metric)}" if status.best_metric is not None else ""
        parts = (f"{status.state:<11}", status.dir, f"step {steps(status)}", best, speed, status.slurm, stale(status))
        print(printable("  ".join(filter(None, parts))))
    for path, _, statuses in sweeps:
        print(f"sweep        {path}  {count_states(statuses)}")
