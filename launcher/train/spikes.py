"""Loss spikes (`train.on_spike`): which loss is one, the step left out, or the run taken back to before it.

A step's loss, over all processes, is compared with those of the last `spike_window` steps that were applied. What
decides is part of a checkpoint (`ProgressState`: recent_losses, spikes, left_out), and the sums are the same on every
process, so that a run that goes on from any checkpoint decides as one that was never stopped.

skip: the update of that step is not applied. rollback: the run goes on from the newest checkpoint that is older than
the `spike_rollback_steps` up to the spike, and those steps are left out: no forward, no update, their samples are not
replaced; step numbers and the schedule count them. So the result does not depend on which checkpoint that was. run.json
keeps each rollback before anything is undone; a start from a checkpoint of before takes it from there.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from typing import Any

from launcher.base import files
from launcher.base.errors import SpikeError
from launcher.base.paths import RunPaths
from launcher.base.processes import Processes
from launcher.checkpoint import resume
from launcher.checkpoint.resume import ResumePoint
from launcher.config.settings import TrainConfig
from launcher.saving.saver import Saver
from launcher.saving.training_state import ProgressState, TrainingState
from launcher.train.recorder import Recorder

ROLLBACKS = "rollbacks"
"""Key of run.json."""
_LEAST_SPREAD = 0.05
"""Of the median: losses that are all but equal would make a spike of any other."""
_MAD_TO_DEVIATION = 1.4826
"""The standard deviation of a normal distribution is so many times its median absolute deviation."""


def limit(losses: list[float], train: TrainConfig) -> float:
    """The loss above which a step is a spike; infinite until there are enough losses to compare with."""
    if len(losses) < train.spike_window:
        return math.inf
    middle = statistics.median(losses)
    spread = _MAD_TO_DEVIATION * statistics.median(abs(loss - middle) for loss in losses)
    return middle + train.spike_threshold * max(spread, _LEAST_SPREAD * abs(middle))


def idle_settings(*starts: Mapping[str, Any]) -> list[str]:
    """Keys among the settings of these starts that decide nothing, since `on_spike` uses them in none."""
    used = {settings.get("train.on_spike", "off") for settings in starts}
    idle = [] if "rollback" in used else ["train.spike_rollback_steps"]
    return idle if used != {"off"} else [*idle, "train.spike_threshold", "train.spike_window"]


def known_rollbacks(paths: RunPaths, point: ResumePoint | None) -> list[dict[str, Any]]:
    """The rollbacks of run.json that hold for a start from `point`: those that it knows, and those of steps after it.

    A start from elsewhere, or from step 0, knows of none.
    """
    if point is None or point.folder.parent != paths.root:
        return []
    found = files.read_json_or(paths.run_state, {}).get(ROLLBACKS)
    entries = [entry for entry in found if _is_rollback(entry)] if isinstance(found, list) else []
    before = point.state["progress"].get("left_out", [])
    return [e for e in entries if e["left_out"] in before or point.step < e["left_out"][0]]


def _is_rollback(entry: Any) -> bool:
    numbers = entry.get("left_out") if isinstance(entry, Mapping) else None
    if not isinstance(numbers, list) or len(numbers) != 2 or not isinstance(entry.get("to"), int):
        return False
    return all(type(number) is int for number in numbers) and 0 < numbers[0] <= numbers[1]


class Spikes:
    """What the loop asks. Its methods are called by all processes with the same values.

    Args:
        load_state: `accelerator.load_state`.
        rollbacks: those of earlier starts, see `known_rollbacks`.
    """

    def __init__(
        self, train: TrainConfig, paths: RunPaths, processes: Processes, state: TrainingState, saver: Saver,
        recorder: Recorder, load_state: Callable[[str], Any], rollbacks: list[dict[str, Any]],
    ) -> None:  # fmt: skip
        self._train, self._paths, self._processes, self._state = train, paths, processes, state
        self._saver, self._recorder, self._load_state, self._rollbacks = saver, recorder, load_state, rollbacks
        self._leave_out()
        for entry in rollbacks:
            recorder.noted(_line(entry))

    @property
    def _progress(self) -> ProgressState:
        return self._state.progress  # another one after a rollback

    @property
    def limit(self) -> float | None:
        """The loss above which the next step is a spike; None where nobody asked for it."""
        return None if self._train.on_spike == "off" else limit(self._progress.recent_losses, self._train)

    def is_left_out(self, step: int) -> bool:
        """Whether a rollback left the step (counted from 1) out."""
        return any(first <= step <= last for first, last in self._progress.left_out)

    def applied(self, loss: float) -> None:
        """Notes the loss of a step whose update was applied."""
        if self._train.on_spike != "off":
            p = self._progress
            p.recent_losses = [*p.recent_losses, loss][-self._train.spike_window :]

    def found(self, loss: float) -> bool:
        """The current step was a spike; its update is not applied. Collective.

        Returns:
            Whether the run went back: its state is that of a checkpoint now.

        Raises:
            SpikeError: they are too many.
        """
        p = self._progress
        about = {"spike_loss": loss, "spike_limit": limit(p.recent_losses, self._train)}
        self._refuse_too_many(about)
        point = self._before() if self._train.on_spike == "rollback" else None
        if point is None:
            p.spikes = [*self._recent(p.spikes), p.step]
            self._recorder.noted({"step": p.step, **about})
            self._recorder.say(f"step {p.step}: {_in_words(about)}; the step is left out")
            return False
        self._go_back(point, about)
        return True

    def _recent(self, steps: list[int]) -> list[int]:
        return [step for step in steps if step > self._progress.step - self._train.spike_window]

    def _refuse_too_many(self, about: Mapping[str, float]) -> None:
        p, train = self._progress, self._train
        count = len(self._recent([*p.spikes, *(last for _, last in p.left_out)]))
        if count < train.max_spikes:
            return
        self._saver.wait(is_urgent=True)  # every process is here, and what is being written is of before
        raise SpikeError(
            f"step {p.step}: {_in_words(about)}, and there were {count} within {train.spike_window} steps before "
            f"(train.max_spikes={train.max_spikes}). What was saved before is whole. A lower optim.learning_rate or "
            "train.max_grad_norm may help; to call fewer losses a spike: a higher train.spike_threshold; to allow "
            f"more of them: train.max_spikes={2 * train.max_spikes}"
        )

    # ------------------------------------------------------------------ going back

    def _first_left_out(self) -> int:
        return self._progress.step - self._train.spike_rollback_steps + 1

    def _before(self) -> ResumePoint | None:
        """The checkpoint to go back to, every byte verified, or None where there is none."""
        first = self._first_left_out()
        # Not one that only a stop made: a run that was not stopped would have none to go back to.
        if not self._saver.has_regular(first - 1):
            return None
        self._saver.wait()
        point, notices = resume.newest_before(first, self._paths, self._processes)
        for notice in notices:
            self._recorder.say(notice)
        return point

    def _go_back(self, point: ResumePoint, about: dict[str, float]) -> None:
        spiked, first = self._progress.step, self._first_left_out()
        entry = {"step": spiked, **about, "to": point.step, "left_out": [first, spiked]}
        # In this order: a kill between two of these leaves a run that goes on from `point`, finds the spike again and
        # goes back again, or one that knows of it.
        moved = self._processes.on_main(lambda: resume.supersede(self._paths, above_step=point.step))
        self._rollbacks.append(entry)
        self._recorder.update_run(**{ROLLBACKS: self._rollbacks})
        self._recorder.went_back(point.step)
        self._recorder.noted(_line(entry))
        self._load_state(str(point.folder))
        self._leave_out()
        self._saver.went_back()
        self._recorder.say(
            f"step {spiked}: {_in_words(about)}; back to {point.folder.name}, "
            f"without the samples of steps {first} to {spiked}"
        )
        for notice in moved:
            self._recorder.say(notice)

    def _leave_out(self) -> None:
        p = self._progress
        p.left_out = [*p.left_out, *(e["left_out"] for e in self._rollbacks if e["left_out"] not in p.left_out)]


def _line(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Of metrics.jsonl; its step is that of the checkpoint, so that a start from there keeps it."""
    return {
        "step": entry["to"], "rolled_back_from": entry["left_out"][1], "left_out_steps": entry["left_out"],
        **{key: entry.get(key) for key in ("spike_loss", "spike_limit")},
    }  # fmt: skip


def _in_words(about: Mapping[str, float]) -> str:
    return f"its loss {about['spike_loss']:.4g} is a spike (above {about['spike_limit']:.4g})"
