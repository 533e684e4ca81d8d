"""torch's optimizers by their short names, and a preset's arguments, which go with its optimizer. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from launcher.config.schema import near_miss
from launcher.config.settings import RunConfig

SHORT_NAMES = (
    "ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "LBFGS", "Muon", "NAdam", "RAdam", "RMSprop",
    "Rprop", "SGD", "SparseAdam",
)  # fmt: skip


def full_name(name: str) -> str:
    """`AdamW` is torch.optim.AdamW; an import path stays as it is."""
    known = {short.lower(): short for short in SHORT_NAMES}
    return f"torch.optim.{known[name.lower()]}" if name.lower() in known else name


def optimizer_problems(config: RunConfig) -> Iterator[str]:
    name = config.optim.name
    if "." in name:
        yield from _beta_problems(name, config.optim.kwargs)
        return
    meant = near_miss(name.lower(), [short.lower() for short in SHORT_NAMES])
    hint = f" Did you mean optim.name={full_name(meant)}?" if meant else ""
    yield f"optim.name={name} is no import path of a class.{hint} Valid: PACKAGE.MODULE.CLASS, {', '.join(SHORT_NAMES)}"


def _beta_problems(name: str, kwargs: Mapping[str, Any]) -> Iterator[str]:
    """torch's optimizers take two; others may take three (Adan, CAME)."""
    betas = kwargs.get("betas")
    if betas is None or not name.startswith("torch.optim."):
        return
    is_right = (
        isinstance(betas, list) and len(betas) == 2 and all(type(b) in (int, float) and 0 <= b < 1 for b in betas)
    )
    if not is_right:
        yield (
            f"optim.kwargs.betas must be two numbers from 0 to below 1 (got {betas!r}). "
            "The default is 'optim.kwargs.betas=[0.9,0.999]'"
        )


def left_over_arguments(preset: Mapping[str, Any], optim: Mapping[str, Any], named: Collection[str]) -> list[str]:
    """Arguments that came with a preset whose optimizer another one has replaced.

    Args:
        preset: the chosen file of conf/optim.
        optim: what was composed.
        named: arguments that the user set.
    """
    if full_name(str(optim.get("name"))) == full_name(str(preset.get("name"))):
        return []
    theirs, ours = preset.get("kwargs") or {}, optim.get("kwargs") or {}
    return [name for name, value in theirs.items() if name not in named and name in ours and ours[name] == value]
