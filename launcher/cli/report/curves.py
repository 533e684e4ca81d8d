"""metrics.jsonl as curves that a page can hold. Standard library only; every value is untrusted."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.sweep.runs import read_lines

MAX_CURVES = 40
_MAX_PARSED = 20_000
"""Training lines that are parsed, of a longer file every so many; evaluations and saves always."""
_NOT_CURVES = ("step", "epoch", "num_tokens", "checkpoint", "save_stall_s", "save_write_s", "bytes", "eval_runtime_s",
               "rolled_back_from", "spike_loss", "spike_limit")  # fmt: skip
_TITLES = {
    "loss": "Loss", "learning_rate": "Learning rate", "grad_norm": "Gradient norm",
    "tokens_per_second": "Throughput", "memory_bytes": "Memory per device", "router_loss": "Router loss",
    "skipped_steps": "Skipped steps", "mfu": "MFU",
}  # fmt: skip
_FIRST = ("loss", "learning_rate", "grad_norm", "tokens_per_second", "memory_bytes")
Points = list[tuple[float, float]]


@dataclass
class Metrics:
    """By name (step, value) points; `saves` are the lines of committed saves."""

    series: dict[str, Points] = field(default_factory=dict)
    saves: list[dict[str, Any]] = field(default_factory=list)
    num_tokens: float | None = None
    epoch: float | None = None

    def last(self, key: str) -> float | None:
        points = self.series.get(key)
        return points[-1][1] if points else None


def read_metrics(path: Path) -> Metrics:
    """Reads them once; in seconds also where there are millions of lines."""
    found = Metrics()
    for line in read_lines(path, _MAX_PARSED):
        step = number(line.get("step"))
        if step is None:
            continue
        if "checkpoint" in line:
            found.saves.append(line)
            continue
        found.num_tokens = number(line.get("num_tokens")) or found.num_tokens
        found.epoch = number(line.get("epoch")) or found.epoch
        for key, value in line.items():
            if key in _NOT_CURVES or (number_ := number(value)) is None:
                continue
            if key in found.series or len(found.series) < MAX_CURVES:
                found.series.setdefault(key, []).append((step, number_))
    for points in found.series.values():
        points.sort(key=lambda point: point[0])  # an evaluation in the background may come after later ones
    return found


def number(value: Any) -> float | None:
    """A finite number, or None."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) < 1e300 else None  # NaN and integers beyond floats, too


def thinned(points: Points, limit: int) -> Points:
    """At most about `limit` points; of each stretch the lowest and the highest stay, so that no spike is lost."""
    if len(points) <= limit:
        return points
    size = len(points) / max(1, limit // 2)
    kept: Points = []
    start = 0.0
    while start < len(points):
        stretch = points[int(start) : int(start + size)] or points[int(start) : int(start) + 1]
        low, high = min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])
        kept += [low] if low is high else sorted([low, high])
        start += size
    return [*kept, points[-1]] if kept[-1] != points[-1] else kept


def charts(metrics: Metrics, limit: int) -> list[dict[str, Any]]:
    """What the page draws: each chart with its columns, the steps first. Loss and eval loss share one."""
    keys = [key for key in _FIRST if key in metrics.series]
    keys += [key for key in metrics.series if key not in keys]
    own = [key for key in keys if key != "eval_loss" or "loss" not in metrics.series]
    evals, training = [k for k in own if k.startswith("eval_")], [k for k in own if not k.startswith("eval_")]
    ordered = [*training[:1], *evals, *training[1:]]
    return [_chart(key, metrics, limit) for key in ordered]


def _chart(key: str, metrics: Metrics, limit: int) -> dict[str, Any]:
    names = [key, *(["eval_loss"] if key == "loss" and "eval_loss" in metrics.series else [])]
    columns = [dict(thinned(metrics.series[name], limit)) for name in names]
    xs = sorted(set().union(*columns))
    shown = key.removeprefix("eval_").replace("_", " ")
    title = _TITLES.get(key) or shown[:1].upper() + shown[1:]
    labels = [("training" if len(names) > 1 else shown), "evaluation"]
    return {
        "key": key[:200], "title": title[:80], "is_eval": [name.startswith("eval_") for name in names],
        "labels": [label[:80] for label in labels[: len(names)]],
        "x": [_short(x) for x in xs], "y": [[_short(c[x]) if x in c else None for x in xs] for c in columns],
    }  # fmt: skip


def _short(value: float) -> float | int:
    """Six digits are more than a screen shows, and a third of the bytes."""
    return int(value) if value == int(value) and abs(value) < 1e15 else float(f"{value:.6g}")
