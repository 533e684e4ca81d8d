"""What an optimizer keeps in its parameter groups and changes itself: Prodigy's distance, for example."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from launcher.checkpoint.segments import Segment
from launcher.checkpoint.snapshot import SAFETENSORS_NAMES, TORCH_DTYPES

_OF_OTHERS = {"params", "param_names", "lr", "initial_lr"}
"""The schedule's, and the parameters themselves."""
_MAX_ITEMS = 1024
"""Of a tensor or list: what is stored here is JSON."""


class GroupState:
    """The values in an optimizer's groups that differ from those that it began with, as JSON values.

    Settings that did not change are left out, so that a resume with others (`checkpoint.accept_changes`) keeps those.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._first = self._now()

    def moved(self) -> list[dict[str, Any]]:
        """By group; a group that nothing changed has an empty one."""
        pairs = zip(self._now(), self._first, strict=True)
        return [{k: v for k, v in now.items() if k not in first or v != first[k]} for now, first in pairs]

    def load(self, moved: list[dict[str, Any]]) -> None:
        """Makes the groups those that they began as, but for these values."""
        for group, first, now, loaded in zip(
            self._optimizer.param_groups, self._first, self.moved(), moved or [{} for _ in self._first], strict=False
        ):
            for key in now.keys() - first.keys():
                del group[key]
            for key, value in ({k: first[k] for k in now if k in first} | loaded).items():
                group[key] = _decoded(value, group.get(key))

    def _now(self) -> list[dict[str, Any]]:
        return [
            {k: _encoded(v) for k, v in g.items() if k not in _OF_OTHERS and is_kept(v)}
            for g in self._optimizer.param_groups
        ]


def tensor_kinds(segments: Iterable[Segment]) -> dict[str, dict[str, Any]]:
    """Of the states with one value per tensor, those that are tensors themselves, by name: dtype, and whether on the
    host. The value alone does not tell."""
    return {
        name: {"dtype": SAFETENSORS_NAMES[value.dtype], "is_on_host": value.device.type == "cpu"}
        for segment in segments
        for name, value in segment.scalars().items()
        if isinstance(value, Tensor)
    }


def is_kept(value: Any) -> bool:
    """Whether a checkpoint holds such a value of a group."""
    if isinstance(value, Tensor):
        return value.numel() <= _MAX_ITEMS and value.dtype in SAFETENSORS_NAMES and not value.is_complex()
    if isinstance(value, (list, tuple)):
        return len(value) <= _MAX_ITEMS and all(is_kept(v) for v in value)
    return value is None or isinstance(value, (bool, int, float, str))


def _encoded(value: Any) -> Any:
    if isinstance(value, Tensor):
        return {"tensor": _encoded(value.tolist()), "dtype": SAFETENSORS_NAMES[value.dtype]}
    if isinstance(value, tuple):
        return {"tuple": [_encoded(v) for v in value]}
    if isinstance(value, list):
        return [_encoded(v) for v in value]
    return {"float": str(value)} if isinstance(value, float) and not math.isfinite(value) else value


def _decoded(value: Any, before: Any) -> Any:
    """`before`: the value in its place, whose device a tensor takes."""
    if isinstance(value, list):
        return [_decoded(v, None) for v in value]
    if not isinstance(value, dict):
        return value
    if "float" in value:
        return float(value["float"])
    if "tuple" in value:
        return tuple(_decoded(v, None) for v in value["tuple"])
    device = before.device if isinstance(before, Tensor) else "cpu"
    return torch.tensor(_decoded(value["tensor"], None), dtype=TORCH_DTYPES[value["dtype"]], device=device)
