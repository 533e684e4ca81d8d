"""What one process contributes to a checkpoint: which bytes it copies into the buffer and where they go on disk."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from launcher.base import process
from launcher.base.block_io import BLOCK_BYTES
from launcher.base.stored import StoredTensor, StoredTensors
from launcher.checkpoint.layout import (
    FileLayout,
    Partition,
    Place,
    TensorSpec,
    index_path,
    overlaps,
    plan_files,
    state_index,
    stored_parts,
    weight_index,
)
from launcher.checkpoint.segments import Extent, Segment, TrainedState, Untrained, in_file_order, persistent_buffers

SAFETENSORS_NAMES = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint64: "U64", torch.uint32: "U32",
    torch.uint16: "U16", torch.uint8: "U8", torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2", torch.float8_e8m0fnu: "F8_E8M0", torch.complex64: "C64",
}  # fmt: skip
TORCH_DTYPES = {name: dtype for dtype, name in SAFETENSORS_NAMES.items()}
MASTER = "master"
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
    heads: tuple[str, ...] = ()
    """The files whose header this process writes: those whose first data byte is its own."""
    texts: dict[str, str] = field(default_factory=dict)
    """Indexes of files, by path; on the main process."""

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
        if last and last.source is source and last.dtype == dtype and (last.high, last.end) == (low, offset):
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


@dataclass(frozen=True)
class _Piece:
    """Elements [low, high) of a flat source, and the place in a file where they begin."""

    source: Callable[[], Tensor]
    low: int
    high: int
    dtype: torch.dtype
    path: str
    offset: int
    is_live: bool = False


def plan_snapshot(
    state: TrainedState, module: torch.nn.Module, *, dtype: torch.dtype, weights_stem: str, stored: StoredTensors,
    only_model: bool, rank: int,
) -> SnapshotPlan:  # fmt: skip
    """Lays out the checkpoint's files and this process's part of them.

    Args:
        dtype: of the weights in the model files. What is fp32 there needs no master beside it.
        weights_stem: `model` or `adapter_model`.
        stored: how the model file cuts and names parameters and buffers; of those that are not trained it holds only
            what is named here.
        only_model: leave the optimizer and the masters out.
    """
    untrained = [u for u in (*state.frozen, *persistent_buffers(module, rank)) if u.name in stored]
    shapes = {p.name: p.shape for p in state.params} | {u.name: u.shape for u in untrained}
    parts = {name: stored_parts(stored, name, shape) for name, shape in shapes.items()}
    default = SAFETENSORS_NAMES[dtype]
    inexact = {p.name for p in state.params if any((t.dtype or default) != "F32" for t in parts[p.name])}
    weights = [
        TensorSpec(t.name, t.dtype or default, t.shape) for p in in_file_order(state.params) for t in parts[p.name]
    ]
    for entry in untrained:
        own = entry.source().dtype
        plain = default if own.is_floating_point else SAFETENSORS_NAMES[own]
        weights += [TensorSpec(t.name, t.dtype or plain, t.shape) for t in parts[entry.name]]
    model_files = plan_files(weights_stem, weights, {"format": "pt"})
    pieces = list(_weight_pieces(state, untrained, parts, _places(model_files)))
    state_files: list[FileLayout] = []
    indexes = {index_path(weights_stem): weight_index(model_files)}
    if not only_model:
        specs, partitions = _state_specs(state, inexact)
        state_files = plan_files(OPTIMIZER_STEM, specs, {"format": "pt"})
        indexes[index_path(OPTIMIZER_STEM)] = state_index(state_files, partitions.values())
        pieces += _state_pieces(state, inexact, partitions, _places(state_files), rank)
    plan = _assembled([*model_files, *state_files], pieces, rank)
    plan.texts = {path: text.decode() for path, text in indexes.items() if text is not None and rank == 0}
    return plan


def _assembled(files: list[FileLayout], pieces: list[_Piece], rank: int) -> SnapshotPlan:
    """Adds the pieces in the order of the files, so that neighbours become one range."""
    plan = SnapshotPlan(files)
    number = {layout.path: i for i, layout in enumerate(files)}
    ordered = sorted(pieces, key=lambda p: (not p.is_live, number[p.path], p.offset))
    for piece in ordered:
        plan.add(piece.source, piece.low, piece.high, piece.dtype, piece.path, piece.offset)
        if piece.is_live:
            plan.num_live = len(plan.copies)
    first = {(piece.path, piece.offset) for piece in pieces}
    plan.heads = tuple(
        f.path for f in files if (f.path, f.data_start) in first or (rank == 0 and f.num_bytes == f.data_start)
    )
    return plan


def _places(files: list[FileLayout]) -> dict[str, Place]:
    return {place.spec.name: place for layout in files for place in layout.places}


def _placed(
    source: Callable[[], Tensor], low: int, high: int, place: Place, start: int, is_live: bool = False
) -> _Piece:
    """Elements of a source as elements [start, …) of a stored tensor."""
    offset = place.offset + start * place.spec.item_bytes
    return _Piece(source, low, high, TORCH_DTYPES[place.spec.dtype], place.path, offset, is_live)


def _weight_pieces(
    state: TrainedState, untrained: list[Untrained], parts: dict[str, tuple[StoredTensor, ...]],
    places: dict[str, Place],
) -> Iterator[_Piece]:  # fmt: skip
    owners: list[tuple[Callable[[], Tensor], tuple[Extent, ...], bool]]
    owners = [(partial(getattr, segment, "master"), segment.owned, False) for segment in state.segments]
    owners += [(entry.source, entry.owned, entry.is_buffer) for entry in untrained]
    for source, owned, is_live in owners:
        for extent in owned:
            for part, start, numel in overlaps(parts[extent.param], extent.start, extent.numel):
                low = extent.offset + start - extent.start
                yield _placed(source, low, low + numel, places[part.name], start - part.start, is_live)


def _slots(segment: Segment, inexact: set[str]) -> dict[str, tuple[str, Callable[[], Tensor]]]:
    """What is stored of a segment beside the weights: safetensors dtype and the flat tensor, by name of the state."""
    found: dict[str, tuple[str, Callable[[], Tensor]]] = {}
    if any(extent.param in inexact for extent in segment.extents):
        found[MASTER] = "F32", partial(getattr, segment, "master")
    for name, tensor in sorted(segment.elementwise().items()):
        found[name] = SAFETENSORS_NAMES[tensor.dtype], partial(_elementwise, segment, name)
    return found


def _elementwise(segment: Segment, name: str) -> Tensor:
    return segment.elementwise()[name]


def _state_specs(state: TrainedState, inexact: set[str]) -> tuple[list[TensorSpec], dict[str, Partition]]:
    """The tensors of the state files: of partitions each process's rows together, else one state after the other."""
    partitions = {}
    for segment in state.segments:
        if segment.partition is not None:
            columns = segment.partition.columns
            slots = {n: dtype for n, (dtype, _) in _slots(segment, set()).items()}
            slots = {**({MASTER: "F32"} if inexact & columns.keys() else {}), **slots}
            partitions[segment.partition.name] = replace(segment.partition, slots=slots)
    num_rows = max((p.num_rows for p in partitions.values()), default=0)
    specs = [p.row_spec(slot, row) for row in range(num_rows) for p in partitions.values() for slot in p.slots]
    by_group = {s.group: s for s in state.segments}
    by_param = {s.extents[0].param: s for s in state.segments if s.is_whole}  # here each may have its own states
    by_slot: dict[str, list[TensorSpec]] = {MASTER: []}
    cut = {name for p in partitions.values() for name in p.columns}
    for info in in_file_order(p for p in state.params if p.name not in cut):
        if info.name in inexact:
            by_slot[MASTER].append(TensorSpec(f"{MASTER}.{info.name}", "F32", info.shape))
        for name, tensor in by_param.get(info.name, by_group[info.group]).elementwise().items():
            dtype = SAFETENSORS_NAMES[tensor.dtype]
            by_slot.setdefault(name, []).append(TensorSpec(f"{name}.{info.name}", dtype, info.shape))
    specs += [spec for name in sorted(by_slot) for spec in by_slot[name]]
    specs += [
        TensorSpec(f"{name}.{s.extents[0].param}", SAFETENSORS_NAMES[tensor.dtype], tuple(tensor.shape))
        for s in state.segments if s.extents for name, tensor in sorted(s.odd().items())
    ]  # fmt: skip
    return specs, partitions


def _state_pieces(
    state: TrainedState, inexact: set[str], partitions: dict[str, Partition], places: dict[str, Place], rank: int
) -> Iterator[_Piece]:
    for segment in state.segments:
        if segment.partition is not None:
            yield from _row_pieces(segment, partitions[segment.partition.name], places, rank)
            continue
        for name, (_, source) in _slots(segment, inexact).items() if segment.owned else ():
            for e in segment.owned:
                if name != MASTER or e.param in inexact:
                    yield _placed(source, e.offset, e.offset + e.numel, places[f"{name}.{e.param}"], e.start)
        if segment.owned and segment.owned[0].start == 0:
            for name, tensor in segment.odd().items():
                place = places[f"{name}.{segment.owned[0].param}"]
                yield _placed(partial(torch.flatten, tensor), 0, tensor.numel(), place, 0)


def _row_pieces(segment: Segment, partition: Partition, places: dict[str, Place], rank: int) -> Iterator[_Piece]:
    """This process's row, all of it: what belongs to no parameter is written as zeros."""
    sources = {name: source for name, (_, source) in _slots(segment, set(partition.columns)).items()}
    for slot in partition.slots:
        place, end = places[partition.row_name(slot, rank)], 0
        zeros = partial(_zeros, partition.row_numel)
        for e in (*segment.owned, Extent("", 0, 0, partition.row_numel)):
            if end < e.offset:
                yield _placed(zeros, end, e.offset, place, end)
            if e.numel:
                yield _placed(sources[slot], e.offset, e.offset + e.numel, place, e.offset)
            end = e.offset + e.numel


def _zeros(numel: int) -> Tensor:
    return torch.zeros(1, dtype=torch.uint8).expand(numel)


def _pieces(copies: Iterable[Copy], buffer: Tensor, max_items: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(place in the buffer, source) of everything to copy."""
    for copy in copies:
        source = copy.source()[copy.low : copy.high]
        place = buffer[copy.offset : copy.end].view(copy.dtype)
        yield from zip(place.split(max_items), source.split(max_items), strict=True)


@torch.no_grad()
def take(copies: Iterable[Copy], buffer: Tensor, stream: torch.cuda.Stream | None = None) -> None:
    """Copies into the buffer (uint8); on CUDA the copies are queued on the current stream.

    Args:
        stream: the current one, where it is not the one on which the sources were made: their memory is then not given
            to anybody else before the copies are done, even if the optimizer lets go of a tensor.
    """
    for place, source in _pieces(copies, buffer, _DEVICE_COPY_ITEMS):
        place.copy_(source, non_blocking=True)
        if stream is not None:
            source.record_stream(stream)


class HostCopies:
    """Copies on the CPU beside the training: by a thread that only takes what the cores have to spare, and what is left
    in the end by the one who needs it done."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, initializer=process.use_resting_cores)
        self._left: deque[tuple[Tensor, Tensor]] = deque()
        self._is_begun = False
        self._is_done = threading.Event()
        self._error: Exception | None = None
        self._helping = threading.Lock()

    def begin(self, copies: Iterable[Copy], buffer: Tensor, then: Callable[[], None]) -> None:
        """Args: then: what the thread does when everything is copied."""
        self._left.extend(_pieces(copies, buffer, _HOST_COPY_ITEMS))
        self._is_begun = True
        self._is_done.clear()
        self._pool.submit(self._work_and, then)

    def _work_and(self, then: Callable[[], None]) -> None:
        try:
            self._work()
        except Exception as error:
            self._error = error
            return
        finally:
            self._is_done.set()
        with self._helping:  # who needs it done may still copy what it took
            pass
        then()

    @torch.no_grad()
    def _work(self) -> None:
        while self._left:
            with contextlib.suppress(IndexError):  # the other one took the last
                place, source = self._left.popleft()
                place.copy_(source)

    def finish(self) -> None:
        """Returns when everything is copied."""
        if self._is_begun:
            with self._helping:
                self._work()
            self._is_done.wait()
            self._is_begun = False
            if self._error is not None:
                raise self._error
