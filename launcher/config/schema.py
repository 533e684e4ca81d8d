"""Typed dataclasses as a schema: what a setting may hold, and plain data checked against it, all errors at once."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import field
from typing import Any, TypeVar

T = TypeVar("T")


def opt(default: Any, doc: str, *, choices: tuple[str, ...] = (), minimum: float | None = None) -> Any:
    """A setting: its default, its meaning, and what is valid."""
    meta = {"doc": doc, "choices": choices, "minimum": minimum}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=meta)
    return field(default=default, metadata=meta)


def near_miss(name: str, valid: Iterable[str]) -> str | None:
    """What of the valid names was probably meant."""
    close = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.6)
    return close[0] if close else None


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    """Evaluating the annotations takes longer than everything else that is done with them."""
    return typing.get_type_hints(cls)


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """' Did you mean X?' for a near miss, else ''."""
    meant = near_miss(name, valid)
    return f" Did you mean {meant}?" if meant else ""


def valid_keys(cls: type, prefix: str = "") -> dict[str, Any]:
    """Every dotted key of the schema with its type; open dicts have type dict, groups their dataclass."""
    keys: dict[str, Any] = {}
    hints = _hints(cls)
    for f in dataclasses.fields(cls):
        key = f"{prefix}{f.name}"
        if dataclasses.is_dataclass(hints[f.name]):
            keys |= valid_keys(hints[f.name], f"{key}.")
        keys[key] = hints[f.name]
    return keys


def is_open(hint: Any) -> bool:
    """Whether a setting takes keys of the user's own."""
    return typing.get_origin(hint) is dict


class Parser:
    """Makes dataclasses of plain data.

    Attributes:
        problems: what is wrong, for the user to read.
        bad_keys: the settings that are wrong or meant by a mistyped key; they hold their defaults in the result.
    """

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.bad_keys: set[str] = set()

    def parse(self, cls: type[T], data: Any, prefix: str = "") -> T:
        if not isinstance(data, dict):
            key = prefix.rstrip(".")
            self._refuse(key, f"{key} is a group of settings (got {data!r}). Set {prefix}KEY=VALUE")
            return cls()
        hints = _hints(typing.cast(type, cls))
        fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        values: dict[str, Any] = {}
        for name, value in data.items():
            key = f"{prefix}{name}"
            if name not in hints:
                meant = near_miss(str(name), hints)
                hint = f"Did you mean {prefix}{meant}?" if meant else f"Valid: {', '.join(sorted(hints))}"
                self._refuse(f"{prefix}{meant}" if meant else None, f"{key} is not a setting. {hint}")
            elif dataclasses.is_dataclass(hints[name]):
                values[name] = self.parse(typing.cast(type, hints[name]), value, f"{key}.")
            else:
                value = _normalised(value, hints[name], fields[name].metadata)
                problem = _problem(key, value, hints[name], fields[name])
                if problem:
                    self._refuse(key, problem)
                else:
                    values[name] = value
        return cls(**values)

    def _refuse(self, key: str | None, problem: str) -> None:
        self.problems.append(problem)
        if key is not None:
            self.bad_keys.add(key)


def _kinds(hint: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    return typing.get_args(hint) if is_union else (hint,)


def _base(kind: Any) -> Any:
    return typing.get_origin(kind) or kind


def _normalised(value: Any, hint: Any, meta: Mapping[str, Any]) -> Any:
    """What users and YAML write, in the type of the setting."""
    bases = [_base(kind) for kind in _kinds(hint)]
    if value is False and "no" in meta["choices"]:  # YAML 1.1 reads `no` and `off` as False
        return "no"
    if value is False and "off" in meta["choices"]:
        return "off"
    if value is None and dict in bases:
        return {}
    if value is None and list in bases:
        return []
    if isinstance(value, str) and list in bases and str not in bases:
        return [value]
    if type(value) is int and float in bases and int not in bases:
        return float(value)
    if type(value) is int and str in bases and int not in bases and float not in bases:
        return str(value)  # run_name=7
    if isinstance(value, dict) and dict[str, str] in _kinds(hint):  # environment variables
        return {k: str(v).lower() if isinstance(v, bool) else str(v) if isinstance(v, (int, float)) else v
                for k, v in value.items()}  # fmt: skip
    if isinstance(value, list) and list in bases:
        (item,) = (typing.get_args(kind)[0] for kind in _kinds(hint) if _base(kind) is list)
        return [str(v) if item is str and type(v) in (int, float) else v for v in value]
    return value


def _problem(key: str, value: Any, hint: Any, setting: dataclasses.Field[Any]) -> str:
    """Why a setting cannot hold this value, else ''."""
    kinds = _kinds(hint)
    choices, minimum = setting.metadata["choices"], setting.metadata["minimum"]
    if choices and value is not None and value not in choices:
        return f"{key} must be one of {', '.join(choices)} (got {value!r}).{did_you_mean(str(value), choices)}"
    if not any(_fits(value, kind) for kind in kinds):
        names = " or ".join(_type_name(kind) for kind in kinds)
        mend = ""
        if str in kinds and isinstance(value, (bool, int, float)):
            mend = f""". Quote it: '{key}="{value}"'"""
        elif any(_base(kind) is dict for kind in kinds):
            mend = f". Set {key}.NAME=VALUE"
        elif any(_base(kind) is list for kind in kinds):
            mend = f'. Example: \'{key}=["A", "B"]\''
        else:
            mend = _default(key, setting)
        return f"{key} must be {names} (got {value!r}){mend}"
    if minimum is not None and isinstance(value, (int, float)) and not value >= minimum:
        return f"{key} must be at least {minimum:g} (got {value}){_default(key, setting)}"
    return ""


def _default(key: str, setting: dataclasses.Field[Any]) -> str:
    if setting.default is None:
        return f". The default is {key}=null"
    is_plain = isinstance(setting.default, (bool, int, float, str))
    return f". The default is {key}={str(setting.default).lower()}" if is_plain else ""


def _fits(value: Any, kind: Any) -> bool:
    if kind is Any:
        return True
    base = _base(kind)
    if base in (int, float) and isinstance(value, bool):
        return False
    if not isinstance(value, base):
        return False
    arguments = typing.get_args(kind)
    if base is list:
        return all(_fits(item, arguments[0]) for item in value)
    if base is dict:
        return all(isinstance(name, str) for name in value)
    return True


def _type_name(kind: Any) -> str:
    names = {
        int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null",
        list: "a list", dict: "a group of settings",
    }  # fmt: skip
    if _base(kind) is list and typing.get_args(kind):
        return {str: "a list of texts", dict: "a list of groups"}.get(_base(typing.get_args(kind)[0]), "a list")
    return names.get(_base(kind), str(kind))
