"""What a user types after a verb, override by override: which are good, and what is wrong with the others.

Each override is looked at on its own first, so that one mistake does not hide the next. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from launcher.base.secrets import is_secret, refusal
from launcher.config.hints import choice_hint, theirs_to_ours, typed
from launcher.config.sbatch import is_option
from launcher.config.schema import did_you_mean, is_open, near_miss, valid_keys
from launcher.config.settings import RunConfig

_KEY = re.compile(r"[+~]{0,2}[\w@/:]+(-+\w+)*(\.\w+(-+\w+)*)*", re.ASCII)
"""What can stand before the = of an override."""

_SLURM_TIMES = ("launch.sbatch.time", "launch.sbatch.time-min", "launch.sbatch.time_min")
_OFF_CHOICES = ("off", "no", "none")
"""What a group's choice is called where YAML made False of it."""


class Groups:
    """The config groups on the search path and their choices."""

    def __init__(self, loader: ConfigLoaderImpl) -> None:
        self.loader = loader

    @functools.cached_property
    def names(self) -> list[str]:
        """All of them but Hydra's own; walks the folders, so only for a message."""
        return [name for name in self._walk("") if name.partition("/")[0] != "hydra"]

    def _walk(self, parent: str) -> Iterator[str]:
        prefix = f"{parent}/" if parent else ""
        for name in self.loader.get_group_options(parent, ObjectType.GROUP):
            yield prefix + name
            yield from self._walk(prefix + name)

    def choices(self, group: str) -> list[str]:
        return sorted(self.loader.get_group_options(group, ObjectType.CONFIG))

    def is_group(self, name: str) -> bool:
        return name != "hydra" and self.loader.repository.group_exists(name)


@dataclass
class Checked:
    """The good overrides and what is wrong with the others.

    Attributes:
        parsed: the good ones.
        texts: the same as Hydra takes them.
        bad_keys: settings that the others were about, as far as one can tell.
    """

    parsed: list[Override] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    bad_keys: set[str] = field(default_factory=set)

    @property
    def keys(self) -> list[str]:
        """The settings and groups that the good ones are about."""
        return [override.key_or_group for override in self.parsed]


_SPECIAL_TOKEN = re.compile(r"([^=]+)=(<[^\"\\\\]+>)")
"""A special token of a tokenizer as a value: model.eos_token=<|im_end|>."""


def parse_override(text: str) -> Override:
    """One override by Hydra's grammar.

    Raises:
        ValueError: with what is wrong and how to quote it.
    """
    if "=" not in text and not text.startswith("~"):
        raise ValueError(f"{text!r} is no override: KEY=VALUE is expected")
    if (token := _SPECIAL_TOKEN.fullmatch(text)) is not None:  # nothing else begins like that in Hydra's grammar
        text = f'{token[1]}="{token[2]}"'
    if not text.partition("=")[0].strip("+~ "):
        raise ValueError(f"{text!r} names no setting: KEY=VALUE is expected")
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException as error:
        key, _, value = text.partition("=")
        if not _KEY.fullmatch(key):
            raise ValueError(
                f"{key} in {text!r} is not a key: letters, digits, _, - inside a word, joined by dots"
            ) from error
        quoted = _quoted_value(value)
        reason = str(error).partition("\nSee https")[0].partition("\n")[0].strip()
        raise ValueError(
            f"{text!r} cannot be read: {reason}. Quote the value twice, for the shell and for Hydra: "
            + shlex.quote(f"{key}={quoted}")
        ) from error


def _quoted_value(value: str) -> str:
    """In quotes of Hydra's; a list item by item, so that it stays one."""
    if re.fullmatch(r"\[[^\[\]{}\"']*\]", value):
        return "[" + ",".join(_quoted_value(item.strip()) for item in value[1:-1].split(",")) + "]"
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def check(texts: Sequence[str], groups: Groups, *, is_sweep: bool = False) -> Checked:
    """Looks at every override on its own.

    Args:
        is_sweep: several values of one key are allowed.
    """
    checked = Checked()
    for text in texts:
        if problem := _secret_problem(text):
            checked.problems.append(problem)
            continue
        try:
            override = parse_override(text)
        except ValueError as error:
            checked.problems.append(str(error))
            checked.bad_keys.add(text.partition("=")[0].lstrip("+~"))
            continue
        override.config_loader = groups.loader
        problem, meant = _problem(override, groups, is_sweep)
        if problem:
            checked.problems.append(problem)
            checked.bad_keys |= {key for key in (meant, override.key_or_group) if key}
        else:
            checked.texts.append(_as_hydra_takes_it(override, groups))
            checked.parsed.append(override)
    return checked


def _secret_problem(text: str) -> str:
    """Looked for before anything else, so that no other message repeats it."""
    key, _, value = text.lstrip("+~").partition("=")
    return refusal(key) if is_secret(key, value) else ""


def _problem(override: Override, groups: Groups, is_sweep: bool) -> tuple[str, str | None]:
    """What is wrong with an override, else '', and the key that was probably meant."""
    key, text = override.key_or_group, override.input_line or ""
    if override.is_sweep_override() and not is_sweep:
        value = text.partition("=")[2]
        return (
            f"{text!r} gives several values. To run each of them: launcher train -m; "
            f"for one list: {shlex.quote(f'{key}=[{value}]')}; for one text: " + shlex.quote(f'{key}="{value}"'),
            key,
        )
    if key.startswith("hydra.") or override.package is not None:
        return "", None  # Hydra's own
    if is_choice(override, groups):
        return _choice_problem(override, groups), None
    if "/" in key:
        shown = [*groups.names, "hydra/launcher", "hydra/sweeper"]
        return f"{key} is not a group.{did_you_mean(key, shown)} Valid: {', '.join(sorted(shown))}", None
    keys = valid_keys(RunConfig)
    if override.is_delete() and key in keys:
        setting = f"{key}.KEY" if dataclasses.is_dataclass(keys[key]) else key
        return (
            f"{text} would only bring the built-in defaults back. Set {setting}=VALUE; KEY=[] empties a list, "
            "KEY={} a mapping"
        ), key
    if dataclasses.is_dataclass(keys.get(key)) and not (isinstance(override.value(), dict) or override.is_delete()):
        return f"{key} is a group of settings, not one. Set {key}.KEY=VALUE", key
    if key in keys or any(is_open(hint) and key.startswith(f"{name}.") for name, hint in keys.items()):
        return "", None
    parent = key.rpartition(".")[0]
    if "." in parent and parent in keys:
        return f"{key}: {parent} is one setting and has none below it", parent
    return _unknown(override, {**keys, **dict.fromkeys(groups.names)})


def _unknown(override: Override, keys: dict[str, Any]) -> tuple[str, str | None]:
    """A key that is none, and the one that was probably meant."""
    key, value = override.key_or_group, (override.input_line or "").partition("=")[2]
    leaf = key.rpartition(".")[2]
    what = f"{key} is not a setting (got {value})"
    open_keys = [name for name, hint in keys.items() if is_open(hint)]
    hint = theirs_to_ours(leaf, value, keys, open_keys)
    if hint is not None:
        return f"{what}. {hint}", hint.overrides[0].partition("=")[0] if hint.overrides else None
    if key in (leaf, f"launch.{leaf}") and is_option(leaf) and leaf != "output":
        return f"{what}. Did you mean {typed(f'launch.sbatch.{leaf}={value}')}?", f"launch.sbatch.{leaf}"
    same_leaf = [name for name in keys if name.rpartition(".")[2] == leaf and name != key]
    meant = near_miss(key, keys)
    if same_leaf and (meant is None or "." not in key or meant not in same_leaf):
        return f"{what}. Did you mean {' or '.join(typed(f'{name}={value}') for name in same_leaf)}?", same_leaf[0]
    if meant is None:
        by_leaf = {name.rpartition(".")[2]: name for name in keys}
        meant_leaf = near_miss(leaf, by_leaf)
        meant = by_leaf[meant_leaf] if meant_leaf else None
    if meant is None:
        parent = key.rpartition(".")[0]
        valid = sorted(k for k in keys if k.rpartition(".")[0] == parent) or sorted(k for k in keys if "." not in k)
        return f"{what}. Valid: {', '.join(valid)}", None
    return f"{what}. Did you mean {typed(f'{meant}={value}')}?", meant


def is_choice(override: Override, groups: Groups) -> bool:
    """Whether the override picks a group's choice (rather than setting a value)."""
    return groups.is_group(override.key_or_group) and not isinstance(override.value(), dict)


def _choice_problem(override: Override, groups: Groups) -> str:
    group, value = override.key_or_group, override.value()
    if override.is_delete() or value is None:
        return ""
    choices = groups.choices(group)
    names: list[str]
    if override.is_sweep_override():
        names = [text.strip("'\"") for text in override.sweep_string_iterator()] if override.is_choice_sweep() else []
    else:
        names = [str(v) for v in value] if isinstance(value, list) else [choice_name(value, choices)]
    for name in names:
        if name not in choices:
            meant = near_miss(name.lower(), choices)
            setting = choice_hint(group, name) or (f"{group}={meant}" if meant else None)
            hint = f" Did you mean {typed(setting)}?" if setting else ""
            return f"{group}={name} is not a choice.{hint} Valid: {', '.join(choices)}"
    return ""


def choice_name(value: Any, choices: Sequence[str]) -> str:
    """The choice that a value names; YAML turns `off` and `no` into False."""
    if value is False:
        return next((name for name in _OFF_CHOICES if name in choices), "off")
    return str(value)


def _as_hydra_takes_it(override: Override, groups: Groups) -> str:
    """New keys of open groups without `+`: what is valid was checked against the schema already."""
    text = override.input_line or ""
    if override.is_delete() or override.is_hydra_override() or override.package is not None:
        return text
    if not is_choice(override, groups):
        if override.key_or_group in _SLURM_TIMES and type(override.value()) is int:
            return f"++{override.key_or_group}='{override.value()}'"  # minutes, as for sbatch: no YAML has read it
        if override.value() == {} and override.key_or_group in valid_keys(RunConfig):
            return f"++{override.key_or_group}=null"  # Hydra merges groups: {} would clear nothing
        return "++" + text.lstrip("+")
    if override.value() is False:
        return f"{override.key_or_group}={choice_name(False, groups.choices(override.key_or_group))}"
    return text.lstrip("+")
