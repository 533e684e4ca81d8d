"""The table of a sweep's jobs, the best first."""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from launcher.base.text import printable
from launcher.sweep.runs import FAILED, FINISHED, INTERRUPTED, PENDING, PRUNED, RUNNING, Metric, RunStatus

STATES = (FINISHED, PRUNED, RUNNING, INTERRUPTED, FAILED, PENDING)
_STYLES = {FINISHED: "green", RUNNING: "cyan", FAILED: "red", INTERRUPTED: "yellow", PRUNED: "magenta"}


def ranked(statuses: Mapping[str, RunStatus], metric: Metric) -> list[tuple[str, RunStatus]]:
    """By the metric, the best first; jobs without one last, in the order they were planned."""
    return sorted(statuses.items(), key=lambda item: metric.rank(item[1].best_metric))


def count_states(statuses: Mapping[str, RunStatus]) -> str:
    """For example `6 finished, 1 failed`."""
    counts = Counter(status.state for status in statuses.values())
    return ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])


def steps(status: RunStatus) -> str:
    return f"{status.step}/{status.total_steps}" if status.total_steps else str(status.step)


def short(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def jobs_table(statuses: Mapping[str, RunStatus], metric: Metric) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("rank", justify="right")
    table.add_column("job", overflow="fold")
    table.add_column("state")
    table.add_column("step", justify="right")
    table.add_column(escape(printable(f"best {metric.key}")), justify="right")
    table.add_column("at step", justify="right")
    table.add_column("where")
    for rank, (name, status) in enumerate(ranked(statuses, metric), start=1):
        has_metric = status.best_metric is not None
        where = (status.host or "") + (f" job {status.job_id}" if status.job_id else "")
        table.add_row(
            str(rank) if has_metric else "", escape(printable(name)),
            f"[{_STYLES.get(status.state, 'default')}]{escape(printable(status.state))}", steps(status),
            short(status.best_metric), str(status.best_step or "") if has_metric else "", escape(where),
        )  # fmt: skip
    return table


_NARROWEST = 80
"""Columns: in fewer, cells would be cut; a row goes on in the terminal's next line instead."""


def show_table(root: Path, statuses: Mapping[str, RunStatus], metric: Metric) -> None:
    """Prints the table; into a file or pipe without folding, so that names can be searched."""
    width = max(_NARROWEST, shutil.get_terminal_size().columns) if sys.stdout.isatty() else 1000
    console = Console(width=width, highlight=False, markup=True, emoji=False)
    console.print(f"{root}: {count_states(statuses) or 'no jobs'}", markup=False, soft_wrap=True)
    console.print(jobs_table(statuses, metric))
