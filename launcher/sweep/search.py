"""Optuna as the source of jobs: ask, watch, prune, tell. The only importer of optuna; imports no torch.

A trial is a job whose folder is named by its values, so that whatever a killed controller left is found again: a trial
still RUNNING in the study is continued under its own number, and values that were tried before are not run twice.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import optuna
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep, Transformer
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import Trial, TrialState

from launcher.base import files
from launcher.base.errors import ConfigError
from launcher.base.paths import RunPaths
from launcher.base.stop_requests import read_stop, remove_stop
from launcher.sweep.jobs import Job, SweepTable, needs_run, read_job
from launcher.sweep.plan import SweepPlan
from launcher.sweep.runs import FAILED, FINISHED, PRUNED, MetricsTail, RunStatus

Distribution = FloatDistribution | IntDistribution | CategoricalDistribution
_JOB, _SWEEP = "launcher:job", "launcher:sweep"
_COUNTED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL, TrialState.RUNNING)


class Axis:
    """One swept setting: its Optuna distribution, and how a proposed value is written as an override."""

    def __init__(self, override: Override) -> None:
        self.key = override.get_key_element()
        self.distribution: Distribution
        self._texts: dict[Any, str] = {}
        value = override.value()
        if isinstance(value, IntervalSweep):
            self.distribution = _interval(value)
        elif isinstance(value, RangeSweep) and not value.shuffle:
            self.distribution = _range(value)
        else:
            self._texts = dict(
                zip(override.sweep_iterator(Transformer.encode), override.sweep_string_iterator(), strict=True)
            )
            self.distribution = CategoricalDistribution(list(self._texts))

    @property
    def num_values(self) -> float:
        d = self.distribution
        if isinstance(d, CategoricalDistribution):
            return len(d.choices)
        return math.inf if d.step is None else round((d.high - d.low) / d.step) + 1

    def suggest(self, trial: Trial) -> Any:
        """The trial's value; the one it has already, where it was asked before."""
        d = self.distribution
        if isinstance(d, FloatDistribution):
            return trial.suggest_float(self.key, d.low, d.high, step=d.step, log=d.log)
        if isinstance(d, IntDistribution):
            return trial.suggest_int(self.key, d.low, d.high, step=d.step, log=d.log)
        return trial.suggest_categorical(self.key, list(d.choices))

    def text(self, value: Any) -> str:
        return self._texts[value] if self._texts else str(value)


def _interval(interval: IntervalSweep) -> Distribution:
    low, high, is_log = interval.start, interval.end, "log" in interval.tags
    if isinstance(low, int) and isinstance(high, int):
        return IntDistribution(low, high, log=is_log)
    return FloatDistribution(float(low or 0), float(high or 0), log=is_log)


def _range(sweep: RangeSweep) -> Distribution:
    """Hydra's range leaves its end out, Optuna's distributions hold it."""
    values = sorted(sweep.range())
    step = abs(sweep.step)
    if all(isinstance(v, int) for v in values):
        return IntDistribution(int(values[0]), int(values[-1]), step=int(step))
    return FloatDistribution(float(values[0]), float(values[-1]), step=float(step))


def open_study(plan: SweepPlan) -> optuna.Study:
    """The study in its storage, made where it is not there yet.

    Raises:
        ConfigError: a setting under hydra.sweeper that Optuna refuses.
    """
    from hydra.utils import instantiate

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # the user chose it
    conf = plan.sweeper_config
    wanted: Literal["maximize", "minimize"] = "maximize" if plan.metric.is_greater_better else "minimize"
    direction = conf["direction"] or wanted
    if direction != wanted:
        is_greater = "true" if direction == "maximize" else "false"
        raise ConfigError(
            [
                f"hydra.sweeper.direction must be {wanted} for {plan.metric.key} (got {direction!r}). Leave it out, "
                f"or set checkpoint.greater_is_better={is_greater} too"
            ]
        )
    plan.paths.root.mkdir(parents=True, exist_ok=True)
    try:
        study = optuna.create_study(
            storage=_storage(conf["storage"], plan.paths.study), direction=wanted, load_if_exists=True,
            study_name=conf["study_name"] or str(plan.paths.root.resolve()), pruner=instantiate(conf["pruner"]),
        )  # fmt: skip
        sampler = dict(conf["sampler"])
        if sampler.get("seed") is not None:  # the same seed would propose the first values once more
            sampler["seed"] += len(study.get_trials(deepcopy=False))
        study.sampler = instantiate(sampler)
    except Exception as error:  # whatever Optuna, SQLAlchemy or Hydra's instantiate make of the user's settings
        raise ConfigError([f"hydra.sweeper: {error}"]) from error
    return study


def _storage(name: str | None, default: Path) -> Any:
    if name is None:
        return f"sqlite:///{default.resolve()}"
    if name.endswith((".log", ".journal")) and "://" not in name:
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        Path(name).expanduser().absolute().parent.mkdir(parents=True, exist_ok=True)
        return JournalStorage(JournalFileBackend(str(Path(name).expanduser())))
    return name


class Search:
    """Proposes jobs until the study holds `n_trials` trials, those of earlier starts included."""

    def __init__(self, plan: SweepPlan, table: SweepTable, *, retry_failed: bool) -> None:
        self._plan, self._table, self._retry_failed = plan, table, retry_failed
        self._axes = [Axis(override) for override in plan.swept]
        self._study = open_study(plan)
        self._sweep = str(plan.paths.root.resolve())
        self._trials: dict[str, list[Trial]] = {}
        self._tails: dict[str, MetricsTail] = {}
        self._left_over = deque(self._adopt())
        self._to_retry = deque(self._failed_values() if retry_failed else [])
        self.jobs: dict[str, Job] = {}
        """Every job of this start, by name."""

    # ------------------------------------------------------------------ source of jobs

    def next_job(self) -> Job | None:
        while (trial := self._next_trial()) is not None:
            job = self._plan.make_job(self._values(trial), self._table)
            trial.set_user_attr(_JOB, job.name)
            self.jobs[job.name] = job
            if job.name in self._trials:  # the same values are running: both trials get their result
                self._trials[job.name].append(trial)
                continue
            self._trials[job.name] = [trial]
            status = read_job(job.output_dir, self._plan.metric)
            if needs_run(job, status, retry_failed=self._retry_failed):
                self._table.add([job])
                self._table.write(self._plan.metric)
                self._tails[job.name] = MetricsTail(RunPaths(job.output_dir).metrics)
                return job
            self.ended(job, status)
        return None

    def watch(self, job: Job) -> None:
        """Reports the evaluations since the last call; a trial that the pruner gives up is asked to stop."""
        trial = self._trials[job.name][0]
        is_new = self._report(trial, self._tails[job.name].new_lines())
        stop_file = RunPaths(job.output_dir).stop_file
        if is_new and trial.should_prune() and not files.is_taken(stop_file):
            with contextlib.suppress(OSError):  # a full disk: asked again after the next evaluation
                files.replace_file(stop_file, b"pruned\n")

    def ended(self, job: Job, status: RunStatus) -> None:
        """Tells the study. An interrupted trial stays RUNNING there: the next start continues it."""
        trials = self._trials.pop(job.name)
        tail = self._tails.pop(job.name, None) or MetricsTail(RunPaths(job.output_dir).metrics)
        if read_stop(stop_file := RunPaths(job.output_dir).stop_file) == "pruned":
            remove_stop(stop_file)  # by an evaluation that was seen when the job had already stopped, or was at its end
        if status.state not in (FINISHED, PRUNED, FAILED):
            return
        lines = tail.new_lines()
        for trial in trials:
            self._report(trial, lines)
            value = status.best_metric
            if status.state == FINISHED and value is not None and math.isfinite(value):
                self._tell(trial, TrialState.COMPLETE, value)
            else:
                self._tell(trial, TrialState.PRUNED if status.state == PRUNED else TrialState.FAIL)

    # ------------------------------------------------------------------ trials

    def _next_trial(self) -> Trial | None:
        if self._left_over:
            return self._left_over.popleft()
        if self._to_retry:
            self._study.enqueue_trial(self._to_retry.popleft())
            return self._ask()
        if self._is_exhausted():
            return None
        counted = [t for t in self._study.get_trials(deepcopy=False) if t.state in _COUNTED]
        return self._ask() if len(counted) < int(self._plan.sweeper_config["n_trials"]) else None

    def _ask(self) -> Trial:
        trial = self._study.ask()
        trial.set_user_attr(_SWEEP, self._sweep)
        return trial

    def _is_exhausted(self) -> bool:
        """Whether the sampler that tries every combination has done so; it would begin again."""
        if not isinstance(self._study.sampler, optuna.samplers.BruteForceSampler):
            return False
        tried = {repr(sorted(t.params.items())) for t in self._study.get_trials(deepcopy=False)}
        return len(tried) >= math.prod(axis.num_values for axis in self._axes)

    def _tell(self, trial: Trial, state: TrialState, value: float | None = None) -> None:
        try:
            self._study.tell(trial, value, state)
        except RuntimeError as error:
            # BruteForceSampler ends the study with Study.stop, which ask/tell has no loop for; the trial is written.
            if "Study.stop" not in str(error):
                raise

    def _values(self, trial: Trial) -> dict[str, str]:
        """The override texts of a trial; asks the sampler for those it does not have yet."""
        try:
            return {axis.key: axis.text(axis.suggest(trial)) for axis in self._axes}
        except ValueError as error:
            raise ConfigError(
                [
                    f"the study in hydra.sweeper.storage was made with other values: {error} "
                    "Set hydra.sweeper.study_name=NEW_NAME, or another output_dir"
                ]
            ) from error

    def _adopt(self) -> Iterator[Trial]:
        """The trials that a killed controller of this sweep left RUNNING; one of other settings is closed."""
        keys = {axis.key for axis in self._axes}
        is_own_storage = self._plan.sweeper_config["storage"] is None
        for frozen in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if frozen.user_attrs.get(_SWEEP, self._sweep if is_own_storage else None) != self._sweep:
                continue  # of another controller on a shared storage
            if frozen.params.keys() <= keys:
                yield Trial(self._study, frozen._trial_id)
            else:
                self._study.tell(frozen.number, state=TrialState.FAIL)

    def _failed_values(self) -> list[dict[str, Any]]:
        """Values that only ever failed. Optuna's ended trials cannot be reopened: they come back as new trials."""
        failed: dict[str, dict[str, Any]] = {}
        others = set()
        for frozen in self._study.get_trials(deepcopy=False):
            text = repr(sorted(frozen.params.items()))
            if frozen.state == TrialState.FAIL and _JOB in frozen.user_attrs:
                failed[text] = frozen.params
            else:
                others.add(text)
        return [params for text, params in failed.items() if text not in others]

    def _report(self, trial: Trial, lines: list[dict[str, Any]]) -> bool:
        known = set(self._study.get_trials(deepcopy=False)[trial.number].intermediate_values)
        is_new = False
        for line in lines:
            value, step = line.get(self._plan.metric.key), line.get("step")
            if isinstance(value, (int, float)) and isinstance(step, int) and step not in known:
                trial.report(float(value), step)
                known.add(step)
                is_new = True
        return is_new
