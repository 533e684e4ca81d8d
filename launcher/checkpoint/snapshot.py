"""What one process contributes to a checkpoint: which bytes it copies into the buffer and where they go on disk."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from launcher.base import process
from launcher.base.block_io import BLOCK_BYTES
from launcher.checkpoint.layout import FileLayout, Place, TensorSpec, plan_files, weight_index
from launcher.checkpoint.segments import Segment, TrainedState, persistent_buffers

SAFETENSORS_NAMES = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64", torch.int64: "I64",
    torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL", torch.int8: "I8", torch.int16: "I16",
}  # fmt: skip
_DEVICE_COPY_ITEMS = 2**26
"""Elements copied at once: a change of dtype makes a temporary of that size on the device."""
_HOST_COPY_ITEMS = 2**20
"""The same on the CPU, where two share the copying and one may have to wait for the other's last."""
OPTIMIZER_STEM = "state/optimizer"


@dataclass
class Copy:
    """One memory copy: elements [low, high) of a flat source (looked up at each save, since optimizers replace their
    tensors), its target offset in bytes, and the dtype to store."""

    source: Callable[[], Tensor]
    low: int
    high: int
    offset: int
    dtype: torch.dtype

    @property
    def end(self) -> int:
        """Where the next byte of the buffer is free."""
        return self.offset + (self.high - self.low) * self.dtype.itemsize


@dataclass
class SnapshotPlan:
    """Computed once; every save repeats it."""

    files: list[FileLayout]
    copies: list[Copy] = field(default_factory=list)
    num_live: int = 0
    """The first so many copies are of what a forward pass may change; the others change in an optimizer step only."""
    ranges: list[tuple[str, int, int, int]] = field(default_factory=list)  # path, file offset, buffer offset, bytes
    buffer_bytes: int = 0
    index: bytes | None = None

    @property
    def total_bytes(self) -> int:
        """Of all processes together: what the checkpoint needs on disk."""
        return sum(f.num_bytes for f in self.files)

    def add(
        self, source: Callable[[], Tensor], low: int, high: int, dtype: torch.dtype, path: str, file_offset: int
    ) -> None:
        """Adds elements [low, high) of a flat source, to be stored at a byte offset of a file.

        They lie in the buffer as they will lie in the blocks of the file, so that the writer can hand them to the disk
        without another copy (O_DIRECT).
        """
        offset = self.buffer_bytes + (file_offset - self.buffer_bytes) % BLOCK_BYTES
        num_bytes = (high - low) * dtype.itemsize
        self.buffer_bytes = offset + num_bytes
        last = self.copies[-1] if self.copies else None
        if last and last.source is source and (last.high, last.end) == (low, offset):
            last.high = high
        else:
            self.copies.append(Copy(source, low, high, offset, dtype))
        if self.ranges and self.ranges[-1][0] == path and _ends(self.ranges[-1]) == (file_offset, offset):
            _, first_file_offset, first_offset, before = self.ranges[-1]
            self.ranges[-1] = (path, first_file_offset, first_offset, before + num_bytes)
        else:
            self.ranges.append((path, file_offset, offset, num_bytes))


def _ends(bytes_range: tuple[str, int, int, int]) -> tuple[int, int]:
    _, file_offset, offset, num_bytes = bytes_range
    return file_offset + num_bytes, offset + num_bytes


def plan_snapshot(
    state: TrainedState, module: torch.nn.Module, *, dtype: torch.dtype, weights_stem: str,
    stored_name: Callable[[str], str], only_model: bool, rank: int,
) -> SnapshotPlan:  # fmt: skip
    """Lays out the checkpoint's files and this process's part of them.

    Args:
        dtype: of the weights in the model files. Where it is fp32 the masters are those weights and are stored once.
        weights_stem: `model` or `adapter_model`.
        stored_name: from a parameter's name to its name in the model file.
        only_model: leave the optimizer and the masters out.
    """
    master_specs, state_specs = [], []
    buffers = list(persistent_buffers(module)) if weights_stem == "model" else []
    weight_specs = [TensorSpec(stored_name(p.name), SAFETENSORS_NAMES[dtype], p.shape) for p in state.params]
    weight_specs += [TensorSpec(n, SAFETENSORS_NAMES[t.dtype], tuple(t.shape)) for n, t in buffers]
    files = plan_files(weights_stem, weight_specs, {"format": "pt"})
    index = weight_index(files)
    if not only_model:
        if dtype != torch.float32:
            master_specs = [TensorSpec(f"master.{p.name}", "F32", p.shape) for p in state.params]
        by_group = {s.group: s for s in state.segments}
        by_param = {s.extents[0].param: s for s in state.segments if s.is_whole}  # here each may have its own states
        for info in state.params:
            for name, tensor in sorted(by_param.get(info.name, by_group[info.group]).elementwise().items()):
                state_specs.append(TensorSpec(f"{name}.{info.name}", SAFETENSORS_NAMES[tensor.dtype], info.shape))
        odd = [
            (f"{name}.{s.extents[0].param}", t)
            for s in state.segments if s.extents for name, t in sorted(s.odd().items())
        ]  # fmt: skip
        state_specs += [TensorSpec(name, SAFETENSORS_NAMES[t.dtype], tuple(t.shape)) for name, t in odd]
        files += plan_files(OPTIMIZER_STEM, [*master_specs, *state_specs], {"format": "pt"})
    plan = SnapshotPlan(files, index=index)
    places = {place.spec.name if f.path.startswith("state/") else f"weight {place.spec.name}": place
              for f in files for place in f.places}  # fmt: skip
    if rank == 0:
        for name, tensor in buffers:
            _plan_whole(plan, tensor, places[f"weight {name}"])
    plan.num_live = len(plan.copies)
    for segment in state.segments:
        _plan_segment(plan, segment, places, dtype, stored_name, only_model)
    return plan


def _plan_segment(
    plan: SnapshotPlan, segment: Segment, places: dict[str, Place], dtype: torch.dtype,
    stored_name: Callable[[str], str], only_model: bool,
) -> None:  # fmt: skip
    if segment.owned:
        if dtype == torch.float32 or not only_model:
            prefix = "weight" if dtype == torch.float32 else "master"

            def target(param: str) -> Place:
                return places[f"weight {stored_name(param)}" if prefix == "weight" else f"master.{param}"]

            _plan_flat(plan, segment, lambda: segment.master, torch.float32, target)
        if dtype != torch.float32:
            _plan_flat(plan, segment, lambda: segment.master, dtype, lambda p: places[f"weight {stored_name(p)}"])
        if not only_model:
            for name, tensor in sorted(segment.elementwise().items()):

                def state_tensor(name: str = name) -> Tensor:
                    return segment.elementwise()[name]

                def state_place(param: str, name: str = name) -> Place:
                    return places[f"{name}.{param}"]

                _plan_flat(plan, segment, state_tensor, tensor.dtype, state_place)
    if not only_model and segment.owned and segment.owned[0].start == 0:
        for name, tensor in segment.odd().items():
            _plan_whole(plan, tensor, places[f"{name}.{segment.owned[0].param}"])


def _plan_flat(
    plan: SnapshotPlan, segment: Segment, source: Callable[[], Tensor], dtype: torch.dtype,
    target: Callable[[str], Place],
) -> None:  # fmt: skip
    """The owned part of a flat tensor, each parameter in it to its place."""
    for extent in segment.owned:
        place = target(extent.param)
        end = extent.offset + extent.numel
        plan.add(source, extent.offset, end, dtype, place.path, place.offset + extent.start * dtype.itemsize)


def _plan_whole(plan: SnapshotPlan, tensor: Tensor, place: Place) -> None:
    plan.add(lambda: tensor.view(-1), 0, tensor.numel(), tensor.dtype, place.path, place.offset)


def _pieces(copies: Iterable[Copy], buffer: Tensor, max_items: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(place in the buffer, source) of everything to copy."""
    for copy in copies:
        source = copy.source()[copy.low : copy.high]
        place = buffer[copy.offset : copy.end].view(copy.dtype)
        yield from zip(place.split(max_items), source.split(max_items), strict=True)


@torch.no_grad()
def take(copies: Iterable[Copy], buffer: Tensor) -> None:
    """Copies into the buffer (uint8); on CUDA the copies are queued on the current stream."""
    for place, source in _pieces(copies, buffer, _DEVICE_COPY_ITEMS):
        place.copy_(source, non_blocking=True)


class HostCopies:
    """Copies on the CPU beside the training: by a thread that only takes what the cores have to spare, and what is left
    in the end by the one who needs it done."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, initializer=process.use_resting_cores)
        self._left: deque[tuple[Tensor, Tensor]] = deque()
        self._thread: Future[None] | None = None

    @torch.no_grad()
    def begin(self, copies: Iterable[Copy], buffer: Tensor) -> None:
        self._left.extend(_pieces(copies, buffer, _HOST_COPY_ITEMS))
        self._thread = self._pool.submit(self._work)

    @torch.no_grad()
    def _work(self) -> None:
        while self._left:
            with contextlib.suppress(IndexError):  # the other one took the last
                place, source = self._left.popleft()
                place.copy_(source)

    def finish(self) -> None:
        """Returns when everything is copied."""
        if self._thread is not None:
            self._work()
            self._thread.result()
            self._thread = None
