"""Reading a checkpoint back: each process reads the byte ranges of what it holds, whatever wrote them. No pickle."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launcher.base import files
from launcher.base.errors import DamagedCheckpointError, ResumeError
from launcher.base.stored import StoredTensor, StoredTensors
from launcher.checkpoint.headers import StateIndex, read_places, read_state_index
from launcher.checkpoint.layout import (
    Column,
    Partition,
    Place,
    TensorSpec,
    index_path,
    iter_safetensors,
    overlaps,
    stored_parts,
)
from launcher.checkpoint.segments import (
    Extent,
    ParamInfo,
    Segment,
    TrainedState,
    is_elementwise,
    persistent_buffers,
)
from launcher.checkpoint.snapshot import MASTER, OPTIMIZER_STEM, TORCH_DTYPES

_CHUNK_ITEMS = 2**24


class TensorFiles:
    """The tensors of some safetensors files, read range by range into memory that is already there.

    Rows of partitions are shown as the tensors that they are pieces of.

    Args:
        listed: the paths in the manifest of a checkpoint: nothing else in its folder is read. None: a folder without.
        follow_links: a model's folder that the user's settings name may consist of links.

    Raises:
        DamagedCheckpointError: here or when a tensor is read, the files are not whole.
    """

    def __init__(
        self, folder: Path, stem: str, listed: Collection[str] | None = None, *, follow_links: bool = False
    ) -> None:
        self.specs: dict[str, TensorSpec] = {}
        self._folder = (folder / stem).parent
        self._places: dict[str, Place] = {}
        self._columns: dict[str, tuple[Partition, str, Column]] = {}
        self._fds: dict[str, int] = {}
        self._within = None if follow_links else folder
        paths = [path.resolve() if follow_links else path for path in iter_safetensors(folder, stem, listed)]
        self._index = StateIndex({}, ())
        if paths and not follow_links and (listed is None or index_path(stem) in listed):
            self._index = read_state_index(folder / index_path(stem), within=folder)
        rows = {p.row_name(slot, row) for p in self._index.partitions for slot in p.slots for row in range(p.num_rows)}
        for path in paths:
            stored = self._index.names(path.name)
            if not stored or stored - rows:  # a file of rows alone is opened when one is read: most never are
                self._places |= read_places(path, within=self._within)
        self._readable = {path.name for path in paths}
        self.specs |= {name: place.spec for name, place in self._places.items() if name not in rows}
        for partition in self._index.partitions:
            for slot, dtype in partition.slots.items():
                for name, column in partition.columns.items():
                    key = f"{slot}.{name}"
                    self.specs[key] = TensorSpec(key, dtype, column.shape)
                    self._columns[key] = partition, slot, column

    def place(self, name: str) -> Place | None:
        """Where a tensor lies, if it lies in one piece."""
        return self._places.get(name)

    def read_into(self, name: str, start: int, target: Tensor) -> None:
        """Fills a flat tensor with elements [start, start + numel) of a stored one, converting its dtype."""
        for place, first, part in self._pieces(name, start, target):
            dtype = TORCH_DTYPES[place.spec.dtype]
            if part.dtype == dtype and part.device.type == "cpu" and part.is_contiguous():
                self._read(place, first, part)
                continue
            for low in range(0, part.numel(), _CHUNK_ITEMS):
                some = part[low : low + _CHUNK_ITEMS]
                host = torch.empty(some.numel(), dtype=dtype)
                self._read(place, first + low, host)
                some.copy_(host)

    def _pieces(self, name: str, start: int, target: Tensor) -> Iterator[tuple[Place, int, Tensor]]:
        """What to read: (stored tensor, its first element, part of the target)."""
        if name in self._places:
            yield self._places[name], start, target
            return
        partition, slot, column = self._columns[name]
        done = 0
        while done < target.numel():
            row, offset = divmod(start + done, column.width)
            numel = min(column.width - offset, target.numel() - done)
            yield self._row(partition, slot, row), column.start + offset, target[done : done + numel]
            done += numel

    def _row(self, partition: Partition, slot: str, row: int) -> Place:
        spec = partition.row_spec(slot, row)
        name = self._index.weight_map[spec.name]
        if spec.name not in self._places and name in self._readable:
            self._places |= read_places(self._folder / name, within=self._within)
        place = self._places.get(spec.name)
        if place is None or place.spec != spec:
            raise DamagedCheckpointError(f"{self._folder}: {spec.name} is not what its index says")
        return place

    def _read(self, place: Place, start: int, target: Tensor) -> None:
        fd = self._fds.setdefault(place.path, -1)
        if fd < 0:
            fd = self._fds[place.path] = self.open_fd(place)
        view = memoryview(target.detach().view(torch.uint8).numpy())  # type: ignore[arg-type]
        offset = place.offset + start * place.spec.item_bytes
        while view:
            count = os.preadv(fd, [view], offset)
            if count == 0:
                raise DamagedCheckpointError(f"{place.path} ends inside {place.spec.name}")
            view, offset = view[count:], offset + count

    def open_fd(self, place: Place) -> int:
        """The file that a tensor lies in, anew; the caller closes it."""
        try:
            return files.open_fd(Path(place.path), within=self._within)
        except OSError as error:
            raise DamagedCheckpointError(f"{place.path} cannot be read any more: {error}") from error

    def close(self) -> None:
        for fd in self._fds.values():
            if fd >= 0:
                os.close(fd)
        self._fds = {}


class StoredWeights:
    """The model file of a checkpoint, by the names in memory."""

    def __init__(self, files: TensorFiles, stored: StoredTensors) -> None:
        self.files, self._stored = files, stored

    def parts(self, name: str, shape: tuple[int, ...]) -> tuple[StoredTensor, ...] | None:
        """The stored tensors of a parameter, or None. The first version stored all under their names in memory."""
        for parts in (stored_parts(self._stored, name, shape), (StoredTensor(name, shape, 0),)):
            specs = [self.files.specs.get(part.name) for part in parts]
            if all(spec and spec.shape == part.shape for spec, part in zip(specs, parts, strict=True)):
                return parts
        return None

    def first_rows(self, name: str, shape: tuple[int, ...]) -> tuple[StoredTensor, ...] | None:
        """The same of a parameter that has got more rows than are stored."""
        part = stored_parts(self._stored, name, shape)[0]
        spec = self.files.specs.get(part.name)
        is_shorter = spec is not None and spec.shape[1:] == shape[1:] and spec.shape[:1] < shape[:1]
        return (StoredTensor(part.name, spec.shape, 0),) if spec is not None and is_shorter else None

    def read_into(
        self, name: str, shape: tuple[int, ...], start: int, target: Tensor, *, may_have_grown: bool = False
    ) -> bool:
        """Fills a flat tensor with elements [start, …) of a parameter; False where it is not stored."""
        parts = self.parts(name, shape) or (self.first_rows(name, shape) if may_have_grown else None)
        for part, first, numel in overlaps(parts or (), start, target.numel()):
            self.files.read_into(part.name, first - part.start, target[first - start : first - start + numel])
        return parts is not None


@torch.no_grad()
def load_trained_state(
    state: TrainedState, module: torch.nn.Module, folder: Path, saved: dict[str, Any], *, weights_stem: str,
    stored: StoredTensors, listed: Collection[str] | None = None,
) -> None:  # fmt: skip
    """Fills masters, optimizer states, whole forward weights, frozen parameters and persistent buffers of this process
    from a folder.

    Args:
        saved: the `optimizer` part of state.json.
        stored: as for the snapshot.
        listed: see `TensorFiles`.

    Raises:
        ResumeError: the checkpoint belongs to another model or another optimizer. DamagedCheckpointError: see
            `TensorFiles`.
    """
    weights = StoredWeights(TensorFiles(folder, weights_stem, listed), stored)
    states = TensorFiles(folder, OPTIMIZER_STEM, listed)
    try:
        _check_params(state, weights, stored, folder)
        _check_partition(state, saved)
        infos = {p.name: p for p in state.params}
        slots: dict[str, set[str]] = {}
        for key in states.specs:
            slot, _, param = key.partition(".")
            slots.setdefault(param, set()).add(slot)
        scalars, kinds = _by_param(saved, "scalars"), _by_param(saved, "tensors")
        for segment in state.segments:
            for extent in segment.extents:
                _read_master(segment, extent, infos[extent.param], weights, states)
            first = next(p.name for p in state.params if p.group == segment.group)
            names = sorted({e.param for e in segment.extents}) or [first]
            found = {n: slots.get(n, set()) for n in names}
            own = {k: scalar_of(segment, v, kinds[names[0]].get(k)) for k, v in scalars.get(names[0], {}).items()}
            _load_optimizer_state(segment, states, found, infos, own)
        for name, weight in state.forward.items():
            weights.read_into(name, infos[name].shape, 0, weight.view(-1))
        for entry in (*state.frozen, *persistent_buffers(module, rank=0)):
            if entry.name in stored:
                flat = entry.source()
                for e in entry.held:
                    weights.read_into(entry.name, entry.shape, e.start, flat[e.offset : e.offset + e.numel])
    finally:
        weights.files.close()
        states.close()


@torch.no_grad()
def load_weights(
    module: torch.nn.Module, folder: Path, *, weights_stem: str, stored: StoredTensors, listed: Collection[str]
) -> None:
    """Fills the parameters and persistent buffers that a checkpoint stores, of a module that is not spread over
    processes.

    Args:
        stored, listed: as for `load_trained_state`.

    Raises:
        DamagedCheckpointError: one is not in it, or see `TensorFiles`.
    """
    weights = StoredWeights(TensorFiles(folder, weights_stem, listed), stored)
    try:
        tensors = {name: (tuple(p.shape), p.detach().view(-1)) for name, p in module.named_parameters()}
        tensors |= {entry.name: (entry.shape, entry.source()) for entry in persistent_buffers(module, rank=0)}
        for name in stored:
            if name in tensors and not weights.read_into(name, tensors[name][0], 0, tensors[name][1]):
                raise DamagedCheckpointError(f"{folder} does not hold {name}")
    finally:
        weights.files.close()


@torch.no_grad()
def load_masters(state: TrainedState, folder: Path, stored: StoredTensors, stem: str) -> bool:
    """Fills the masters from a pretrained model's fp32 weights: DeepSpeed made them of weights that were rounded to the
    dtype of forward. Reads this process's ranges alone; rows that are not stored, of new tokens, stay as they are.

    Returns:
        False where the folder holds no fp32 weights, or not under the names that `save_pretrained` gives them: the
        masters are unchanged then.
    """
    weights = StoredWeights(TensorFiles(folder, stem, follow_links=True), stored)
    try:
        infos = {p.name: p for p in state.params}
        parts = [weights.parts(p.name, p.shape) or weights.first_rows(p.name, p.shape) for p in state.params]
        if not any(weights.files.specs[t.name].dtype == "F32" for found in parts for t in found or ()):
            return False
        if None in parts:
            return False
        for segment in state.segments:
            for extent in segment.extents:
                target = segment.master[extent.offset : extent.offset + extent.numel]
                shape = infos[extent.param].shape
                weights.read_into(extent.param, shape, extent.start, target, may_have_grown=True)
        return True
    finally:
        weights.files.close()


@torch.no_grad()
def set_masters(state: TrainedState, tensors: Mapping[str, Tensor]) -> None:
    """The same from whole fp32 parameters in memory, by name."""
    for segment in state.segments:
        for e in segment.extents:
            flat = tensors[e.param].view(-1)[e.start : e.start + e.numel]
            segment.master[e.offset : e.offset + e.numel].copy_(flat)


@torch.no_grad()
def set_rows(state: TrainedState, rows: Sequence[int], content: Mapping[str, Tensor]) -> None:
    """Sets rows of parameters (by name) to one content each; every process the elements that it holds."""
    for segment in state.segments:
        for e in (e for e in segment.extents if e.param in content):
            row = content[e.param].reshape(-1)
            for number in rows:
                low = max(e.start, number * row.numel())
                high = min(e.start + e.numel, (number + 1) * row.numel())
                if low < high:
                    first = low - number * row.numel()
                    target = segment.master[e.offset + low - e.start : e.offset + high - e.start]
                    target.copy_(row[first : first + high - low])


def _check_params(state: TrainedState, weights: StoredWeights, stored: StoredTensors, folder: Path) -> None:
    shapes = {p.name: p.shape for p in state.params} | {f.name: f.shape for f in state.frozen if f.name in stored}
    for name, shape in shapes.items():
        if weights.parts(name, shape) is None:
            spec = weights.files.specs.get(stored_parts(stored, name, shape)[0].name)
            found = "is not in it" if spec is None else f"has shape {list(spec.shape)} there"
            raise ResumeError(
                f"{folder} belongs to another model: {name} with shape {list(shape)} {found}. "
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
    segment: Segment, extent: Extent, info: ParamInfo, weights: StoredWeights, states: TensorFiles
) -> None:
    target = segment.master[extent.offset : extent.offset + extent.numel]
    name = f"{MASTER}.{extent.param}"
    if name in states.specs:
        states.read_into(name, extent.start, target)
    else:
        weights.read_into(info.name, info.shape, extent.start, target)


def _by_param(saved: dict[str, Any], key: str) -> dict[str, dict[str, Any]]:
    return {name: group.get(key, {}) for group in saved["groups"] for name in group["params"]}


def _load_optimizer_state(
    segment: Segment, states: TensorFiles, slots: dict[str, set[str]], infos: dict[str, ParamInfo],
    scalars: dict[str, Any],
) -> None:  # fmt: skip
    """Makes the optimizer's state of one segment anew. `slots`: the stored states of each parameter in it."""
    state = segment.state
    state.clear()
    for slot in sorted(set().union(*slots.values()) - {MASTER}):
        param = next(name for name in slots if slot in slots[name])
        spec = states.specs[f"{slot}.{param}"]
        if segment.is_whole and spec.shape != segment.key.shape:  # Adafactor's rows and columns
            state[slot] = torch.zeros(spec.shape, dtype=TORCH_DTYPES[spec.dtype], device=segment.key.device)
            states.read_into(spec.name, 0, state[slot].view(-1))
            continue
        tensor = torch.zeros_like(segment.key, dtype=TORCH_DTYPES[spec.dtype])
        for extent in segment.extents:
            stored = states.specs.get(f"{slot}.{extent.param}")
            if stored is None:
                continue
            if stored.numel != infos[extent.param].numel:
                raise ResumeError(
                    f"the optimizer state {slot} of {extent.param} has shape {list(stored.shape)}: it has no "
                    "value per element and cannot be spread over processes. Continue with the strategy of its save"
                )
            states.read_into(stored.name, extent.start, tensor.view(-1)[extent.offset : extent.offset + extent.numel])
        state[slot] = tensor
    state.update(scalars)


def scalar_of(segment: Segment, value: float | int, kind: dict[str, Any] | None) -> Any:
    """A state with one value per tensor, as the optimizer of a segment has it.

    Args:
        kind: of the tensor that it was, see `group_state.tensor_kinds`; None where it was a number, or is not known.
    """
    # torch's own optimizers, and classes derived from them, count in tensors; DeepSpeed's in ints.
    classes = {c.__module__ for c in type(segment.optimizer).__mro__ if c is not torch.optim.Optimizer}
    if not any(name.startswith("torch.optim") for name in classes):
        if kind is None or any(name.startswith("deepspeed") for name in classes):
            return value
        place = "cpu" if kind["is_on_host"] else segment.key.device
        return torch.tensor(value, dtype=TORCH_DTYPES[kind["dtype"]], device=place)
    group = segment.optimizer.param_groups[segment.group]
    was_on_device = kind is not None and not kind["is_on_host"]  # ASGD's are, always
    device = segment.key.device if group.get("fused") or group.get("capturable") or was_on_device else "cpu"
    return torch.tensor(float(value), dtype=torch.float32, device=device)
