"""Memory that was too small is no end: the run goes on with smaller batches and the same samples per step.

How that travels, through run.json alone: the ranks write there what they use (`batch_sizes`). Who learns that it was
too much puts less beside it (`out_of_memory`): the agent, or, under one's own accelerate launch, the next start, which
finds error-rank-N.json. The main process of every later start goes by it, as long as the same is asked for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.agent.machine import Ended
from launcher.agent.outcome import Outcome
from launcher.base import files
from launcher.base.paths import RunPaths
from launcher.base.rank_reports import Report, read_reports
from launcher.config.settings import RunConfig

IN_USE = "batch_sizes"
LIMITS = "out_of_memory"
"""Keys of run.json."""
HINT = (
    "What needs less memory: a smaller train.per_device_train_batch_size, model.gradient_checkpointing=true, "
    "strategy=zero3, a smaller data.max_length. launcher plan shows the parts"
)
_KILLED = 9
_WORDS = re.compile(r"out of memory|_ALLOC_FAILED|can't allocate memory|cannot allocate memory", re.IGNORECASE)
_KINDS = ("RuntimeError", "AcceleratorError", "DistBackendError")
_EVALUATION = "/launcher/train/evaluation.py"


@dataclass(frozen=True)
class BatchSizes:
    """What decides how much memory the passes need; the samples of an optimizer step stay as they are."""

    train: int
    """Samples per forward and backward of one process, as many as there really are."""
    eval: int
    gradient_checkpointing: bool
    can_recompute: bool
    """Whether the model knows gradient checkpointing."""

    @classmethod
    def read(cls, fields: Any) -> BatchSizes | None:
        """From run.json; None where it is no such thing."""
        if not isinstance(fields, dict) or not {f.name for f in dataclasses.fields(cls)} <= fields.keys():
            return None
        found = cls(**{f.name: fields[f.name] for f in dataclasses.fields(cls)})
        is_whole = all(type(size) is int and size >= 1 for size in (found.train, found.eval))
        return found if is_whole and type(found.gradient_checkpointing) is type(found.can_recompute) is bool else None

    def smaller(self, *, in_training: bool, in_evaluation: bool) -> BatchSizes | None:
        """The next to try: half the samples, down to one, then with gradient checkpointing; None: there is none."""
        found = self
        if in_evaluation and self.eval > 1:
            found = dataclasses.replace(found, eval=math.ceil(self.eval / 2))
        if in_training and self.train > 1:
            found = dataclasses.replace(found, train=math.ceil(self.train / 2))
        elif in_training and self.can_recompute:
            found = dataclasses.replace(found, gradient_checkpointing=True)
        return found if found != self else None

    def change_to(self, new: BatchSizes) -> str:
        """What is different, in words."""
        lines = []
        if new.train != self.train:
            lines.append(f"{new.train} instead of {self.train} samples per forward and backward")
        if new.gradient_checkpointing != self.gradient_checkpointing:
            lines.append("gradient checkpointing")
        if new.eval != self.eval:
            lines.append(f"{new.eval} instead of {self.eval} samples per evaluation batch")
        return ", ".join(lines)


def asked_for(config: RunConfig, world_size: int) -> dict[str, Any]:
    """The settings that an old limit belongs to: who asks for others means them."""
    train = config.train.per_device_train_batch_size
    asked = {
        "train.per_device_train_batch_size": train, "strategy": config.strategy.name,
        "eval.per_device_eval_batch_size": config.eval.per_device_eval_batch_size,
    }  # fmt: skip
    is_sized_by_devices = "auto" in (train, config.strategy.name)
    return {**asked, "num_processes": world_size} if is_sized_by_devices else asked


def in_use(sizes: BatchSizes, asked: Mapping[str, Any]) -> dict[str, Any]:
    """As `batch_sizes` of run.json."""
    return {**dataclasses.asdict(sizes), "asked": dict(asked)}


def limits(paths: RunPaths) -> dict[str, Any] | None:
    """What of run.json is to be kept: `out_of_memory`, or a new one, where a start that nobody watched left a report.

    Changes nothing: it is asked before output_dir is held, and again by who then writes run.json.
    """
    run = _read(paths)
    known = run.get(LIMITS) if isinstance(run.get(LIMITS), dict) else None
    handled_until = max(_number((known or {}).get("time")), _number(run.get("started_at")))
    new = [r for r in read_reports(paths.logs_dir) if is_out_of_memory(r) and r["time"] > handled_until]
    if not new or not run.get(IN_USE):
        return known
    return _next_limits(run, paths, in_evaluation=_is_evaluating(new[0])) or known


def limits_for(config: RunConfig, world_size: int, paths: RunPaths) -> BatchSizes | None:
    """The sizes that a start may not exceed, as far as an earlier one ran out of memory with the same settings."""
    found = limits(paths) if config.train.on_out_of_memory == "halve" else None
    return BatchSizes.read(found) if found and found.get("asked") == asked_for(config, world_size) else None


def is_out_of_memory(report: Report) -> bool:
    """Whether a rank failed in training because its device's memory, or the host's, was too small."""
    kind = report["kind"]
    is_told = kind in ("OutOfMemoryError", "MemoryError") or (kind in _KINDS and _WORDS.search(report["message"]))
    return bool(is_told) and report["training_began"]


def where(found: Outcome, machines: Sequence[Ended]) -> str | None:
    """Which memory was too small, in words; None where that was not the cause."""
    if found.state != "failed" or found.is_lost:
        return None
    if (report := found.failure) is not None:
        return f"rank {report['rank']} on {report['host']}" if is_out_of_memory(report) else None
    for ended in machines:
        killed = [rank for rank, number in ended.killed.items() if number == _KILLED]
        if killed and ended.num_oom_kills:
            return f"the kernel killed rank {killed[0]} on {ended.host} (the host's memory, or its container's)"
    return None


def note(paths: RunPaths, attempt: str, found: Outcome) -> tuple[BatchSizes, BatchSizes] | None:
    """After `where`: writes smaller sizes into run.json for the next start.

    Returns:
        The sizes in use and the next; None where there are no smaller ones, or they cannot be written.
    """
    run = _read(paths)
    if run.get("attempt") != attempt:
        return None  # it had not begun to train
    in_evaluation = _is_evaluating(found.failure) if found.failure is not None else None
    new = _next_limits(run, paths, in_evaluation=in_evaluation)
    used, smaller = BatchSizes.read(run.get(IN_USE)), BatchSizes.read(new)
    if new is None or used is None or smaller is None:
        return None
    with contextlib.suppress(OSError):
        files.write_json(paths.run_state, {**run, LIMITS: new})
        return used, smaller
    return None


def _next_limits(run: Mapping[str, Any], paths: RunPaths, *, in_evaluation: bool | None) -> dict[str, Any] | None:
    """The limits after a start with what run.json says. `in_evaluation`: None where that is not known."""
    used = BatchSizes.read(run.get(IN_USE))
    new = used.smaller(in_training=not in_evaluation, in_evaluation=in_evaluation is not False) if used else None
    if new is None:
        return None
    told = [report["time"] for report in read_reports(paths.logs_dir)]  # each on its own machine's clock
    before = run.get(LIMITS)
    count = int(_number(before.get("count"))) + 1 if isinstance(before, dict) else 1
    return {**in_use(new, run[IN_USE].get("asked") or {}), "time": max([time.time(), *told]), "count": count}


def _is_evaluating(report: Report) -> bool:
    return any(_EVALUATION in line for line in report["traceback"])


def _read(paths: RunPaths) -> dict[str, Any]:
    run = files.read_json_or(paths.run_state, {})
    return run if isinstance(run, dict) else {}


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else 0.0
