"""Where a run is written down and shown: metrics.jsonl, run.json, trackers, the progress display. Main process only.

The other processes hold `NoRecorder`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any, Protocol

from launcher.base.errors import UserError
from launcher.base.timeline import Timeline
from launcher.train.about import mfu
from launcher.train.display import Display
from launcher.train.metrics import MetricsFile, RunFile, SamplesFile
from launcher.train.time_spent import Kind, TimeSpent
from launcher.train.trackers import Trackers

_MAX_UNDONE = 500


class Recorder(Protocol):
    """No method raises because a disk is full or a tracker fails: neither may end a run."""

    def measured(self, line: dict[str, Any]) -> None:
        """A line of metrics.jsonl, of training or evaluation; trackers and the display get it too."""

    def saved(self, line: dict[str, Any]) -> None:
        """A line of metrics.jsonl for a committed save."""

    def noted(self, line: dict[str, Any]) -> None:
        """A line of metrics.jsonl alone, unless it is there."""

    def went_back(self, step: int) -> None:
        """The run goes on from a checkpoint of before: what was measured after it is taken back."""

    def sampled(self, step: int, samples: Sequence[dict[str, Any]]) -> None:
        """What the model wrote in an evaluation."""

    def last(self, key: str) -> Any:
        """The newest value of a key of metrics.jsonl, also of an earlier start."""

    def say(self, text: str) -> None:
        """A notice for the user."""

    def advance(self, step: int, epoch: float, hub_status: Callable[[], dict[str, Any]]) -> None:
        """A step is done: for the display, and from time to time for run.json."""

    def during(self, kind: Kind) -> AbstractContextManager[None]:
        """What happens inside is an evaluation or a save, not training."""

    def update_run(self, **fields: Any) -> None:
        """Changes run.json now; with a `state` other than running the run ends."""

    def close(self) -> None:
        """Ends the trackers and the display."""


class MainRecorder:
    """The main process's. metrics.jsonl is cut to the step that the run goes on from."""

    def __init__(
        self, metrics: MetricsFile, run_file: RunFile, trackers: Trackers, display: Display, timeline: Timeline,
        samples: SamplesFile, about: dict[str, Any],
    ) -> None:  # fmt: skip
        self._metrics, self._run_file, self._trackers, self._display = metrics, run_file, trackers, display
        self._samples, self._about = samples, about
        self._timeline, self._time_spent = timeline, TimeSpent(timeline)
        if trackers.notice:
            display.say(trackers.notice)

    def measured(self, line: dict[str, Any]) -> None:
        if (share := mfu(line, self._about)) is not None:
            line = {**line, "mfu": share}
        self._metrics.append(line)
        self._trackers.log(line)
        self._display.log(line)

    def saved(self, line: dict[str, Any]) -> None:
        self._metrics.append(line)
        self._time_spent.saved(line["save_stall_s"])
        self._display.saved(line)

    def noted(self, line: dict[str, Any]) -> None:
        self._metrics.append_once(line)

    def went_back(self, step: int) -> None:
        self._time_spent.went_back(step)
        with suppress(UserError):  # it cannot be rewritten: then the lines stay
            note_undone(self._timeline, self._metrics.trim(step))

    def sampled(self, step: int, samples: Sequence[dict[str, Any]]) -> None:
        self._samples.append(step, samples)

    def last(self, key: str) -> Any:
        return self._metrics.last(key)

    def say(self, text: str) -> None:
        self._display.say(text)

    def advance(self, step: int, epoch: float, hub_status: Callable[[], dict[str, Any]]) -> None:
        self._display.advance(step, hub_status)
        self._time_spent.advance(step)
        self._run_file.advance(step, epoch, hub_status)

    def during(self, kind: Kind) -> AbstractContextManager[None]:
        self._display.doing("evaluating" if kind == "evaluation" else "")
        return self._time_spent.during(kind)

    def update_run(self, **fields: Any) -> None:
        if fields.get("state", "running") != "running":
            self._time_spent.end(fields["state"], fields.get("reason"), fields["step"])
        self._run_file.update(**fields)

    def close(self) -> None:
        self._metrics.write_refused()
        self._timeline.append("closed")
        self._trackers.close()
        self._display.close()


def note_undone(timeline: Timeline, removed: Sequence[dict[str, Any]]) -> None:
    """Losses of steps that are trained again, to be compared."""
    if undone := [[line["step"], line["loss"]] for line in removed if "loss" in line]:
        timeline.append("undone", losses=undone[-_MAX_UNDONE:])


class NoRecorder:
    """The null object of the other processes."""

    def measured(self, line: dict[str, Any]) -> None: ...
    def saved(self, line: dict[str, Any]) -> None: ...
    def noted(self, line: dict[str, Any]) -> None: ...
    def went_back(self, step: int) -> None: ...
    def sampled(self, step: int, samples: Sequence[dict[str, Any]]) -> None: ...
    def last(self, key: str) -> Any: ...
    def say(self, text: str) -> None: ...
    def advance(self, step: int, epoch: float, hub_status: Callable[[], dict[str, Any]]) -> None: ...
    def during(self, kind: Kind) -> AbstractContextManager[None]:
        return nullcontext()

    def update_run(self, **fields: Any) -> None: ...
    def close(self) -> None: ...
