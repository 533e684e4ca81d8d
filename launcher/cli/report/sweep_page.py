"""What the report of a sweep shows: ranking, parallel coordinates, how much each setting matters, every job's curve."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from launcher import __version__
from launcher.base import words
from launcher.base.paths import RunPaths
from launcher.cli.report.curves import read_metrics, thinned
from launcher.cli.report.run_page import state_of, state_text, text
from launcher.sweep.jobs import SweepPaths, SweepTable
from launcher.sweep.runs import FINISHED, PRUNED, RUNNING, Metric, RunStatus
from launcher.sweep.table import count_states, ranked

_MAX_JOBS, _MAX_CURVES, _MAX_AXES, _MAX_GROUPS = 500, 60, 8, 8
_MAX_TICKS = 6
_MAX_POINTS = 150


def read_page(root: Path) -> dict[str, Any]:
    """All of it."""
    table = SweepTable(SweepPaths(root))
    metric = table.metric
    assert metric is not None
    order = ranked(table.statuses(), metric)
    swept = {name: swept_of(table.jobs[name]) for name, _ in order}
    states = [status.state for _, status in order]
    is_over = states and all(state in (FINISHED, PRUNED) for state in states)
    name, direction = text(root.name, 120), "higher" if metric.is_greater_better else "lower"
    return {
        "kind": "sweep", "name": name, "title": name, "folder": text(root), "version": __version__,
        "state": "running" if RUNNING in states else "finished" if is_over else "stopped",
        "state_text": count_states(dict(order)) or "no jobs", "error": "",
        "made_at": datetime.now().astimezone().strftime("%-d %B %Y, %H:%M %Z"),
        "subtitle": [f"compared by {text(metric.key, 80)}, {direction} is better"],
        "figures": figures(order, metric), "keys": [text(key, 80) for key in _keys(swept)],
        "metric": text(metric.key, 80), "rows": rows(order, swept), "curves": curves(root, order, metric),
        "parallel": parallel(order, swept, metric), "importance": importance(order, swept),
        "num_more": max(0, len(order) - _MAX_JOBS),
    }  # fmt: skip


def swept_of(job: Mapping[str, Any]) -> dict[str, str]:
    """What tells a job from its siblings."""
    value = job.get("swept") if isinstance(job, Mapping) else None
    return {str(k): str(v) for k, v in value.items()} if isinstance(value, dict) else {}


def _keys(swept: Mapping[str, Mapping[str, str]]) -> list[str]:
    """The settings that differ between jobs, in the order in which they were named."""
    values: dict[str, set[str]] = defaultdict(set)
    for job in swept.values():
        for key, value in job.items():
            values[key].add(value)
    return [key for key, seen in values.items() if len(seen) > 1 or len(swept) == 1]


def figures(order: Sequence[tuple[str, RunStatus]], metric: Metric) -> list[dict[str, str]]:
    states = [status.state for _, status in order]
    found = [{"name": "jobs", "value": str(len(order)), "unit": "", "note": f"{states.count(FINISHED)} finished"}]
    known = [status.best_metric for _, status in order if status.best_metric is not None]
    if known:
        name, note = text(metric.key.removeprefix("eval_").replace("_", " "), 40), text(order[0][0], 60)
        found.insert(0, {"name": f"best {name}", "value": words.metric(known[0]), "unit": "", "note": note})
        middle, last = known[len(known) // 2], known[-1]
        note = f"worst {words.metric(last)}"
        found.insert(1, {"name": f"median {name}", "value": words.metric(middle), "unit": "", "note": note})
    if PRUNED in states:
        found.append({"name": "stopped early", "value": str(states.count(PRUNED)), "unit": "", "note": "by the pruner"})
    return found


def rows(order: Sequence[tuple[str, RunStatus]], swept: Mapping[str, Mapping[str, str]]) -> list[dict[str, Any]]:
    keys = _keys(swept)
    return [
        {
            "rank": i + 1 if status.best_metric is not None else "", "name": text(name, 200),
            "values": [text(swept[name].get(key, ""), 80) for key in keys],
            "state": state_of(status), "state_text": state_text(status),
            "metric": words.metric(status.best_metric) if status.best_metric is not None else "",
            "best_step": f"{status.best_step:,}" if isinstance(status.best_step, int) else "",
            "step": f"{status.step:,}" + (f" / {status.total_steps:,}" if status.total_steps else ""),
        }
        for i, (name, status) in enumerate(order[:_MAX_JOBS])
    ]  # fmt: skip


def curves(root: Path, order: Sequence[tuple[str, RunStatus]], metric: Metric) -> list[dict[str, Any]]:
    """The metric of each job over its steps, the best job first."""
    found = []
    for name, status in order[:_MAX_CURVES]:
        points = read_metrics(RunPaths(root / name).metrics).series.get(metric.key, [])
        if points:
            shown = [[step, float(f"{value:.6g}")] for step, value in thinned(points, _MAX_POINTS)]
            found.append({"name": text(name, 120), "state": status.state, "points": shown})
    return found


# --------------------------------------------------------------------------- parallel coordinates


def parallel(
    order: Sequence[tuple[str, RunStatus]], swept: Mapping[str, Mapping[str, str]], metric: Metric
) -> dict[str, Any] | None:
    """An axis for each setting and one for the result; of each job where it crosses them, from 0 to 1."""
    judged = [(name, status.best_metric) for name, status in order if status.best_metric is not None][:_MAX_JOBS]
    keys = _keys({name: swept[name] for name, _ in judged})[:_MAX_AXES]
    if len(judged) < 2 or not keys:
        return None
    axes, places = [], []
    for key in keys:
        ticks, place = _axis([swept[name].get(key) for name, _ in judged])
        axes.append({"name": text(key, 30), "ticks": ticks})
        places.append(place)
    results = [value for _, value in judged if value is not None]
    ticks, at_result = _numeric_axis(results, is_log=False)
    axes.append({"name": text(metric.key, 30), "ticks": ticks})
    jobs = []
    for i, (name, _) in enumerate(judged):
        at = [*(place_of[i] for place_of in places), at_result[i]]
        jobs.append({"name": text(name, 160), "at": at, "rank": 1 - i / max(1, len(judged) - 1)})
    return {"axes": axes, "jobs": jobs}


def _axis(values: Sequence[str | None]) -> tuple[list[tuple[float, str]], list[float | None]]:
    numbers = [_float(value) for value in values]
    known = [number for number in numbers if number is not None]
    if len(known) == len(values) and len(set(known)) > 1:
        is_log = min(known) > 0 and max(known) / min(known) >= 20
        ticks, places = _numeric_axis(known, is_log=is_log)
        return ticks, list(places)
    names = sorted({value for value in values if value is not None})
    share = {name: i / max(1, len(names) - 1) if len(names) > 1 else 0.5 for i, name in enumerate(names)}
    stride = -(-len(names) // 12)
    return (
        [(share[name], text(name, 14)) for name in names[::stride]],
        [share[value] if value is not None else None for value in values],
    )


def _numeric_axis(values: Sequence[float], *, is_log: bool) -> tuple[list[tuple[float, str]], list[float]]:
    scaled = [math.log(value) if is_log else value for value in values]
    low, high = min(scaled), max(scaled)
    span = (high - low) or 1.0
    distinct = sorted(set(zip(scaled, values, strict=True)))
    if len(distinct) > _MAX_TICKS:
        steps = [low + span * i / (_MAX_TICKS - 1) for i in range(_MAX_TICKS)]
        distinct = [(at, math.exp(at) if is_log else at) for at in steps]
    places = [(at - low) / span if high > low else 0.5 for at in scaled]
    return [((at - low) / span if high > low else 0.5, f"{value:.3g}") for at, value in distinct], places


def _float(value: str | None) -> float | None:
    try:
        number = float(value) if value is not None else None
    except ValueError:
        return None
    return number if number is not None and math.isfinite(number) else None


# --------------------------------------------------------------------------- importance


def importance(
    order: Sequence[tuple[str, RunStatus]], swept: Mapping[str, Mapping[str, str]]
) -> list[dict[str, Any]]:  # fmt: skip
    """How much of the variance of the result goes with each setting alone, corrected for the number of its values.

    The correlation ratio (Fisher's eta squared) over the values of a setting, in groups of equal size where there are
    many; adjusted as R squared is, so that a setting does not gain by having many values.
    """
    judged = [(swept[name], status.best_metric) for name, status in order if status.best_metric is not None]
    results = [value for _, value in judged]
    mean = math.fsum(results) / len(results) if results else 0.0
    total = math.fsum((value - mean) ** 2 for value in results)
    if len(judged) < 4 or total <= 0:
        return []
    found: list[tuple[float, str]] = []
    for key in _keys({str(i): job for i, (job, _) in enumerate(judged)}):
        groups = _groups([(job.get(key), value) for job, value in judged])
        num_groups = len(groups)
        if not 1 < num_groups < len(judged):
            continue
        between = math.fsum(len(g) * (math.fsum(g) / len(g) - mean) ** 2 for g in groups)
        share = 1 - (1 - between / total) * (len(judged) - 1) / (len(judged) - num_groups)
        found.append((max(0.0, min(1.0, share)), text(key, 80)))
    return [
        {"key": key, "percent": f"{share * 100:.0f} %", "width": round(share * 100, 1)}
        for share, key in sorted(found, key=lambda row: -row[0])
    ]


def _groups(pairs: Sequence[tuple[str | None, float]]) -> list[list[float]]:
    """The results by the value of a setting; of numbers with many values, by neighbours."""
    by_value: dict[str | None, list[float]] = defaultdict(list)
    for value, result in pairs:
        by_value[value].append(result)
    numbers = [_float(value) for value in by_value]
    if len(by_value) <= _MAX_GROUPS or None in numbers:
        return list(by_value.values())
    ordered = [result for _, result in sorted((_float(value) or 0.0, result) for value, result in pairs)]
    count = min(_MAX_GROUPS, max(2, len(ordered) // 4))
    return [ordered[len(ordered) * i // count : len(ordered) * (i + 1) // count] for i in range(count)]
