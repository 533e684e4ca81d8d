"""The date that a chat template prints: Llama 3.2's, gpt-oss's and others say what day it is.

Taken from the clock it would change what is trained on over midnight. So it is fixed at the first start of a run, and
kept by it.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from datetime import date, datetime, time
from typing import Any

from launcher.config.settings import DataConfig, RunConfig

CLOCK = "strftime_now"
"""transformers' function of templates."""
_CALL = re.compile(rf"\b{CLOCK}\(\s*(?:format\s*=\s*)?(['\"])(.*?)\1\s*\)")


def clock(day: str) -> Callable[[str], str]:
    """`strftime_now` on a day (YYYY-MM-DD), at midnight."""
    now = datetime.combine(date.fromisoformat(day), time())

    def strftime_now(format: str) -> str:
        return now.strftime(format)

    return strftime_now


def uses_date(tokenizer: Any) -> bool:
    """Whether any of the tokenizer's chat templates asks what day it is."""
    template = tokenizer.chat_template
    return any(CLOCK in text for text in (template.values() if isinstance(template, dict) else [template or ""]))


def template_date(data: DataConfig, tokenizer: Any) -> str | None:
    """The day that the templates print: `data.chat_template_date`, or today; None where they print none."""
    return (data.chat_template_date or date.today().isoformat()) if uses_date(tokenizer) else None


def with_template_date(config: RunConfig, tokenizer: Any, kept: str | None = None) -> RunConfig:
    """The config with that day written out, so that all that follows is of one day.

    Args:
        kept: the day of an earlier start of the run, which holds where the settings name none.
    """
    data = config.data
    day = template_date(dataclasses.replace(data, chat_template_date=data.chat_template_date or kept), tokenizer)
    return (
        config if day is None else dataclasses.replace(config, data=dataclasses.replace(data, chat_template_date=day))
    )


def stop_clock(tokenizer: Any, day: str) -> None:
    """Prompts that are made with `tokenizer.apply_chat_template` print that day, too. What is saved does not change.

    In the text of the template, since transformers hands it no functions; where the format is written out, as in all
    templates seen.
    """
    get, strftime_now = tokenizer.get_chat_template, clock(day)

    def get_chat_template(*args: Any, **kwargs: Any) -> Any:
        return _CALL.sub(lambda call: json.dumps(strftime_now(call[2])), get(*args, **kwargs))

    tokenizer.get_chat_template = get_chat_template


def notice(data: DataConfig, tokenizer: Any) -> list[str]:
    """What is said about the day before the first step."""
    day = template_date(data, tokenizer)
    if day is not None:
        return [f"the chat template prints the date: {day} in this run (data.chat_template_date)"]
    if data.chat_template_date is not None:
        return [f"data.chat_template_date={data.chat_template_date} has no effect: the chat template prints no date"]
    return []
