"""The rules of the group `data`: where rows come from, their columns and template. Imports no torch."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

from launcher.base.errors import not_allowed
from launcher.config.schema import did_you_mean, near_miss
from launcher.config.settings import (
    DATA_COLUMNS,
    DATA_SUFFIX,
    DataConfig,
    RunConfig,
    expand_files,
    is_day,
    no_files_text,
)
from launcher.config.templates import template_problem

SOURCE_KEYS = ("train_files", "dataset_name", "dataset_config", "train_split", "weight")
"""Of an entry of `data.sources`."""


def data_problems(config: RunConfig) -> Iterator[str]:
    data = config.data
    yield from source_problems(data)
    if isinstance(data.eval_split, float) and not 0 < data.eval_split < 1:
        yield f"data.eval_split as a fraction must lie between 0 and 1 (got {data.eval_split})"
    yield from _column_problems(data)
    template = data.chat_template
    if template and re.search(r"\.(jinja2?|j2|txt)$", template) and not Path(template).expanduser().is_file():
        yield f"data.chat_template={template} does not exist (looked in {Path.cwd()})"
    elif template and (problem := template_problem(template)):
        yield problem
    yield from _date_problems(data.chat_template_date)
    for key, value in (("data.generator", data.generator), ("eval.metric", config.eval.metric)):
        if value and not isinstance(value.get("_target_"), str):
            yield f"{key} needs a `_target_`: the import path of a class. Set {key}._target_=PACKAGE.MODULE.CLASS"


def evaluating(data: DataConfig) -> str:
    """The overrides that switch evaluation on, with data for it where there are none yet."""
    has_data = data.eval_files or data.eval_split or data.generator
    return "eval.eval_strategy=steps" + ("" if has_data else " data.eval_split=0.01")


def source_problems(data: DataConfig) -> Iterator[str]:
    """What is wrong with the names of files and splits, and with the entries of `data.sources`."""
    given = [key for key in ("train_files", "dataset_name", "sources", "generator") if getattr(data, key)]
    if not given:
        yield "no training data. Set data.train_files=[FILE.jsonl], data.dataset_name=ORG/NAME or data=arithmetic"
    elif len(given) > 1:
        yield (
            f"{' and '.join('data.' + key for key in given)} are set together; they are alternatives. "
            "To mix several, use data.sources"
        )
    yield from _missing_files("data.train_files", data.train_files)
    yield from _missing_files("data.eval_files", data.eval_files)
    yield from _mixture_problems(data)
    yield from _eval_split_problems(data)


def _eval_split_problems(data: DataConfig) -> Iterator[str]:
    if data.eval_split is not None and data.eval_files:
        yield "data.eval_files and data.eval_split are both set. Set data.eval_split=null"
    elif isinstance(data.eval_split, str) and not data.dataset_name:
        yield (
            f"data.eval_split={data.eval_split} names a split, which needs data.dataset_name. "
            "Set a fraction (data.eval_split=0.01) or data.eval_files=[FILE]"
        )


def _date_problems(day: str | None) -> Iterator[str]:
    if day is not None and not is_day(day):
        yield f"data.chat_template_date must be a day as YYYY-MM-DD (got {day}): data.chat_template_date={date.today()}"


def _column_problems(data: DataConfig) -> Iterator[str]:
    """Also: which turns bear loss."""
    for ours, theirs in data.columns.items():
        if ours not in DATA_COLUMNS:
            hint = did_you_mean(ours, DATA_COLUMNS) or f" Valid: {', '.join(DATA_COLUMNS)}."
            yield f"data.columns.{ours} is no name of ours; it is data.columns.OURS=YOURS.{hint}"
        elif not isinstance(theirs, str) or not theirs:
            yield f"data.columns.{ours} must be the name of a column (got {theirs!r})"
    if data.completion_only_loss is False and data.loss_on != "all_assistant_turns":
        yield (
            f"data.loss_on={data.loss_on} and data.completion_only_loss=false contradict each other: the one learns "
            "from one turn, the other from the whole text. Set data.completion_only_loss=null"
        )


def _missing_files(key: str, names: Any) -> Iterator[str]:
    for name in [names] if isinstance(names, str) else names or []:
        try:
            found = expand_files([str(name)])
        except PermissionError as error:
            yield f"{key}: {not_allowed(error.filename)}"
            continue
        if not found:
            yield f"{key}: {no_files_text(str(name))}"
        elif (closed := next((path for path in found if not os.access(path, os.R_OK)), None)) is not None:
            yield f"{key}: {not_allowed(closed)}"
        elif not DATA_SUFFIX.search(str(name)) and not Path(str(name)).expanduser().is_dir():
            yield f"{key}: {name} must be a .jsonl, .ndjson, .json, .csv or .parquet (.gz, .zst), or a folder of such"


def _mixture_problems(data: DataConfig) -> Iterator[str]:
    for i, source in enumerate(data.sources):
        key = f"data.sources[{i}]"
        unknown = [str(name) for name in source if name not in SOURCE_KEYS]
        for name in unknown:
            hint = did_you_mean(name, SOURCE_KEYS) or f" Valid: {', '.join(SOURCE_KEYS)}."
            yield f"{key}.{name} is not a setting.{hint}"
        is_mistyped = any(near_miss(name, SOURCE_KEYS) in ("train_files", "dataset_name") for name in unknown)
        if bool(source.get("train_files")) == bool(source.get("dataset_name")) and not is_mistyped:
            yield f"{key} needs either train_files or dataset_name (got {', '.join(source) or 'nothing'})"
        yield from _missing_files(f"{key}.train_files", source.get("train_files"))
        weight = source.get("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
            yield f"{key}.weight must be a number above 0 (got {weight!r})"
