"""Where each strategy keeps its state: which elements of which parameter this process holds, and in which tensor.

A checkpoint stores every parameter's master weight and every optimizer state under the parameter's name and in its
full shape. The strategies differ only in which ranges of those tensors a process holds, so writing and reading for any
number of processes and any ZeRO stage is the same walk over ranges, without a gather and without a conversion.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Extent:
    """Elements [start, start + numel) of a parameter (C order), at `offset` in a segment's flat tensors."""

    param: str
    start: int
    numel: int
    offset: int


@dataclass(frozen=True)
class Segment:
    """A flat fp32 master tensor of this process, and the optimizer's states with the same element layout.

    `extents` is everything held; `owned` the part that this process writes, so that every element of the model is
    written by exactly one process.
    """

    master: Tensor
    optimizer: torch.optim.Optimizer
    group: int
    extents: tuple[Extent, ...]
    owned: tuple[Extent, ...]
    key: Tensor
    """The tensor under which the optimizer keeps the state: `master`, or the parameter that it is a view of."""

    @property
    def is_whole(self) -> bool:
        """Whether the optimizer sees the parameter itself, not a flat partition."""
        return self.key is not self.master

    @property
    def state(self) -> dict[str, Any]:
        """The optimizer's own state dict of this tensor; empty before the first step."""
        state: dict[str, Any] = self.optimizer.state[self.key]
        return state

    def elementwise(self) -> dict[str, Tensor]:
        """The states with one value per element (exp_avg, momentum_buffer, …), flat."""
        found = {}
        for name, value in self.state.items():
            if isinstance(value, Tensor) and value.dim() > 0 and value.numel() == self.master.numel():
                found[name] = value.detach().view(-1)
        return found

    def scalars(self) -> dict[str, float | int]:
        """The states with one value per tensor (step)."""
        found: dict[str, float | int] = {}
        for name, value in self.state.items():
            if isinstance(value, Tensor) and value.numel() == 1 and value.dim() == 0:
                found[name] = value.item()
            elif isinstance(value, (int, float)) and not isinstance(value, bool):
                found[name] = value
        return found

    def odd(self) -> dict[str, Tensor]:
        """States of another shape (Adafactor's rows and columns); stored whole by the owner of the first element."""
        whole = {**self.elementwise(), **self.scalars()}
        return {n: v.detach() for n, v in self.state.items() if isinstance(v, Tensor) and n not in whole}

    @property
    def signature(self) -> tuple[str, ...]:
        """Which states there are: none before the first step that was applied."""
        return tuple(sorted(self.state))


def is_elementwise(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer treats every element for itself, so that its state means the same however it is cut.

    Adafactor does not: it keeps rows and columns of a matrix, and scales by the norm of whatever it is given. Found by
    letting a new optimizer of the class make one step with a small matrix.
    """
    settings = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
    probe = torch.nn.Parameter(torch.ones(2, 3))
    probe.grad = torch.ones(2, 3)
    try:
        probed = type(optimizer)([{**settings, "params": [probe]}])  # type: ignore[call-arg]
        probed.step()
    except (TypeError, ValueError, RuntimeError):
        return True  # one that cannot be tried out, DeepSpeed's among them
    sizes = [v.numel() for v in probed.state[probe].values() if isinstance(v, Tensor) and v.dim()]
    return all(size == probe.numel() for size in sizes)


@dataclass(frozen=True)
class ParamInfo:
    """A trainable parameter: its name in named_parameters() (tied ones once), full shape, and optimizer group."""

    name: str
    shape: tuple[int, ...]
    group: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class TrainedState:
    """Everything of this process that an optimizer step changes."""

    params: tuple[ParamInfo, ...]
    segments: tuple[Segment, ...]
    optimizer: torch.optim.Optimizer
    partition: str
    """How the optimizer sees the parameters: `whole`, or which flat pieces of them."""
    forward: dict[str, Tensor] = field(default_factory=dict)
    """Parameters that every process holds whole beside the masters (ZeRO 1 and 2), by name."""


def collect(model: torch.nn.Module, optimizer: Any, *, rank: int, world_size: int) -> TrainedState:
    """Finds the state behind `accelerator.prepare`'s objects.

    Args:
        model: the prepared model: a DeepSpeed engine, a DDP wrapper or a plain module.
        optimizer: the prepared (wrapped) optimizer.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    module = getattr(model, "module", model)
    names = {id(p): n for n, p in module.named_parameters()}
    if hasattr(inner, "fp32_partitioned_groups_flat"):
        return _zero3(inner, names, rank, world_size)
    if hasattr(inner, "single_partition_of_fp32_groups"):
        return _zero12(inner, names, rank, world_size)
    return _replicated(inner, names, rank, world_size)


def _cut(params: list[tuple[ParamInfo, int]], low: int, high: int) -> tuple[Extent, ...]:
    """The parts of parameters (with their offsets in a flat space) that lie in [low, high), offsets relative to low."""
    found = []
    for info, offset in params:
        start, end = max(low, offset), min(high, offset + info.numel)
        if start < end:
            found.append(Extent(info.name, start - offset, end - start, start - low))
    return tuple(found)


def _zero12(optimizer: Any, names: dict[int, str], rank: int, world_size: int) -> TrainedState:
    infos, segments, forward = [], [], {}
    for i, master in enumerate(optimizer.single_partition_of_fp32_groups):
        layout = []
        for param, offset in zip(
            optimizer.round_robin_bit16_groups[i], optimizer.round_robin_bit16_offsets[i], strict=True
        ):
            info = ParamInfo(names[id(param)], tuple(param.shape), i)
            layout.append((info, offset))
            infos.append(info)
            forward[info.name] = param.detach()
        low = rank * master.numel()
        extents = _cut(layout, low, low + master.numel())
        segments.append(Segment(master, optimizer.optimizer, i, extents, extents, master))
    partition = f"zero1/zero2 x {world_size}"
    return TrainedState(_in_model_order(infos, names), tuple(segments), optimizer.optimizer, partition, forward)


def _zero3(optimizer: Any, names: dict[int, str], rank: int, world_size: int) -> TrainedState:
    infos, segments = [], []
    for i, master in enumerate(optimizer.fp32_partitioned_groups_flat):
        group, extents, offset = optimizer.sub_group_to_group_id[i], [], 0
        for param in optimizer.fp16_groups[i]:
            info = ParamInfo(names[id(param)], tuple(param.ds_shape), group)
            infos.append(info)
            size = param.ds_tensor.ds_numel  # of one process's shard, padded at the parameter's end
            start = rank * size
            numel = max(0, min(size, info.numel - start))
            if numel:
                extents.append(Extent(info.name, start, numel, offset))
            offset += size
        segments.append(Segment(master, optimizer.optimizer, group, tuple(extents), tuple(extents), master))
    return TrainedState(_in_model_order(infos, names), tuple(segments), optimizer.optimizer, f"zero3 x {world_size}")


def _replicated(optimizer: torch.optim.Optimizer, names: dict[int, str], rank: int, world_size: int) -> TrainedState:
    infos = []
    found: list[tuple[ParamInfo, Tensor]] = []
    for i, group in enumerate(optimizer.param_groups):
        for param in group["params"]:
            info = ParamInfo(names[id(param)], tuple(param.shape), i)
            infos.append(info)
            found.append((info, param))
    total, offset, segments = sum(i.numel for i in infos), 0, []
    low, high = rank * total // world_size, (rank + 1) * total // world_size
    for info, param in found:
        start, end = max(low, offset) - offset, min(high, offset + info.numel) - offset
        owned = (Extent(info.name, start, end - start, start),) if start < end else ()
        whole = (Extent(info.name, 0, info.numel, 0),)
        segments.append(Segment(param.detach().view(-1), optimizer, info.group, whole, owned, param))
        offset += info.numel
    return TrainedState(_in_model_order(infos, names), tuple(segments), optimizer, "whole")


def _in_model_order(infos: list[ParamInfo], names: dict[int, str]) -> tuple[ParamInfo, ...]:
    order = {name: i for i, name in enumerate(names.values())}
    return tuple(sorted(infos, key=lambda info: order[info.name]))


def persistent_buffers(module: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers that belong to the weights (those that state_dict() would hold)."""
    for prefix, child in module.named_modules():
        for name, buffer in child.named_buffers(recurse=False):
            if name not in child._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer.detach()
