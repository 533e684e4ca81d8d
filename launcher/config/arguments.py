"""The words behind a verb that composes: overrides, and where else configs are. Without Hydra, which takes long to
import."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from launcher.base.errors import UserError
from launcher.config.hints import choice_hint, theirs_to_ours, typed
from launcher.config.schema import is_open, near_miss, valid_keys
from launcher.config.settings import RunConfig

_OPTIONS = ("--config-dir DIR", "--config-file FILE")


@dataclass(frozen=True)
class Arguments:
    """What a verb that composes takes: overrides, and where else to look for configs."""

    overrides: tuple[str, ...]
    config_dir: str | None = None
    config_file: str | None = None


def split_arguments(argv: Sequence[str], valid: Sequence[str] = _OPTIONS) -> Arguments:
    """Takes `--config-dir DIR` and `--config-file FILE` out of the overrides, wherever they stand.

    Args:
        valid: what a message names as the options there are; a verb takes its own out before.

    Raises:
        UserError: another option, or one without its value.
    """
    overrides: list[str] = []
    options: dict[str, str] = {}
    rest = list(argv)
    while rest:
        text = rest.pop(0)
        if not text.startswith("-"):
            overrides.append(text)
            continue
        name, equals, value = text.partition("=")
        if name in ("-m", "--multirun"):
            raise UserError(f"{name} starts an accelerate launch of its own for every job: launcher train {name} …")
        if name not in ("--config-dir", "--config-file", "-cd"):
            meant = meant_by_option(name, value or "VALUE")
            raise UserError(f"{name} is not an option here.{meant} Valid: {', '.join(valid)}, KEY=VALUE …")
        if not equals and not rest:
            raise UserError(f"{name} needs a value")
        options["--config-dir" if name == "-cd" else name] = value if equals else rest.pop(0)
    return Arguments(tuple(overrides), options.get("--config-dir"), options.get("--config-file"))


def meant_by_option(name: str, value: str) -> str:
    """' Did you mean KEY=VALUE?' for `--max_steps`, a setting written as other tools take them; else ''."""
    keys: dict[str, Any] = valid_keys(RunConfig)
    key = name.lstrip("-").replace("-", "_")
    open_keys = [open_key for open_key, hint in keys.items() if is_open(hint)]
    hint = theirs_to_ours(key.rpartition(".")[2], value, keys, open_keys)
    if dataclasses.is_dataclass(keys.get(key)):  # a group: its choices have names of their own
        choice = choice_hint(key, value) or (None if hint else f"{key}=CHOICE")
        return f" Did you mean {typed(choice)}?" if choice else f" {hint}"
    if key in keys or (hint is None and any(key.startswith(f"{open_key}.") for open_key in open_keys)):
        return f" Did you mean {typed(f'{key}={value}')}?"
    if hint is not None:
        return f" {hint}"
    same_leaf = [full for full in keys if full.rpartition(".")[2] == key]
    by_leaf = {full.rpartition(".")[2]: full for full in keys}
    meant = same_leaf[0] if same_leaf else by_leaf.get(near_miss(key, by_leaf) or "")
    return f" Did you mean {typed(f'{meant}={value}')}?" if meant else ""
