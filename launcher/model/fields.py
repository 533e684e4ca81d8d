"""Fields of `model.config` that transformers' config does not have. It keeps them, and the model never reads them."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from launcher.base.errors import ConfigError

_IS_MISTYPED = 0.8
"""Of difflib. A model may read a field that its config class does not declare: only what looks like a slip of the
keyboard is refused."""


@dataclass(frozen=True)
class _UnknownField:
    key: str
    kind: str
    meant: str | None


def refuse_mistyped_fields(fields: Mapping[str, Any], model_config: Any) -> None:
    """
    Args:
        fields: `model.config` as it was given.
        model_config: what transformers made of them.

    Raises:
        ConfigError: some are a slip of the keyboard away from one that the config class has.
    """
    mistyped = [
        f"{field.key} is no field of {field.kind}, which would pass over it. "
        f"Did you mean {field.key.rpartition('.')[0]}.{field.meant}?"
        for field in _unknown_fields(fields, model_config, "model.config")
        if field.meant
    ]
    if mistyped:
        raise ConfigError(mistyped)


def unknown_fields_notice(fields: Mapping[str, Any], model_config: Any) -> str | None:
    """What to say of the others; None: there are none."""
    unknown = list(_unknown_fields(fields, model_config, "model.config"))
    if not unknown:
        return None
    keys = ", ".join(field.key for field in unknown)
    return f"{keys}: no field of {unknown[0].kind}, and without effect unless the model's code asks for it"


def _unknown_fields(fields: Mapping[str, Any], model_config: Any, prefix: str) -> Iterator[_UnknownField]:
    kind = type(model_config)
    known = _known_fields(kind)
    kept = vars(model_config)  # older names are translated, and not among them
    for name, value in fields.items():
        inner = kept.get(name)
        if isinstance(value, Mapping) and hasattr(inner, "model_type"):
            yield from _unknown_fields(value, inner, f"{prefix}.{name}")
        elif name in kept and name not in known and not name.startswith("_"):
            close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=_IS_MISTYPED)
            yield _UnknownField(f"{prefix}.{name}", kind.__name__, close[0] if close else None)


def _known_fields(kind: Any) -> set[str]:
    """Declared ones (by either form of a config class), other names of them, and what it sets by itself."""
    known = {"model_type", *kind.attribute_map}
    with contextlib.suppress(Exception):  # some cannot be made of nothing
        known |= set(vars(kind()))
    if dataclasses.is_dataclass(kind):
        known |= {field.name for field in dataclasses.fields(kind)}
    for one in kind.__mro__:
        known |= set(inspect.signature(one.__init__).parameters)
    return known
