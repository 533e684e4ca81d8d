"""From the command line of a sweep to its jobs: everything is checked before the first one starts. Imports no torch."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override, Quote, QuotedString
from omegaconf import DictConfig, OmegaConf

from launcher.base.errors import ConfigError
from launcher.config.compose import SELECTING_KEYS, check_sweep, compose_hydra, parse_overrides, to_plain
from launcher.config.overrides import parse_override
from launcher.config.parse import parse_config
from launcher.config.settings import RunConfig
from launcher.sweep.jobs import Job, SweepPaths, SweepTable, job_name, job_run_name
from launcher.sweep.runs import Metric

LAUNCHERS = ("local", "slurm")
SWEEPERS = ("basic", "optuna")
_OWN_KEYS = ("hydra/launcher", "hydra/sweeper", "hydra.sweeper.", "hydra.launcher.", "sweep.", "output_dir")
_MAX_CHECKED_JOBS = 200
_MAX_COMPOSITIONS = 32
"""Combinations of group choices that are composed in advance; each takes about 0.1 s."""


@dataclass(frozen=True)
class SweepPlan:
    """What to run and how. `swept` are the overrides that hold several values."""

    paths: SweepPaths
    config: RunConfig
    config_dir: str | None
    launcher: str
    launcher_config: dict[str, Any]
    sweeper: str
    sweeper_config: dict[str, Any]
    fixed: tuple[str, ...]
    swept: tuple[Override, ...]
    configs: JobConfigs
    metric: Metric
    num_processes: int | None
    """Of the largest job."""

    def make_job(self, values: dict[str, str], table: SweepTable) -> Job:
        """The job of one combination of values, given as override texts."""
        own = tuple(f"{key}={value}" for key, value in values.items())
        overrides = (*self.fixed, *own)
        name = table.known_name(overrides) or job_name(values or _as_values(self.fixed) or {"job": "1"})
        output_dir = self.paths.root / name
        arguments = list(overrides)
        if self.config_dir is not None:
            arguments = ["--config-dir", self.config_dir, *arguments]
        texts = self.own_texts(name, values)
        arguments += [f"{key}={text}" for key, text in texts.items()]
        return Job(name, output_dir, values, overrides, tuple(arguments))

    def own_texts(self, name: str, values: Mapping[str, str]) -> dict[str, str]:
        """What every job has of its own: its folder and, where it is not swept, its run_name."""
        own = {} if "run_name" in values else {"run_name": quoted(job_run_name(self.config.run_name, name))}
        return {**own, "output_dir": quoted(str(self.paths.root / name))}

    def grid(self, table: SweepTable) -> list[Job]:
        """Every combination of the swept values, the last key fastest; each job once."""
        jobs = (self.make_job(values, table) for values in combinations(self.swept))
        return list({job.name: job for job in jobs}.values())


def quoted(text: str) -> str:
    """A text as the value of an override, whatever is in it."""
    return QuotedString(text, Quote.single).with_quotes()


def combinations(swept: Sequence[Override]) -> Iterator[dict[str, str]]:
    keys = [override.get_key_element() for override in swept]
    for values in itertools.product(*(list(override.sweep_string_iterator()) for override in swept)):
        yield dict(zip(keys, values, strict=True))


def _as_values(fixed: Iterable[str]) -> dict[str, str]:
    return dict(override.partition("=")[::2] for override in fixed)


def make_plan(arguments: Sequence[str], config_dir: str | None) -> SweepPlan:
    """Composes the sweep and checks every value.

    Raises:
        ConfigError: with every problem of every job.
    """
    checked_overrides = check_sweep(arguments, config_dir)
    given = checked_overrides.parsed
    if checked_overrides.problems:
        raise ConfigError(
            [*checked_overrides.problems, *_other_problems(given, checked_overrides.bad_keys, config_dir)]
        )
    _refuse_sweeps_of(given)
    own, fixed, swept = _own_fixed_swept(given)
    configs = JobConfigs([*fixed.values(), *own], [o.key_or_group for o in swept.values()], config_dir)
    composed = configs.base()
    choices = composed.hydra.runtime.choices
    launcher = _choice("hydra/launcher", choices["hydra/launcher"], LAUNCHERS)
    sweeper = _choice("hydra/sweeper", choices["hydra/sweeper"], SWEEPERS)
    sweeper_config = _plain(composed.hydra.sweeper)
    params = [f"{key}={value}" for key, value in (sweeper_config.get("params") or {}).items()]
    more_fixed, more_swept = _split(parse_overrides(params, config_dir))
    taken = fixed.keys() | swept.keys()
    fixed |= {key: text for key, text in more_fixed.items() if key not in taken}
    swept |= {key: override for key, override in more_swept.items() if key not in taken}

    if sweeper == "basic":
        _refuse_intervals(swept.values())
    if more_fixed or more_swept:
        configs = JobConfigs([*fixed.values(), *own], [o.key_or_group for o in swept.values()], config_dir)
    root = Path(str(to_plain(configs.base())["output_dir"])).expanduser()
    checked = check_values(configs, list(swept.values()))
    config = checked[0]
    counts = [c.launch.num_processes or (1 if c.strategy.name == "single" else None) for c in checked]
    plan = SweepPlan(
        paths=SweepPaths(root), config=config, config_dir=config_dir, launcher=launcher,
        launcher_config=_plain(composed.hydra.launcher), sweeper=sweeper, sweeper_config=sweeper_config,
        fixed=tuple(fixed.values()), swept=tuple(swept.values()), configs=configs,
        metric=Metric.of(config.checkpoint, config.eval.eval_strategy),
        num_processes=None if None in counts else max(n for n in counts if n is not None),
    )  # fmt: skip
    _refuse_shared_repository(plan)
    return plan


def _own_fixed_swept(given: Sequence[Override]) -> tuple[list[str], dict[str, str], dict[str, Override]]:
    own = [o.input_line or "" for o in given if o.key_or_group.startswith(_OWN_KEYS)]
    return own, *_split(o for o in given if not o.key_or_group.startswith(_OWN_KEYS))


def _other_problems(good: Sequence[Override], bad_keys: Collection[str], config_dir: str | None) -> list[str]:
    """What is wrong with the values of the overrides that are right in themselves, beside others that are not."""
    own, fixed, swept = _own_fixed_swept(good)
    configs = JobConfigs([*fixed.values(), *own], [*swept, *bad_keys], config_dir, bad_keys)
    try:
        check_values(configs, list(swept.values()))
    except ConfigError as error:
        return error.problems
    return []


def _plain(node: Any) -> dict[str, Any]:
    value = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    return {str(k): v for k, v in value.items()} if isinstance(value, dict) else {}


def _split(overrides: Iterable[Override]) -> tuple[dict[str, str], dict[str, Override]]:
    """Fixed overrides as texts and those with several values, by key; a later one replaces an earlier."""
    fixed: dict[str, str] = {}
    swept: dict[str, Override] = {}
    for override in overrides:
        key = override.get_key_element()
        fixed.pop(key, None)
        swept.pop(key, None)
        if override.is_sweep_override():
            swept[key] = override
        else:
            fixed[key] = override.input_line or ""
    return fixed, swept


def _choice(group: str, name: str, valid: tuple[str, ...]) -> str:
    name = "local" if (group, name) == ("hydra/launcher", "basic") else name  # Hydra's own default
    if name not in valid:
        raise ConfigError([f"{group}={name} cannot be used. Valid: {', '.join(valid)}"])
    return name


def _refuse_sweeps_of(overrides: Iterable[Override]) -> None:
    problems = []
    for override in overrides:
        key = override.key_or_group
        if override.is_sweep_override() and (key.startswith(_OWN_KEYS) or override.is_hydra_override()):
            problems.append(f"{override.input_line}: {key} describes the sweep as a whole and takes one value")
        if key.startswith("hydra.sweep."):
            problems.append(f"{key} is not used: the jobs' folders are in output_dir. Set output_dir=FOLDER")
    if problems:
        raise ConfigError(problems)


def _refuse_intervals(swept: Iterable[Override]) -> None:
    problems = [
        f"{override.input_line}: an interval has no values of its own to try. Set hydra/sweeper=optuna, or list them"
        for override in swept
        if override.is_interval_sweep()
    ]
    if problems:
        raise ConfigError(problems)


def _refuse_shared_repository(plan: SweepPlan) -> None:
    """Jobs that push to one repository would overwrite each other; the first two show whether they do."""
    targets = []
    for values in itertools.islice(combinations(_enumerable(plan.swept)), 2):
        config = plan.configs.of({**values, **plan.own_texts(job_name(values), values)}, is_exact=True)
        hub = config.hub
        targets.append((hub.hub_model_id or hub.bucket, hub.hub_revision) if hub.push_to_hub else None)
    if len(targets) == 2 and targets[0] == targets[1] and targets[0] is not None and targets[0][0] is not None:
        raise ConfigError(
            [
                f"hub.hub_model_id={targets[0][0]} is one repository for all jobs: they would overwrite each other. "
                "Set hub.hub_model_id='ORG/${run_name}', which every job has its own of, or leave it out"
            ]
        )


# --------------------------------------------------------------------------- the settings of the jobs


class JobConfigs:
    """The settings of any job: group choices are composed, once each, and plain values put into the result."""

    def __init__(
        self, fixed: Sequence[str], named: Sequence[str], config_dir: str | None, bad_keys: Collection[str] = ()
    ) -> None:
        self._fixed, self._named, self._config_dir, self._bad_keys = fixed, named, config_dir, bad_keys
        self._composed: dict[tuple[str, ...], DictConfig] = {}
        self._plain: dict[tuple[str, ...], dict[str, Any]] = {}
        self._values: dict[tuple[str, str], Any] = {}

    @property
    def num_compositions(self) -> int:
        return len(self._composed)

    def of(self, values: Mapping[str, str], *, is_exact: bool) -> RunConfig:
        """Composes and checks the settings of one job.

        Args:
            is_exact: also follow interpolations to these values; takes ten times as long.

        Raises:
            ConfigError: with every problem.
        """
        structural = tuple(f"{key}={text}" for key, text in values.items() if not self._is_plain(key, text))
        if structural not in self._composed:
            self._composed[structural] = self.compose(structural)
            self._plain[structural] = to_plain(self._composed[structural])
        plain = {key: self._value(key, text) for key, text in values.items() if self._is_plain(key, text)}
        if is_exact:
            composed = copy.deepcopy(self._composed[structural])
            OmegaConf.set_struct(composed, False)
            for key, value in plain.items():
                OmegaConf.update(composed, key, value)
            return parse_config(to_plain(composed), bad_keys=self._bad_keys)
        data = copy.deepcopy(self._plain[structural])
        for key, value in plain.items():
            _set(data, key, value)
        return parse_config(data, bad_keys=self._bad_keys)

    def compose(self, more: Sequence[str] = ()) -> DictConfig:
        """With Hydra's own node."""
        return compose_hydra([*self._fixed, *more], self._config_dir, named=self._named)

    def base(self) -> DictConfig:
        """The composition without any of the swept values."""
        if () not in self._composed:
            self._composed[()] = self.compose()
            self._plain[()] = to_plain(self._composed[()])
        return self._composed[()]

    def _value(self, key: str, text: str) -> Any:
        if (key, text) not in self._values:
            self._values[key, text] = parse_override(f"{key}={text}").value()
        return self._values[key, text]

    def _is_plain(self, key: str, text: str) -> bool:
        """Whether an override only replaces a value that is there: no group choice, no `+`, no interpolation."""
        if "${" in text or not key[:1].isalpha() or "@" in key or "/" in key or key.startswith(SELECTING_KEYS):
            return False
        self.base()
        node: Any = self._plain[()]
        for name in key.split("."):
            if not isinstance(node, dict) or name not in node:
                return False
            node = node[name]
        return not isinstance(node, dict)


def check_values(configs: JobConfigs, swept: Sequence[Override]) -> list[RunConfig]:
    """Checks the settings of the jobs and returns them; interpolations to swept values are not followed.

    Of more than 200 jobs those are checked that together hold every value; the others check themselves as they start.

    Raises:
        ConfigError: with every problem; one that not all jobs share names its job.
    """
    jobs = _worth_checking(list(combinations(_enumerable(swept))))
    problems: dict[str, list[str]] = {}
    checked = []
    for values in jobs:
        if configs.num_compositions > _MAX_COMPOSITIONS:
            break  # the rest are checked as they start
        try:
            checked.append(configs.of(values, is_exact=False))
        except ConfigError as error:
            for problem in error.problems:
                problems.setdefault(problem, []).append(job_name(values))
    if problems:
        raise ConfigError([_with_jobs(problem, names, len(jobs)) for problem, names in problems.items()])
    return checked


def _worth_checking(jobs: list[dict[str, str]]) -> list[dict[str, str]]:
    if len(jobs) <= _MAX_CHECKED_JOBS:
        return jobs
    seen: set[tuple[str, str]] = set()
    chosen = []
    for values in jobs:
        if not seen.issuperset(values.items()):
            seen.update(values.items())
            chosen.append(values)
    return chosen


def _enumerable(swept: Sequence[Override]) -> list[Override]:
    """The overrides whose values can be listed; of an interval its two ends are checked."""
    result = []
    for override in swept:
        if override.is_interval_sweep():
            interval = override.value()
            override = copy.copy(override)
            ends = [interval.start, interval.end]  # type: ignore[union-attr]
            override.value_type, override._value = _choice_of(ends)
        result.append(override)
    return result


def _choice_of(values: list[Any]) -> tuple[Any, Any]:
    from hydra.core.override_parser.types import ChoiceSweep, ValueType

    return ValueType.CHOICE_SWEEP, ChoiceSweep(list=values)


def _set(data: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for name in parents:
        data = data[name]
    data[last] = value


def _with_jobs(problem: str, names: list[str], num_jobs: int) -> str:
    if len(names) == num_jobs:
        return problem
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{problem} (in {names[0]}{more})"
