"""config.yaml: what a run was started with, and what a later start of it goes on with."""

from __future__ import annotations

from typing import Any

import yaml

from launcher.base import files
from launcher.base.paths import RunPaths
from launcher.base.processes import Processes
from launcher.checkpoint.resume import ResumePoint
from launcher.config.settings import RunConfig, is_day, to_dict
from launcher.data import stop_clock, template_date, with_template_date

DAY = "data.chat_template_date"


def write_settings(config: RunConfig, paths: RunPaths) -> None:
    """What the run was started with, and what a later start of a finished run is compared with."""
    text = yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)
    files.replace_file(paths.config, text.encode(), mode=0o600)


def of_one_day(
    config: RunConfig, tokenizer: Any, point: ResumePoint | None, paths: RunPaths, processes: Processes
) -> RunConfig:
    """The config with the day that the chat template prints, the same for as long as the run lasts. Collective.

    A start that ended before its first checkpoint left the day in config.yaml: its tokens are in the cache. Jobs of a
    sweep all have the day of its first start, or those after midnight would not be comparable.
    """

    def agree() -> str | None:
        kept = point.state["settings"].get(DAY) if point is not None else None
        if kept is None and config.checkpoint.resume_from_checkpoint != "never":
            kept = _day_of_earlier_start(paths)
        if kept is None:
            kept = _day_of_sweep(paths)
        settled = with_template_date(config, tokenizer, kept)
        day = template_date(settled.data, tokenizer)
        if day is not None and point is None:
            write_settings(settled, paths)  # before hours of tokenising
        return day

    day: str | None = processes.on_main(agree)
    if day is None:
        return config
    stop_clock(tokenizer, day)
    return with_template_date(config, tokenizer, day)


def _day_of_earlier_start(paths: RunPaths) -> str | None:
    try:
        day = yaml.safe_load(files.read_text(paths.config))["data"]["chat_template_date"]
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):  # none yet, or not ours
        return None
    return day if isinstance(day, str) and is_day(day) else None


def _day_of_sweep(paths: RunPaths) -> str | None:
    """Of that which the run is a job of, as `sweep.jobs.SweepTable` writes it."""
    try:
        table = files.read_json_or(paths.sweep_table, {})
        day = table["info"]["first_day"] if paths.root.name in table["jobs"] else None
    except (TypeError, KeyError):  # no sweep, one of an earlier version, or not ours
        return None
    return day if isinstance(day, str) and is_day(day) else None
