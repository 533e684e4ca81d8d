"""Where each strategy keeps its state: which elements of which parameter this process holds, and in which tensor.

To a reader a checkpoint stores every parameter's master weight and every optimizer state under the parameter's name and
in its full shape. The strategies differ only in which ranges of those tensors a process holds, so writing and reading
for any number of processes and any ZeRO stage is the same walk over ranges, without a gather and without a conversion.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from launcher.base import _deepspeed
from launcher.base._deepspeed import FlatMaster
from launcher.base.block_io import BLOCK_BYTES
from launcher.checkpoint.layout import Column, Partition


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
    partition: Partition | None = None
    """Where every parameter of the segment is cut among all processes (ZeRO-3): this process's row of it."""

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

    def scalars(self) -> dict[str, Tensor | float | int]:
        """The states with one value per tensor (step), where they are; `read_scalars` reads them."""
        found: dict[str, Tensor | float | int] = {}
        for name, value in self.state.items():
            is_scalar = isinstance(value, Tensor) and value.dim() == 0
            if is_scalar or (isinstance(value, (int, float)) and not isinstance(value, bool)):
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


def read_scalars(segments: Sequence[Segment]) -> list[dict[str, float | int]]:
    """`scalars` of each segment, with one transfer for all that are alike: a fused optimizer keeps hundreds of them on
    the device, and reading one makes the host wait for it."""
    found = [segment.scalars() for segment in segments]
    alike: dict[tuple[torch.device, torch.dtype], list[tuple[dict[str, Any], str]]] = {}
    for scalars in found:
        for name, value in scalars.items():
            if isinstance(value, Tensor):
                alike.setdefault((value.device, value.dtype), []).append((scalars, name))
    for places in alike.values():
        values = torch.stack([scalars[name] for scalars, name in places]).tolist()
        for (scalars, name), value in zip(places, values, strict=True):
            scalars[name] = value
    return found  # type: ignore[return-value]


def is_elementwise(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer treats every element for itself, so that its state means the same however it is cut.

    Adafactor does not: it keeps rows and columns of a matrix, and scales by the norm of whatever it is given. Found by
    letting new optimizers of the class make one step, one with a small matrix and one with two flat pieces of it.
    """
    settings = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
    matrix = torch.tensor([[0.01, -0.02, 0.03], [-0.04, 0.05, 0.06]])
    cuts = [2, matrix.numel() - 2]
    try:
        whole, sizes = _probed(type(optimizer), settings, [matrix])
        again, _ = _probed(type(optimizer), settings, [matrix])
        pieces, _ = _probed(type(optimizer), settings, list(matrix.view(-1).split(cuts)))
    except Exception:  # of whatever kind: it is the user's own class
        return True  # one that cannot be tried out, DeepSpeed's among them
    start = matrix.view(-1)
    is_same = bool((whole - pieces).norm() <= 1e-3 * (whole - start).norm())
    is_random = not again.equal(whole)  # then only the sizes tell
    return (is_same or is_random) and all(size == matrix.numel() for size in sizes)


def _probed(make: Any, settings: dict[str, Any], tensors: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
    """Parameters after one step, laid end to end, and the sizes of the states that are no scalars."""
    params = [torch.nn.Parameter(tensor.clone()) for tensor in tensors]
    optimizer = make([{**settings, "params": params}])
    for p in params:
        p.grad = p.detach() * 0.1
    optimizer.step()
    sizes = [v.numel() for p in params for v in optimizer.state[p].values() if isinstance(v, Tensor) and v.dim()]
    return torch.cat([p.detach().view(-1) for p in params]), sizes


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
class Untrained:
    """A frozen parameter or a persistent buffer: part of the model file, changed by no optimizer step.

    `held` and `owned` are as in a segment, for the flat tensor that `source` gives.
    """

    name: str
    shape: tuple[int, ...]
    source: Callable[[], Tensor]
    held: tuple[Extent, ...]
    owned: tuple[Extent, ...]
    is_buffer: bool = False
    """A forward pass may change it."""


@dataclass(frozen=True)
class TrainedState:
    """Everything of this process that an optimizer step changes, and beside it what is frozen."""

    params: tuple[ParamInfo, ...]
    segments: tuple[Segment, ...]
    optimizer: torch.optim.Optimizer
    partition: str
    """How the optimizer sees the parameters: `whole`, or which flat pieces of them."""
    forward: dict[str, Tensor] = field(default_factory=dict)
    """Parameters that every process holds whole beside the masters (ZeRO 1 and 2), by name."""
    frozen: tuple[Untrained, ...] = ()
    """Parameters that the optimizer does not have."""


def collect(model: torch.nn.Module, optimizer: Any, *, rank: int, world_size: int) -> TrainedState:
    """Finds the state behind `accelerator.prepare`'s objects.

    Args:
        model: the prepared model: a DeepSpeed engine, a DDP wrapper or a plain module.
        optimizer: the prepared (wrapped) optimizer.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    module = getattr(model, "module", model)
    names = {id(p): n for n, p in module.named_parameters()}
    stage, masters = _deepspeed.flat_masters(inner)
    if not stage:
        state = _replicated(inner, names, rank, world_size)
    else:
        make = _zero3 if stage == 3 else _zero12
        state = make(masters, _deepspeed.torch_optimizer(inner), names, rank, world_size)
    trained = {info.name for info in state.params}
    frozen = [(name, param) for name, param in module.named_parameters() if name not in trained]
    return replace(state, frozen=_frozen(frozen, rank, world_size))


def in_file_order(infos: Iterable[ParamInfo]) -> list[ParamInfo]:
    """By group, since a partition of ZeRO 1 and 2 is a run of a group's elements; parameters that are no whole blocks
    last, as `layout.plan_files` has them."""
    return sorted(infos, key=lambda info: (info.numel % BLOCK_BYTES != 0, info.group))


def share(total: int, rank: int, world_size: int) -> tuple[int, int]:
    """Of what every process holds: the elements that this one writes. Whole blocks, whatever the dtype."""
    cuts = [i * total // world_size // BLOCK_BYTES * BLOCK_BYTES for i in range(world_size)]
    return cuts[rank], [*cuts, total][rank + 1]


def _cut(params: list[tuple[ParamInfo, int]], low: int, high: int) -> tuple[Extent, ...]:
    """The parts of parameters (with their offsets in a flat space) that lie in [low, high), offsets relative to low."""
    found = []
    for info, offset in params:
        start, end = max(low, offset), min(high, offset + info.numel)
        if start < end:
            found.append(Extent(info.name, start - offset, end - start, start - low))
    return tuple(found)


def _zero12(
    masters: list[FlatMaster], optimizer: torch.optim.Optimizer, names: dict[int, str], rank: int, world_size: int
) -> TrainedState:
    infos, segments, forward = [], [], {}
    for flat in masters:
        layout = []
        for param, offset in zip(flat.params, flat.offsets, strict=True):
            info = ParamInfo(names[id(param)], tuple(param.shape), flat.group)
            layout.append((info, offset))
            infos.append(info)
            forward[info.name] = param.detach()
        low = rank * flat.master.numel()
        extents = _cut(layout, low, low + flat.master.numel())
        segments.append(Segment(flat.master, optimizer, flat.group, extents, extents, flat.master))
    partition = f"zero1/zero2 x {world_size}"
    return TrainedState(_in_model_order(infos, names), tuple(segments), optimizer, partition, forward)


def _zero3(
    masters: list[FlatMaster], optimizer: torch.optim.Optimizer, names: dict[int, str], rank: int, world_size: int
) -> TrainedState:
    infos, segments = [], []
    for i, flat in enumerate(masters):
        found = [
            (ParamInfo(names[id(param)], _deepspeed.full_shape(param), flat.group), _deepspeed.shard_numel(param))
            for param in flat.params
        ]
        infos += [info for info, _ in found]
        partition = cut_all(str(i), found, world_size)
        extents = row_extents(partition, rank)
        segments.append(Segment(flat.master, optimizer, flat.group, extents, extents, flat.master, partition))
    return TrainedState(_in_model_order(infos, names), tuple(segments), optimizer, f"zero3 x {world_size}")


def cut_all(name: str, params: Iterable[tuple[ParamInfo, int]], world_size: int) -> Partition:
    """The partition of parameters that every process holds `width` elements of, one parameter after the other."""
    columns, start = {}, 0
    for info, width in params:
        columns[info.name] = Column(info.shape, start, width)
        start += width
    return Partition(f"partition-{name}", world_size, columns)


def row_extents(partition: Partition, row: int) -> tuple[Extent, ...]:
    """What a row holds; the last rows may lack elements, where a parameter is no multiple of their number."""
    found = []
    for name, column in partition.columns.items():
        start = row * column.width
        numel = min(column.width, column.numel - start)
        if numel > 0:
            found.append(Extent(name, start, numel, column.start))
    return tuple(found)


def _replicated(optimizer: torch.optim.Optimizer, names: dict[int, str], rank: int, world_size: int) -> TrainedState:
    params = {names[id(p)]: (p, i) for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
    infos = [ParamInfo(name, tuple(param.shape), group) for name, (param, group) in params.items()]
    offset, segments = 0, []
    low, high = share(sum(i.numel for i in infos), rank, world_size)
    for info in in_file_order(_in_model_order(infos, names)):
        param, _ = params[info.name]
        whole, owned = _whole(info.name, info.numel, low - offset, high - offset)
        segments.append(Segment(param.detach().view(-1), optimizer, info.group, whole, owned, param))
        offset += info.numel
    return TrainedState(_in_model_order(infos, names), tuple(segments), optimizer, "whole")


def _whole(name: str, numel: int, low: int, high: int) -> tuple[tuple[Extent, ...], tuple[Extent, ...]]:
    """A tensor that every process holds, and the part of it in [low, high)."""
    start, end = max(low, 0), min(high, numel)
    owned = (Extent(name, start, end - start, start),) if start < end else ()
    return (Extent(name, 0, numel, 0),), owned


def _frozen(params: list[tuple[str, Any]], rank: int, world_size: int) -> tuple[Untrained, ...]:
    """Under ZeRO-3 frozen parameters are partitioned as well; elsewhere every process holds them and writes a share."""
    found, offset = [], 0
    low, high = share(sum(param.numel() for _, param in params), rank, world_size)
    for name, param in params:
        if _deepspeed.is_partitioned(param):
            shape, width = _deepspeed.full_shape(param), _deepspeed.shard_numel(param)
            held = row_extents(Partition(name, world_size, {name: Column(shape, 0, width)}), rank)
            found.append(Untrained(name, shape, partial(_deepspeed.flat_shard, param), held, held))
        else:
            held, owned = _whole(name, param.numel(), low - offset, high - offset)
            found.append(Untrained(name, tuple(param.shape), partial(_flat, param), held, owned))
            offset += param.numel()
    return tuple(found)


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().view(-1)


def _in_model_order(infos: Iterable[ParamInfo], names: dict[int, str]) -> tuple[ParamInfo, ...]:
    order = {name: i for i, name in enumerate(names.values())}
    return tuple(sorted(infos, key=lambda info: order[info.name]))


def persistent_buffers(module: torch.nn.Module, rank: int) -> Iterator[Untrained]:
    """Buffers that belong to the weights (those that state_dict() would hold); the main process writes its own."""
    seen = set()
    for prefix, child in module.named_modules():
        for name, buffer in child.named_buffers(recurse=False):
            if name in child._non_persistent_buffers_set or id(buffer) in seen:
                continue
            seen.add(id(buffer))
            full = f"{prefix}.{name}" if prefix else name
            whole, _ = _whole(full, buffer.numel(), 0, 0)
            owned = whole if rank == 0 else ()
            yield Untrained(full, tuple(buffer.shape), partial(_flat, buffer), whole, owned, is_buffer=True)
