"""The numbers of a report for a program: `launcher report RUN_OR_SWEEP --json`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from launcher.base import files
from launcher.base.paths import RunPaths
from launcher.base.timeline import read_timeline
from launcher.cli.report import run_page, sweep_page
from launcher.cli.report.curves import read_metrics
from launcher.cli.report.goodput import KINDS, PRODUCTIVE, work_out
from launcher.cli.status import run_metric
from launcher.sweep.jobs import SweepPaths, SweepTable, is_sweep
from launcher.sweep.runs import RUNNING, read_run
from launcher.sweep.table import ranked


def summary(root: Path) -> dict[str, Any]:
    """What the page shows as text, as numbers. Nothing of it is rounded."""
    return _sweep(root) if is_sweep(root) else _run(root)


def _run(root: Path) -> dict[str, Any]:
    """Where the time went, and the best of the run."""
    paths, judged_by = RunPaths(root), run_metric(root)
    status, metrics = read_run(root, judged_by), read_metrics(paths.metrics)
    best = run_page.best_of(metrics, judged_by, files.read_json_or(paths.run_state, {}))
    rows = list(run_page.checkpoint_rows(paths, metrics, best, judged_by))
    goodput = work_out(
        read_timeline(paths), now=time.time() if status.state == RUNNING else None,
        saved_step=max(status.checkpoints, default=0),
    )  # fmt: skip
    return {
        "kind": "run", "state": status.state, "reason": status.reason, "step": status.step,
        "total_steps": status.total_steps, "metric": judged_by.key, "best_metric": best[1] if best else None,
        "best_step": best[0] if best else None, "loss": metrics.last("loss"),
        "num_tokens": metrics.num_tokens,
        "checkpoints": [{"step": row["step"], "is_kept": row["is_kept"]} for row in rows],
        "time": None if goodput is None else {
            "wall_s": goodput.wall_s, "productive_share": goodput.share, "num_kills": goodput.num_kills,
            "num_steps_trained_again": goodput.num_retrained,
            "seconds": {"training" if kind == PRODUCTIVE else kind: goodput.total_s(kind) for kind in KINDS},
        },
    }  # fmt: skip


def _sweep(root: Path) -> dict[str, Any]:
    """The ranking, and how much of the variance goes with each setting."""
    table = SweepTable(SweepPaths(root))
    metric = table.metric
    assert metric is not None
    order = ranked(table.statuses(), metric)
    swept = {name: sweep_page.swept_of(table.jobs[name]) for name, _ in order}
    return {
        "kind": "sweep", "metric": metric.key, "greater_is_better": metric.is_greater_better,
        "jobs": [
            {"name": name, "swept": swept[name], "state": status.state, "best_metric": status.best_metric,
             "best_step": status.best_step, "step": status.step, "total_steps": status.total_steps}
            for name, status in order
        ],
        "importance": {row["key"]: row["width"] / 100 for row in sweep_page.importance(order, swept)},
    }  # fmt: skip
