"""Reading a checkpoint back: each process reads the byte ranges of what it holds, whatever wrote them. No pickle."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launcher.base.errors import DamagedCheckpointError, ResumeError
from launcher.checkpoint.layout import Place, iter_safetensors, read_places
from launcher.checkpoint.segments import Extent, Segment, TrainedState, is_elementwise, persistent_buffers
from launcher.checkpoint.snapshot import OPTIMIZER_STEM

TORCH_DTYPES = {
    "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64, "I64": torch.int64,
    "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool, "I8": torch.int8, "I16": torch.int16,
}  # fmt: skip
_CHUNK_ITEMS = 2**24
MASTER = "master"


class TensorFiles:
    """The tensors of some safetensors files, read range by range into memory that is already there."""

    def __init__(self, paths: list[Path]) -> None:
        self.places: dict[str, Place] = {}
        self._fds: dict[str, int] = {}
        for path in paths:
            try:
                self.places |= read_places(path)
            except (OSError, ValueError, KeyError) as error:
                raise DamagedCheckpointError(f"{path} cannot be read: {error}") from error

    def read_into(self, name: str, start: int, target: Tensor) -> None:
        """Fills a flat tensor with elements [start, start + numel) of a stored one, converting its dtype."""
        place = self.places[name]
        dtype = TORCH_DTYPES[place.spec.dtype]
        if target.dtype == dtype and target.device.type == "cpu" and target.is_contiguous():
            self._read(place, start, target)
            return
        for low in range(0, target.numel(), _CHUNK_ITEMS):
            part = target[low : low + _CHUNK_ITEMS]
            host = torch.empty(part.numel(), dtype=dtype)
            self._read(place, start + low, host)
            part.copy_(host)

    def _read(self, place: Place, start: int, target: Tensor) -> None:
        fd = self._fds.setdefault(place.path, -1)
        if fd < 0:
            fd = self._fds[place.path] = os.open(place.path, os.O_RDONLY)
        view = memoryview(target.detach().view(torch.uint8).numpy())  # type: ignore[arg-type]
        offset = place.offset + start * place.spec.item_bytes
        while view:
            count = os.preadv(fd, [view], offset)
            if count == 0:
                raise DamagedCheckpointError(f"{place.path} ends inside {place.spec.name}")
            view, offset = view[count:], offset + count

    def close(self) -> None:
        for fd in self._fds.values():
            if fd >= 0:
                os.close(fd)
        self._fds = {}


def load_trained_state(
    state: TrainedState, module: torch.nn.Module, folder: Path, saved: dict[str, Any], *, weights_stem: str,
    stored_name: Callable[[str], str],
) -> None:  # fmt: skip
    """Fills masters, optimizer states, whole forward weights and persistent buffers of this process from a folder.

    Args:
        saved: the `optimizer` part of state.json.

    Raises:
        ResumeError: the checkpoint belongs to another model or another optimizer.
    """
    weights = TensorFiles(list(iter_safetensors(folder, weights_stem)))
    states = TensorFiles(list(iter_safetensors(folder, OPTIMIZER_STEM)))
    try:
        _check_params(state, weights, stored_name, folder)
        _check_partition(state, saved)
        numels = {p.name: p.numel for p in state.params}
        slots: dict[str, set[str]] = {}
        for key in states.places:
            slot, _, param = key.partition(".")
            slots.setdefault(param, set()).add(slot)
        scalars = _scalars_by_param(saved)
        for segment in state.segments:
            for extent in segment.extents:
                _read_master(segment, extent, weights, states, stored_name)
            first = next(p.name for p in state.params if p.group == segment.group)
            names = sorted({e.param for e in segment.extents}) or [first]
            stored = {n: slots.get(n, set()) for n in names}
            _load_optimizer_state(segment, states, stored, numels, scalars.get(names[0], {}))
        for name, weight in state.forward.items():
            weights.read_into(stored_name(name), 0, weight.view(-1))
        if weights_stem == "model":
            for name, buffer in persistent_buffers(module):
                if name in weights.places:
                    weights.read_into(name, 0, buffer.view(-1))
    finally:
        weights.close()
        states.close()


def _check_params(state: TrainedState, weights: TensorFiles, stored_name: Callable[[str], str], folder: Path) -> None:
    for info in state.params:
        place = weights.places.get(stored_name(info.name))
        if place is None or place.spec.shape != info.shape:
            found = "is not in it" if place is None else f"has shape {list(place.spec.shape)} there"
            raise ResumeError(
                f"{folder} belongs to another model: {info.name} with shape {list(info.shape)} {found}. "
                "Use another output_dir, or checkpoint.resume_from_checkpoint=never"
            )


def _check_partition(state: TrainedState, saved: dict[str, Any]) -> None:
    before = saved.get("partition", state.partition)  # left out by another tool's checkpoint
    if before != state.partition and not is_elementwise(state.optimizer):
        name = type(state.optimizer).__name__
        raise ResumeError(
            f"{name} has no state of its own for every weight, so it can only continue under the partition that it was "
            f"saved under: {before} (now {state.partition}). Set strategy and launch.num_processes as they were; "
            "single and ddp continue each other on any number of processes"
        )


def _read_master(
    segment: Segment, extent: Extent, weights: TensorFiles, states: TensorFiles, stored_name: Callable[[str], str]
) -> None:
    target = segment.master[extent.offset : extent.offset + extent.numel]
    name = f"{MASTER}.{extent.param}"
    if name in states.places:
        states.read_into(name, extent.start, target)
    else:
        weights.read_into(stored_name(extent.param), extent.start, target)


def _scalars_by_param(saved: dict[str, Any]) -> dict[str, dict[str, Any]]:
    found = {}
    for group in saved["groups"]:
        for name in group["params"]:
            found[name] = group["scalars"]
    return found


def _load_optimizer_state(
    segment: Segment, states: TensorFiles, slots: dict[str, set[str]], numels: dict[str, int], scalars: dict[str, Any]
) -> None:
    """Makes the optimizer's state of one segment anew. `slots`: the stored states of each parameter in it."""
    state = segment.state
    state.clear()
    for slot in sorted(set().union(*slots.values()) - {MASTER}):
        param = next(name for name in slots if slot in slots[name])
        place = states.places[f"{slot}.{param}"]
        if segment.is_whole and place.spec.shape != segment.key.shape:  # Adafactor's rows and columns
            state[slot] = torch.zeros(place.spec.shape, dtype=TORCH_DTYPES[place.spec.dtype], device=segment.key.device)
            states.read_into(place.spec.name, 0, state[slot].view(-1))
            continue
        tensor = torch.zeros_like(segment.key, dtype=TORCH_DTYPES[place.spec.dtype])
        for extent in segment.extents:
            stored = states.places.get(f"{slot}.{extent.param}")
            if stored is None:
                continue
            if stored.spec.numel != numels[extent.param]:
                raise ResumeError(
                    f"the optimizer state {slot} of {extent.param} has shape {list(stored.spec.shape)}: it has no "
                    "value per element and cannot be spread over processes. Continue with the strategy of its save"
                )
            states.read_into(
                stored.spec.name, extent.start, tensor.view(-1)[extent.offset : extent.offset + extent.numel]
            )
        state[slot] = tensor
    for name, value in scalars.items():
        state[name] = _scalar(segment, value)


def _scalar(segment: Segment, value: float | int) -> Any:
    # torch's own optimizers, and classes derived from them, count in tensors; others (DeepSpeed's) in ints.
    kinds = {c.__module__ for c in type(segment.optimizer).__mro__ if c is not torch.optim.Optimizer}
    if not any(kind.startswith("torch.optim") for kind in kinds):
        return value
    group = segment.optimizer.param_groups[segment.group]
    device = segment.key.device if group.get("fused") or group.get("capturable") else "cpu"
    return torch.tensor(float(value), dtype=torch.float32, device=device)
