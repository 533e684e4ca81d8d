"""What the main process spends its time on, for logs/timeline.jsonl."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Literal

from launcher.base.timeline import Timeline

Kind = Literal["evaluation", "save"]
_SHORTEST_S, _LONGEST_S = 0.5, 60.0
_LINES = 1000
"""In a run of a day an interval is a minute and a half, so a line a minute; in one of a minute, two a second."""


class TimeSpent:
    """Adds up short evaluations and save stalls between two lines of progress; a long one gets a line of its own.

    So the lines are bounded by the time, whatever the steps and saves per second, and a kill at any moment leaves the
    step that was reached no longer than an interval ago.
    """

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline
        self._started_at = timeline.started_at() or time.time()
        self._written = float("-inf")
        self._step: int | None = None
        self._is_new = False
        self._sums: dict[Kind, float] = {"evaluation": 0.0, "save": 0.0}
        self._of_last_save_s = 0.0
        self._saving_since: float | None = None

    def interval_s(self) -> float:
        return min(_LONGEST_S, max(_SHORTEST_S, (time.time() - self._started_at) / _LINES))

    @contextlib.contextmanager
    def during(self, kind: Kind) -> Iterator[None]:
        """What happens inside is no training."""
        started = time.monotonic()
        self._saving_since = started if kind == "save" else None
        try:
            yield
        finally:
            spent_s, self._saving_since = time.monotonic() - started, None
            if kind == "save" and spent_s > 1e-3:
                self._of_last_save_s = spent_s
            self._add(kind, spent_s)

    def _add(self, kind: Kind, spent_s: float) -> None:
        if spent_s < self.interval_s():
            self._sums[kind] += spent_s
        else:
            self._flush(ended_s_ago=spent_s)
            self._timeline.append(kind, s=round(spent_s, 3), step=self._step)

    def saved(self, stall_s: float) -> None:
        """A save was committed; its stall, which goes on in the step after it, is known only now. What of it was
        `during` a save is counted there."""
        inside_s = 0.0 if self._saving_since is None else time.monotonic() - self._saving_since
        self._sums["save"] += max(0.0, stall_s - self._of_last_save_s - inside_s)
        self._of_last_save_s = 0.0

    def advance(self, step: int) -> None:
        """A step is done."""
        is_first, self._step, self._is_new = self._step is None, step, True
        if is_first or time.monotonic() - self._written >= self.interval_s():
            self._flush()

    def went_back(self, step: int) -> None:
        """What was done after a step is undone, and done again."""
        self._flush()
        self._timeline.append("rollback", step=step)
        self._step, self._is_new = step, False

    def end(self, state: str, reason: str | None, step: int) -> None:
        """The run ends, or somebody ended it."""
        if self._step is not None:
            self._step, self._is_new = step, self._is_new or step != self._step
        self._flush()
        self._timeline.append("end", state=state, reason=reason)

    def _flush(self, ended_s_ago: float = 0.0) -> None:
        """What was done up to now, or up to the beginning of what has just ended."""
        self._written = time.monotonic()
        if self._step is None or not (self._is_new or any(self._sums.values())):
            return
        sums = {f"{kind}_s": round(spent_s, 3) or None for kind, spent_s in self._sums.items()}
        self._timeline.append("progress", t=round(time.time() - ended_s_ago, 3), step=self._step, **sums)
        self._sums = {"evaluation": 0.0, "save": 0.0}
        self._is_new = False
