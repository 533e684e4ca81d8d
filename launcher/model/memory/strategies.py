"""What each strategy holds on a device. The formulas follow torch's DDP and DeepSpeed 0.19.

DeepSpeed's are in runtime/zero/stage_1_and_2.py and stage3.py: partitions, buckets, the fp32 copy of the gradients that
the optimizer steps with, and the parameters that ZeRO-3 keeps gathered.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from launcher.config.settings import StrategyConfig
from launcher.model.memory.activations import Pass
from launcher.model.memory.empty import EmptyModel, OptimizerStates

_FORWARD_DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_MASTER_BYTES = 4
_MAX_LIVE = _SUB_GROUP = 10**9
_PREFETCH = 5 * 10**7
_REDUCE_BUCKET = 5 * 10**8
"""DeepSpeed's defaults, in elements."""


@dataclass(frozen=True)
class MemoryParts:
    """Bytes on one device at the moment when it holds most. `other`: buckets, gathered parameters, copies."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    other: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.other

    def to_dict(self) -> dict[str, int]:
        values = {name: round(value) for name, value in vars(self).items()}
        return {**values, "total": sum(values.values())}


@dataclass(frozen=True)
class Setting:
    """What decides the memory beside the model: the strategy, how many processes, and how many micro-steps."""

    strategy: StrategyConfig
    num_processes: int
    num_micro_steps: int
    mixed_precision: str
    is_cuda: bool

    @property
    def stage(self) -> int:
        return self.strategy.zero_stage

    @property
    def forward_dtype(self) -> torch.dtype:
        return _FORWARD_DTYPES[self.mixed_precision]

    def zero_value(self, name: str, default: float) -> float:
        """A number of strategy.deepspeed.zero_optimization."""
        value = dict(self.strategy.deepspeed.get("zero_optimization") or {}).get(name, default)
        return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else default

    def bucket_numel(self, trained: int) -> float:
        """Elements of a bucket for gradients. A device takes all of it; of a CPU's memory only what is ever written."""
        numel = self.zero_value("reduce_bucket_size", _REDUCE_BUCKET)
        return numel if self.is_cuda else min(numel, float(trained))

    @property
    def num_buckets(self) -> int:
        is_default = self.is_cuda and self.num_processes > 1  # as train.accelerator.deepspeed_config has it
        overlaps = dict(self.strategy.deepspeed.get("zero_optimization") or {}).get("overlap_comm", is_default)
        return 2 if overlaps and self.stage < 3 else 1


@dataclass(frozen=True)
class Sizes:
    """Of the model, in elements and bytes."""

    trained: int
    largest: int
    largest_of_all: int
    """Of the parameter that has most, frozen or not; `largest` is of those that are trained."""
    total: int
    """Elements of all parameters."""
    plain_weights: float
    """Bytes without DeepSpeed: fp32 masters of what is trained, the rest as it is stored, and buffers."""
    frozen: float
    """Bytes of what is not trained."""
    frozen_numel: int
    buffers: int
    plain_states: int
    """Bytes of the optimizer's states where it sees the parameters themselves."""
    flat_state: float
    """Bytes of its states for each element of a flat partition."""

    @classmethod
    def of(cls, model: EmptyModel, states: OptimizerStates) -> Sizes:
        trained = sum(param.numel for param in model.trained)
        frozen = sum(param.num_bytes for param in model.frozen)
        plain_states = sum(states.num_bytes(param.shape) for param in model.trained)
        weights = _MASTER_BYTES * trained + frozen + model.buffer_bytes
        flat_state = states.num_bytes((1024,)) / 1024
        largest = max((param.numel for param in model.trained), default=0)
        largest_of_all = max((param.numel for param in model.params), default=0)
        total = sum(param.numel for param in model.params)
        return cls(
            trained, largest, largest_of_all, total, weights, frozen, sum(param.numel for param in model.frozen),
            model.buffer_bytes, plain_states, flat_state,
        )  # fmt: skip


def memory_parts(sizes: Sizes, setting: Setting, passes: Pass, states: OptimizerStates) -> MemoryParts:
    """Of one strategy, at its highest moment in the steady state (the second step and later)."""
    moments = {0: _replicated, 1: _zero12, 2: _zero12, 3: _zero3}[setting.stage](sizes, setting, passes, states)
    return max(moments, key=lambda parts: parts.total)


def _replicated(sizes: Sizes, setting: Setting, passes: Pass, states: OptimizerStates) -> list[MemoryParts]:
    grads = float(_MASTER_BYTES * sizes.trained)
    keeps_grads = setting.num_processes > 1 or setting.num_micro_steps > 1  # DDP's buckets are its gradients
    one_by_one = 2.0 * _MASTER_BYTES * sizes.largest
    copies = (grads if setting.is_cuda else one_by_one) if states.makes_copies else 0.0
    held = sizes.plain_weights, float(sizes.plain_states)

    def at(gradients: float, activations: float, other: float = 0.0) -> MemoryParts:
        return MemoryParts(held[0], gradients, held[1], activations, other)

    first = grads if keeps_grads else 0.0
    return [at(first, passes.before), at(first, passes.after), at(grads, passes.end), at(grads, 0.0, copies)]


def _zero12(sizes: Sizes, setting: Setting, passes: Pass, states: OptimizerStates) -> list[MemoryParts]:
    item, count = setting.forward_dtype.itemsize, setting.num_processes
    weights = item * sizes.trained + _frozen_bytes(sizes, setting) + sizes.buffers
    optimizer = (_MASTER_BYTES + sizes.flat_state) * sizes.trained / count
    own_grads = item * sizes.trained / count
    bucket_numel = setting.bucket_numel(sizes.trained)
    bucket = item * setting.num_buckets * bucket_numel
    accumulates = setting.num_micro_steps > 1
    whole = float(item * sizes.trained)
    early = (whole if accumulates else 0.0) if setting.stage == 1 else (own_grads if accumulates else 0.0)
    late = whole + own_grads if setting.stage == 1 else (2.0 if accumulates else 1.0) * own_grads
    fp32_grads = _MASTER_BYTES * sizes.trained / count
    copies = _step_copies(setting, states, sizes.trained / count)

    def at(gradients: float, activations: float, other: float) -> MemoryParts:
        return MemoryParts(weights, gradients, optimizer, activations, other)

    is_reduced_early = setting.stage == 2 and sizes.trained > bucket_numel  # else all of it fits into the bucket
    return [
        at(early, passes.before, 0.0), at(early + (own_grads if is_reduced_early else 0.0), passes.after, bucket),
        at(late, passes.end, bucket), at(own_grads, 0.0, fp32_grads + copies),
    ]  # fmt: skip


def _zero3(sizes: Sizes, setting: Setting, passes: Pass, states: OptimizerStates) -> list[MemoryParts]:
    item, count = setting.forward_dtype.itemsize, setting.num_processes
    is_offloaded = setting.strategy.is_offloaded and setting.is_cuda
    shares = (item * sizes.trained + _frozen_bytes(sizes, setting)) / count
    live = min(float(sizes.total), setting.zero_value("stage3_max_live_parameters", _MAX_LIVE))
    bucket = item * setting.bucket_numel(sizes.trained)
    # The prefetcher gathers a small model whole at the start of the forward pass and passes over what it has gathered:
    # each module's parameters go after it, and the backward pass gathers one at a time. Activations are highest at the
    # head, with little else there (seen in fetch_sub_module). A larger model's are prefetched in the backward pass too.
    is_gathered_at_once = sizes.total <= setting.zero_value("stage3_prefetch_bucket_size", _PREFETCH)
    at_head = item * (float(sizes.largest_of_all) if is_gathered_at_once else live)
    masters = _MASTER_BYTES * sizes.trained / count
    optimizer = masters + sizes.flat_state * sizes.trained / count
    own_grads = item * sizes.trained / count
    in_step = min(sizes.trained / count, setting.zero_value("sub_group_size", _SUB_GROUP))
    copies = _MASTER_BYTES * in_step + _step_copies(setting, states, in_step)
    if is_offloaded:
        shares = optimizer = own_grads = copies = 0.0
    weights = shares + sizes.buffers
    highest = max(passes.before, passes.after)
    # What is gathered together lies in one buffer, which is there until the last of its parameters has gone: for all of
    # the layers' forward pass. With a frozen base the largest parameter was seen beside it once more.
    in_layers = item * (live + (sizes.largest_of_all if sizes.frozen_numel else 0))
    return [
        MemoryParts(weights, own_grads, optimizer, highest, at_head + bucket),
        MemoryParts(weights, own_grads, optimizer, passes.layers if is_gathered_at_once else 0.0, in_layers + bucket),
        MemoryParts(weights, own_grads, optimizer, 0.0, bucket + copies),
    ]


def _frozen_bytes(sizes: Sizes, setting: Setting) -> float:
    """DeepSpeed casts all parameters of its module to the dtype of forward; quantised ones it leaves alone."""
    return min(sizes.frozen, float(setting.forward_dtype.itemsize * sizes.frozen_numel)) or 0.0


def _step_copies(setting: Setting, states: OptimizerStates, numel: float) -> float:
    """torch's optimizers, if not fused, make copies of what they step: here one tensor."""
    return (1.0 if setting.is_cuda else 2.0) * _MASTER_BYTES * numel if states.makes_copies else 0.0


def host_bytes(sizes: Sizes, setting: Setting, snapshot: float) -> Mapping[str, int]:
    """Of one process in host memory, where the device is another: the copy of a save, and what is offloaded."""
    offloaded = 0.0
    if setting.strategy.is_offloaded:
        item = setting.forward_dtype.itemsize
        per_element = item + item + 2 * _MASTER_BYTES + sizes.flat_state  # weights, gradients twice, masters, states
        offloaded = per_element * sizes.trained / setting.num_processes
    build = sizes.plain_weights if setting.stage == 0 else float(setting.forward_dtype.itemsize * sizes.total)
    return {"snapshot": round(snapshot), "offloaded": round(offloaded), "build": round(build)}
