"""The files of a checkpoint: which tensor lies where, in the safetensors format. Same on every process.

Source of the format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, the data.
The data begins at a block of the disk (the header is padded with spaces, as the format allows), and tensors of whole
blocks come first: what processes write then begins and ends at blocks wherever the shapes allow it.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from launcher.base.block_io import BLOCK_BYTES
from launcher.base.stored import StoredTensor, StoredTensors

MAX_SHARD_BYTES = 5 * 10**9
ITEM_BYTES = {
    "F32": 4, "BF16": 2, "F16": 2, "F64": 8, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2,
    "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "C64": 8,
}  # fmt: skip
"""By safetensors dtype."""


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to store: safetensors dtype name and full shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.numel * self.item_bytes

    @property
    def item_bytes(self) -> int:
        return ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Place:
    """Where a stored tensor's data begins: file (relative path) and byte offset in it."""

    path: str
    offset: int
    spec: TensorSpec


@dataclass(frozen=True)
class FileLayout:
    """One safetensors file: its header bytes and its total length."""

    path: str
    header: bytes
    num_bytes: int
    places: tuple[Place, ...]

    @property
    def data_start(self) -> int:
        return len(self.header)


def stored_parts(stored: StoredTensors, name: str, shape: tuple[int, ...]) -> tuple[StoredTensor, ...]:
    """The tensors of the model file that a parameter is stored as."""
    return stored.get(name) or (StoredTensor(name, shape, 0),)


def overlaps(parts: Iterable[StoredTensor], start: int, numel: int) -> Iterator[tuple[StoredTensor, int, int]]:
    """Elements [start, start + numel) of a parameter, cut at its stored tensors: (tensor, first element, number)."""
    for part in parts:
        low, high = max(start, part.start), min(start + numel, part.start + part.numel)
        if low < high:
            yield part, low, high - low


@dataclass(frozen=True)
class Column:
    """A parameter in a partition: elements [r · width, (r + 1) · width) of it are elements [start, start + width) of
    row r."""

    shape: tuple[int, ...]
    start: int
    width: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Partition:
    """Parameters that are cut into as many pieces as there are processes, every one of them (ZeRO-3).

    Under their own names every process would write a piece of every tensor: thousands of small writes. So each state
    (`exp_avg`) of the partition is stored as `num_rows` flat tensors `exp_avg.<name>.<row>`, one of each process, whole
    blocks long. Elements that belong to no parameter are zero.
    """

    name: str
    num_rows: int
    columns: Mapping[str, Column]
    slots: Mapping[str, str] = field(default_factory=dict)
    """The stored states and their safetensors dtypes."""

    @cached_property
    def row_numel(self) -> int:
        """Elements of a row: whole blocks, also where an element is one byte."""
        used = max((c.start + c.width for c in self.columns.values()), default=0)
        return -(-used // BLOCK_BYTES) * BLOCK_BYTES

    def row_name(self, slot: str, row: int) -> str:
        return f"{slot}.{self.name}.{row:05d}"

    def row_spec(self, slot: str, row: int) -> TensorSpec:
        return TensorSpec(self.row_name(slot, row), self.slots[slot], (self.row_numel,))


def plan_files(
    stem: str, specs: Iterable[TensorSpec], metadata: dict[str, str], *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> list[FileLayout]:
    """Lays tensors out in order, those of whole blocks first, in as many files below `max_shard_bytes` as needed.

    Args:
        stem: path without ending: `model` gives model.safetensors, or model-00001-of-00003.safetensors and so on.
    """
    shards: list[list[TensorSpec]] = [[]]
    used = 0
    for spec in sorted(specs, key=_alignment):
        if shards[-1] and used + spec.num_bytes > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(spec)
        used += spec.num_bytes
    count = len(shards)
    names = (
        [f"{stem}.safetensors"]
        if count == 1
        else [f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    )
    return [_layout(name, shard, metadata) for name, shard in zip(names, shards, strict=True)]


def _alignment(spec: TensorSpec) -> int:
    """Whole blocks first, then by falling item size, as safetensors' own writer does: every tensor is aligned."""
    return -BLOCK_BYTES if spec.num_bytes % BLOCK_BYTES == 0 else -spec.item_bytes


def _layout(path: str, specs: list[TensorSpec], metadata: dict[str, str]) -> FileLayout:
    header: dict[str, Any] = {"__metadata__": metadata}
    offset, starts = 0, []
    for spec in specs:
        header[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.num_bytes],
        }
        starts.append((spec, offset))
        offset += spec.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % BLOCK_BYTES)
    head = struct.pack("<Q", len(text)) + text
    places = tuple(Place(path, len(head) + start, spec) for spec, start in starts)
    return FileLayout(path, head, len(head) + offset, places)


def index_path(stem: str) -> str:
    return f"{stem}.safetensors.index.json"


def weight_index(layouts: list[FileLayout]) -> bytes | None:
    """model.safetensors.index.json for more than one shard, as transformers reads it."""
    return None if len(layouts) == 1 else _index_text(layouts, {})


def state_index(layouts: list[FileLayout], partitions: Iterable[Partition]) -> bytes | None:
    """The same for the optimizer's states; it also says what the rows of partitions hold."""
    described = {
        p.name: {
            "num_rows": p.num_rows,
            "slots": dict(p.slots),
            "columns": {name: [list(c.shape), c.start, c.width] for name, c in p.columns.items()},
        }
        for p in partitions
    }
    return _index_text(layouts, {"partitions": described}) if described else weight_index(layouts)


def _index_text(layouts: list[FileLayout], more: dict[str, Any]) -> bytes:
    weight_map = {place.spec.name: layout.path.rpartition("/")[2] for layout in layouts for place in layout.places}
    total = sum(place.spec.num_bytes for layout in layouts for place in layout.places)
    return json.dumps({"metadata": {"total_size": total}, **more, "weight_map": weight_map}, indent=1).encode()


def iter_safetensors(folder: Path, stem: str, listed: Collection[str] | None = None) -> Iterator[Path]:
    """The files that `plan_files(stem)` made in a folder; of a checkpoint only those that its manifest lists."""
    if listed is None:
        single = folder / f"{stem}.safetensors"
        yield from [single] if single.is_file() else sorted(folder.glob(f"{stem}-*-of-*.safetensors"))
        return
    shard = re.compile(re.escape(stem) + r"-\d+-of-\d+\.safetensors")
    single_name = f"{stem}.safetensors"
    names = [single_name] if single_name in listed else sorted(path for path in listed if shard.fullmatch(path))
    yield from (folder / name for name in names)


def deal_out(sizes: dict[str, int], count: int) -> list[list[str]]:
    """Deals files out to processes, about the same number of bytes to each."""
    shares: list[list[str]] = [[] for _ in range(count)]
    loads = [0] * count
    for path in sorted(sizes, key=lambda path: -sizes[path]):
        lightest = loads.index(min(loads))
        shares[lightest].append(path)
        loads[lightest] += sizes[path]
    return shares
