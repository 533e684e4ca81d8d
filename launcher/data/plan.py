"""Which sources the settings name, before anything of them is read."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from launcher.base.errors import ConfigError
from launcher.config.schema import did_you_mean
from launcher.config.settings import DataConfig, expand_files, no_files_text
from launcher.data.sources import FileSource, GeneratorSource, HubSource, Source

_SOURCE_KEYS = ("train_files", "dataset_name", "dataset_config", "train_split", "generator", "weight")


@dataclass(frozen=True)
class DataPlan:
    train: list[Source]
    weights: list[float] | None  # shares of the samples; None: every row once
    eval: Source | None
    eval_fraction: float | None


def data_plan(data: DataConfig) -> DataPlan:
    """Raises: ConfigError, with everything that is wrong."""
    problems: list[str] = []
    weights: list[float] | None = None
    if data.sources:
        train = [_source(entry, f"data.sources[{i}]", problems) for i, entry in enumerate(data.sources)]
        weights = _weights(data.sources)
    else:
        own = {f.name: getattr(data, f.name) for f in fields(data) if f.name in _SOURCE_KEYS}
        train = [_source({key: value for key, value in own.items() if value}, "data", problems)]
    eval_source, eval_fraction = _evaluation(data, problems)
    if problems:
        raise ConfigError(problems)
    return DataPlan([source for source in train if source], weights, eval_source, eval_fraction)


def _source(entry: dict[str, Any], key: str, problems: list[str]) -> Source | None:
    for name in entry:
        if name not in _SOURCE_KEYS:
            hint = did_you_mean(name, _SOURCE_KEYS) or f" Valid: {', '.join(_SOURCE_KEYS)}."
            problems.append(f"{key}.{name} is not a setting.{hint}")
    given = [name for name in ("train_files", "dataset_name", "generator") if entry.get(name)]
    if len(given) != 1:
        problems.append(f"{key} needs exactly one of train_files, dataset_name and generator (got {given or 'none'})")
        return None
    if given == ["generator"]:
        return GeneratorSource(entry["generator"], "train")
    if given == ["dataset_name"]:
        return HubSource(entry["dataset_name"], entry.get("dataset_config"), entry.get("train_split") or "train")
    return _file_source(entry["train_files"], f"{key}.train_files", problems)


def _file_source(names: Any, key: str, problems: list[str]) -> FileSource:
    names = [names] if isinstance(names, str) else list(names)
    missing = [name for name in names if not expand_files([name])]
    problems += [f"{key}: {no_files_text(name)}" for name in missing]
    return FileSource(tuple(expand_files(names)))


_EVALUATION = re.compile(r"(?:^|[^a-z])(?:test|testing|eval|evaluation|val|valid|validation|dev)(?:$|[^a-z])")


def file_notices(data: DataConfig) -> Iterator[str]:
    """What may not be meant about the files that are trained on: held-out ones among them, or one twice."""
    entries = [(f"data.sources[{i}].train_files", entry.get("train_files")) for i, entry in enumerate(data.sources)]
    for key, names in [("data.train_files", data.train_files), *entries]:
        names = [names] if isinstance(names, str) else list(names or ())
        found = [path for name in names if not Path(name).expanduser().is_file() for path in expand_files([name])]
        held_out = [path for path in found if _EVALUATION.search("/".join(path.parts[-2:]).lower())]
        if held_out and len(held_out) < len(found):
            yield (
                f"{key}: {len(held_out)} of {len(found)} files found are trained on although they are named like data "
                f"for evaluation, the first: {held_out[0]}. To leave them out, name the others"
            )
        paths = [path.resolve() for path in expand_files(names)]
        if twice := [path for path, count in Counter(paths).items() if count > 1]:
            yield f"{key} names {twice[0]} {paths.count(twice[0])} times: its rows are trained on as often"
        evaluated = {path.resolve() for path in expand_files(data.eval_files)}
        if both := sorted(evaluated.intersection(paths)):
            yield f"{both[0]} is in {key} and in data.eval_files: what is evaluated on is trained on"


def _weights(entries: list[dict[str, Any]]) -> list[float] | None:
    """Each source's share of the samples, 1 where only others have one; None where none has."""
    if all(entry.get("weight") is None for entry in entries):
        return None
    return [float(entry.get("weight") or 1.0) for entry in entries]


def _evaluation(data: DataConfig, problems: list[str]) -> tuple[Source | None, float | None]:
    split = data.eval_split
    if data.eval_files:
        if split is not None:
            problems.append("data.eval_files and data.eval_split are both set. Set data.eval_split=null")
        return _file_source(data.eval_files, "data.eval_files", problems), None
    if isinstance(split, float):
        return None, split
    if isinstance(split, str):
        if not data.dataset_name:
            problems.append(
                f"data.eval_split={split} names a split, which needs data.dataset_name. "
                "Set a fraction (data.eval_split=0.01) or data.eval_files=[FILE]"
            )
            return None, None
        return HubSource(data.dataset_name, data.dataset_config, split), None
    return (GeneratorSource(data.generator, "eval") if data.generator else None), None
