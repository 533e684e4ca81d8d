"""Plain data → a checked RunConfig."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from launcher.base.errors import ConfigError
from launcher.config.optimizers import full_name
from launcher.config.rules import contradictions
from launcher.config.schema import Parser
from launcher.config.settings import RunConfig


def parse_config(data: dict[str, Any], explicit: Collection[str] = (), bad_keys: Collection[str] = ()) -> RunConfig:
    """Checks plain (resolved) data against the schema and the rules between settings.

    Args:
        explicit: keys that the user set for this very run; of some settings only these are held to be meant.
        bad_keys: settings that are known to be wrong already.

    Raises:
        ConfigError: with every problem found.
    """
    data = _with_full_names(data)
    parser = Parser()
    config = parser.parse(RunConfig, data)
    unclear = {*parser.bad_keys, *bad_keys}
    broken = [p for p in contradictions(config, explicit) if not any(_names(p, key) for key in unclear)]
    if problems := [*parser.problems, *broken]:
        raise ConfigError(problems)
    return config


def _with_full_names(data: dict[str, Any]) -> dict[str, Any]:
    optim = data.get("optim")
    if not isinstance(optim, dict) or not isinstance(optim.get("name"), str):
        return data
    return {**data, "optim": {**optim, "name": full_name(optim["name"])}}


def _names(problem: str, key: str) -> bool:
    """Whether a broken rule reads a setting: one that is wrong in itself holds its default, which nobody asked for."""
    after = r"(?!\w)" if "." in key else "[.=]"
    return re.search(rf"(?<![\w.]){re.escape(key)}{after}", problem) is not None
