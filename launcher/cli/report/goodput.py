"""What every second of a run was spent on, worked out from logs/timeline.jsonl. Standard library only.

The parts are a partition of the time from the first start (or its submission to Slurm) to the end: each second is in
exactly one of them. Trained again is what lies between the step that a later start went on from and the end of the
attempt; work of a step that was not finished is part of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

PRODUCTIVE, SAVE, EVALUATION, STARTUP = "productive", "save", "evaluation", "startup"
LOST, QUEUE, DOWN, FINISH, OFF = "lost", "queue", "down", "finish", "off"
KINDS = (PRODUCTIVE, EVALUATION, SAVE, STARTUP, LOST, QUEUE, DOWN, FINISH, OFF)
_MEASURED = {"progress": "step", EVALUATION: "s", SAVE: "s"}
"""Events with the number that they cannot do without."""
_REQUEUED = ("preempted", "time_limit")


@dataclass(frozen=True)
class Segment:
    start: float
    end: float
    kind: str


@dataclass(frozen=True)
class Mark:
    """`kind`: kill, stop, restart, rollback, finish, failed."""

    t: float
    kind: str
    text: str


@dataclass
class Goodput:
    """`steps` are (time, step) points of each attempt: how far the run had come, and how far a kill threw it back."""

    segments: list[Segment] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    steps: list[list[tuple[float, float]]] = field(default_factory=list)
    num_kills: int = 0
    num_retrained: int = 0

    @property
    def wall_s(self) -> float:
        return self.segments[-1].end - self.segments[0].start if self.segments else 0.0

    def total_s(self, kind: str) -> float:
        return math.fsum(s.end - s.start for s in self.segments if s.kind == kind)

    @property
    def share(self) -> float | None:
        """Productive time over the time in which the run was meant to run: all but what it was switched off for."""
        wanted = self.wall_s - self.total_s(OFF)
        return self.total_s(PRODUCTIVE) / wanted if wanted > 0 else None


@dataclass
class _Attempt:
    """One start of the ranks, from the command that began it to the death of its last process."""

    start: float
    id: str | None = None
    is_restart: bool = False
    job_id: str | None = None
    requeues: int = 0
    begin: tuple[float, float] | None = None
    """When the loop began, and the step it went on from."""
    progress: list[dict[str, Any]] = field(default_factory=list)
    end: float = 0.0
    state: str | None = None
    reason: str | None = None
    ended_at: float | None = None
    """When its processes were gone, where somebody saw it."""
    text: str = ""
    logged: float = 0.0
    """The last step that metrics.jsonl had of it: a kill may come before the timeline tells of that."""
    lost_from: float = math.inf
    is_rolled_back: bool = False
    """It went on from a checkpoint of before, in the next attempt, without a new start."""

    @property
    def is_clean(self) -> bool:
        """Whether it ended as it meant to."""
        return self.state in ("finished", "interrupted", "pruned")

    @property
    def points(self) -> list[tuple[float, float]]:
        """(time, step) of what is known of its steps; while it evaluates or saves, it comes no further."""
        found = [self.begin] if self.begin is not None else []
        for line in self.progress if found else ():
            found.append((line["t"], float(line["step"]) if line["event"] == "progress" else found[-1][1]))
        return found


def work_out(
    lines: Iterable[dict[str, Any]], *, now: float | None = None, saved_step: float | None = None
) -> Goodput | None:
    """The goodput of a run; None where the timeline holds no start.

    Args:
        lines: of the timeline, in their order.
        now: where a process of the run lives: its last attempt lasts until now.
        saved_step: of the newest checkpoint, from which a run that has not finished would go on.
    """
    attempts, queued = _attempts(lines)
    if not attempts:
        return None
    last = attempts[-1]
    if now is not None and last.state is None and last.ended_at is None:
        last.end = max(last.end, now)
    else:
        now = None
    result = Goodput()
    _find_lost(attempts, result, None if now is not None or last.state == "finished" else saved_step)
    if (since := min((t for t in queued if t < attempts[0].start), default=None)) is not None:
        result.segments.append(Segment(since, attempts[0].start, QUEUE))
    for i, attempt in enumerate(attempts):
        if i:
            result.segments += _gap(attempts[i - 1], attempt, queued)
        result.segments += _within(attempt, is_alive=now is not None and attempt is last)
        result.steps.append(attempt.points)
        _mark(result, attempts, i, is_alive=now is not None and attempt is last)
    result.segments = _merged(result.segments)
    return result


# --------------------------------------------------------------------------- reading


def _attempts(lines: Iterable[dict[str, Any]]) -> tuple[list[_Attempt], list[float]]:
    found: list[_Attempt] = []
    queued: list[float] = []
    open_one: _Attempt | None = None
    latest = 0.0
    for line in lines:
        event, t = line["event"], float(line["t"])
        t = latest = max(t, latest)  # another machine's clock may be behind
        if event == "queued":
            queued.append(t)
        elif event == "start":
            began = min(t, _number(line, "began", t))
            floor = max((found[-1].end, found[-1].ended_at or 0.0)) if found else 0.0
            open_one = _Attempt(
                max(began, floor), _text(line, "attempt"), bool(line.get("is_restart")), _text(line, "job_id"),
                int(_number(line, "requeues", 0)), end=t,
            )  # fmt: skip
            found.append(open_one)
        elif event == "ended":
            if open_one is None or open_one.id != _text(line, "attempt"):  # it failed before output_dir was its own
                began = min(t, _number(line, "began", t))
                open_one = _Attempt(max(began, found[-1].end if found else 0.0), _text(line, "attempt"))
                found.append(open_one)
            _note_end(open_one, line, t)
            open_one.end = open_one.ended_at = t
        elif event == "rollback" and open_one is not None and open_one.begin is not None:
            open_one.end, open_one.state, open_one.is_rolled_back = t, "rolled_back", True
            open_one = _Attempt(t, open_one.id, True, open_one.job_id, open_one.requeues, end=t)
            open_one.begin = (t, _number(line, "step", 0))
            found.append(open_one)
        elif event == "undone" and len(found) > 1:
            found[-2].logged = max(found[-2].logged, _last_step(line))
        elif open_one is not None and open_one.ended_at is None:
            _note(open_one, event, {**line, "t": t})
    return found, queued


def _note(attempt: _Attempt, event: str, line: dict[str, Any]) -> None:
    t = line["t"]
    attempt.end = t
    if event == "begin":
        attempt.begin = (t, _number(line, "step", 0))
    elif event == "end":
        _note_end(attempt, line, t)
    elif event == "closed":
        attempt.ended_at = t if attempt.state is not None else None
        attempt.end = t
    elif event in _MEASURED and _number(line, _MEASURED[event], -1) >= 0:
        attempt.progress.append(line)


def _note_end(attempt: _Attempt, line: dict[str, Any], t: float) -> None:
    if attempt.state is None:
        attempt.state, attempt.reason = _text(line, "state"), _text(line, "reason")
    attempt.text = attempt.text or _text(line, "text") or ""
    attempt.end = t


def _last_step(line: dict[str, Any]) -> float:
    losses = line.get("losses")
    pairs = [pair for pair in losses if isinstance(pair, list) and pair] if isinstance(losses, list) else []
    return max((_number({"step": pair[0]}, "step", 0) for pair in pairs), default=0.0)


def _number(line: dict[str, Any], key: str, default: float) -> float:
    value = line.get(key)
    if isinstance(value, str) and value.isdecimal() and len(value) < 10:
        value = int(value)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e15
    return float(value) if is_number and math.isfinite(value) else default  # type: ignore[arg-type]


def _text(line: dict[str, Any], key: str) -> str | None:
    value = line.get(key)
    return value if isinstance(value, str) else None


# --------------------------------------------------------------------------- what was trained again


def _find_lost(attempts: Sequence[_Attempt], result: Goodput, saved_step: float | None) -> None:
    """From when on the work of each attempt was done again later (or will have to be)."""
    resumed = math.inf if saved_step is None else saved_step
    for attempt in reversed(attempts):
        if attempt.begin is None:
            continue
        points = attempt.points
        if points[-1][1] > resumed:
            attempt.lost_from = _time_of(points, resumed)
            result.num_retrained += round(max(points[-1][1], attempt.logged) - max(resumed, points[0][1]))
        elif not attempt.is_clean:  # the step that it was in
            attempt.lost_from = points[-1][0]
        resumed = min(resumed, attempt.begin[1])
    if attempts[-1].begin is not None and saved_step is None and attempts[-1].state is None:
        attempts[-1].lost_from = math.inf  # it is alive


def _time_of(points: Sequence[tuple[float, float]], step: float) -> float:
    """When a step was done, between the points that are known."""
    if step <= points[0][1]:
        return points[0][0]
    for (t0, s0), (t1, s1) in pairwise(points):
        if s0 <= step < s1:
            return t0 + (t1 - t0) * (step - s0) / (s1 - s0)
    return points[-1][0]


# --------------------------------------------------------------------------- the parts


def _within(attempt: _Attempt, *, is_alive: bool) -> list[Segment]:
    if attempt.begin is None:
        return [Segment(attempt.start, attempt.end, STARTUP)]
    parts = _Parts(attempt.start)
    first_s = _first_excess_s(attempt)
    parts.fill(attempt.begin[0], STARTUP)
    for line in attempt.progress:
        if line["event"] == "progress":
            save_s, evaluation_s = _number(line, "save_s", 0), _number(line, "evaluation_s", 0)
            if first_s > 0:
                parts.fill(min(line["t"], parts.at + first_s), STARTUP)
                first_s = 0
            parts.fill(line["t"] - save_s - evaluation_s, PRODUCTIVE)
            parts.fill(line["t"] - save_s, EVALUATION)
            parts.fill(line["t"], SAVE)
        else:
            parts.fill(line["t"] - _number(line, "s", 0), PRODUCTIVE)
            parts.fill(line["t"], line["event"])
    parts.fill(attempt.end, PRODUCTIVE if is_alive else FINISH if attempt.is_clean else LOST)
    return list(_cut(parts.segments, attempt.lost_from))


class _Parts:
    """Segments one after the other."""

    def __init__(self, at: float) -> None:
        self.at, self.segments = at, list[Segment]()

    def fill(self, until: float, kind: str) -> None:
        if until > self.at:
            self.segments.append(Segment(self.at, until, kind))
            self.at = until


def _first_excess_s(attempt: _Attempt) -> float:
    """By how much the first step was longer than those after it: compiling, memory, the first batch."""
    assert attempt.begin is not None
    lines = [line for line in attempt.progress if line["event"] == "progress"]
    if len(lines) < 2 or lines[0]["step"] != attempt.begin[1] + 1 or attempt.progress[0] is not lines[0]:
        return 0.0
    per_step = [
        (b["t"] - a["t"] - _number(b, "save_s", 0) - _number(b, "evaluation_s", 0)) / (b["step"] - a["step"])
        for a, b in pairwise(lines) if b["step"] > a["step"]
    ]  # fmt: skip
    typical = sorted(per_step)[len(per_step) // 2] if per_step else math.inf
    excess = lines[0]["t"] - attempt.begin[0] - typical
    return excess if excess > 0.5 * typical else 0.0


def _cut(segments: Iterable[Segment], lost_from: float) -> Iterable[Segment]:
    """What comes after `lost_from` is lost, whatever it was."""
    for segment in segments:
        if segment.end <= lost_from or segment.kind == STARTUP:
            yield segment
            continue
        if segment.start < lost_from:
            yield Segment(segment.start, lost_from, segment.kind)
        yield Segment(max(segment.start, lost_from), segment.end, LOST)


def _gap(before: _Attempt, after: _Attempt, queued: Sequence[float]) -> list[Segment]:
    """Between two attempts nothing of the run lives."""
    start, end = before.end, max(before.end, after.start)
    if after.is_restart and after.job_id == before.job_id and after.requeues == before.requeues:
        return [Segment(start, end, STARTUP)]
    parts = _Parts(start)
    if after.job_id is not None:
        submitted = min((t for t in queued if start <= t <= end), default=None)
        is_requeued = before.reason in _REQUEUED or (after.job_id == before.job_id and after.requeues > before.requeues)
        if submitted is not None and not is_requeued:
            parts.fill(submitted, OFF if before.is_clean else DOWN)
            parts.fill(end, QUEUE)
        elif is_requeued:
            parts.fill(end, QUEUE)
    parts.fill(end, OFF if before.is_clean else DOWN)
    return parts.segments


def _merged(segments: Iterable[Segment]) -> list[Segment]:
    found: list[Segment] = []
    for segment in segments:
        if segment.end <= segment.start:
            continue
        if found and found[-1].kind == segment.kind:
            found[-1] = Segment(found[-1].start, segment.end, segment.kind)
        else:
            found.append(segment)
    return found


# --------------------------------------------------------------------------- marks


def _mark(result: Goodput, attempts: Sequence[_Attempt], i: int, *, is_alive: bool) -> None:
    attempt = attempts[i]
    if i and attempts[i - 1].is_rolled_back:
        back = f"back to step {attempt.begin[1]:.0f}" if attempt.begin is not None else "back"
        result.marks.append(Mark(attempt.start, "rollback", f"{back}: the loss spiked"))
    elif i:
        step = f" from step {attempt.begin[1]:.0f}" if attempt.begin is not None else ""
        result.marks.append(Mark(attempt.start, "restart", f"started again{step}"))
    step = f" at step {attempt.points[-1][1]:.0f}" if attempt.points else ""
    if is_alive or attempt.is_rolled_back:
        return
    if attempt.state == "finished":
        result.marks.append(Mark(attempt.end, "finish", f"finished{step}"))
    elif attempt.state in ("interrupted", "pruned") and attempt.reason != "crash":
        why = {"signal": "a signal", "stop_file": "STOP", "time_limit": "the time limit", "preempted": "preemption"}
        cause = f" by {why.get(attempt.reason or '', attempt.reason)}" if attempt.reason else ""
        result.marks.append(Mark(attempt.end, "stop", f"stopped{step}{cause}"))
    elif attempt.state == "failed" and attempt.reason is None and i == len(attempts) - 1:
        result.marks.append(Mark(attempt.end, "failed", f"failed{step}: {attempt.text}"))
    else:
        result.num_kills += 1
        what = {"hang": "hung", "crash": "crashed"}.get(attempt.reason or "", "killed")
        result.marks.append(Mark(attempt.end, "kill", f"{what}{step}" + (f": {attempt.text}" if attempt.text else "")))
