"""Which sources the settings name, before anything of them is read."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.base.errors import ConfigError
from launcher.config.data_rules import source_problems
from launcher.config.settings import DataConfig, expand_files
from launcher.data.sources import FileSource, GeneratorSource, HubSource, Source


@dataclass(frozen=True)
class DataPlan:
    train: list[Source]
    weights: list[float] | None  # shares of the samples; None: every row once
    eval: Source | None
    eval_fraction: float | None


def data_plan(data: DataConfig) -> DataPlan:
    """Raises: ConfigError, with everything that is wrong."""
    if problems := list(source_problems(data)):
        raise ConfigError(problems)
    entries: list[dict[str, Any]] = data.sources or [vars(data)]
    train = [_source(entry, data.generator) for entry in entries]
    weights = _weights(data.sources) if data.sources else None
    return DataPlan(train, weights, *_evaluation(data))


def _source(entry: Mapping[str, Any], generator: dict[str, Any]) -> Source:
    """Of `data.sources`, or what `data` itself names."""
    if entry.get("train_files"):
        return _file_source(entry["train_files"])
    if entry.get("dataset_name"):
        return HubSource(entry["dataset_name"], entry.get("dataset_config"), entry.get("train_split") or "train")
    return GeneratorSource(generator, "train")


def _file_source(names: str | list[str]) -> FileSource:
    return FileSource(tuple(expand_files([names] if isinstance(names, str) else list(names))))


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


def _evaluation(data: DataConfig) -> tuple[Source | None, float | None]:
    if data.eval_files:
        return _file_source(data.eval_files), None
    if isinstance(data.eval_split, float):
        return None, data.eval_split
    if isinstance(data.eval_split, str) and data.dataset_name:
        return HubSource(data.dataset_name, data.dataset_config, data.eval_split), None
    return (GeneratorSource(data.generator, "eval") if data.generator else None), None
