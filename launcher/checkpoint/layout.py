"""The files of a checkpoint: which tensor lies where, in the safetensors format. Same on every process.

Source of the format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, the data.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.base.stored import StoredTensor as StoredTensor
from launcher.base.stored import StoredTensors as StoredTensors

MAX_SHARD_BYTES = 5 * 10**9
_ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "F64": 8, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1, "I8": 1, "I16": 2}


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
        return _ITEM_BYTES[self.dtype]


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


def plan_files(
    stem: str, specs: Iterable[TensorSpec], metadata: dict[str, str], *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> list[FileLayout]:
    """Lays tensors out in order, in as many files below `max_shard_bytes` as needed.

    Args:
        stem: path without ending: `model` gives model.safetensors, or model-00001-of-00003.safetensors and so on.
    """
    shards: list[list[TensorSpec]] = [[]]
    used = 0
    for spec in specs:
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


def _layout(path: str, specs: list[TensorSpec], metadata: dict[str, str]) -> FileLayout:
    # safetensors' own writer sorts by falling alignment; readers only need gapless data in header order.
    header: dict[str, Any] = {"__metadata__": metadata}
    offset, starts = 0, []
    for spec in sorted(specs, key=lambda s: -s.item_bytes):
        header[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.num_bytes],
        }
        starts.append((spec, offset))
        offset += spec.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = struct.pack("<Q", len(text)) + text
    places = tuple(Place(path, len(head) + start, spec) for spec, start in starts)
    return FileLayout(path, head, len(head) + offset, places)


def weight_index(layouts: list[FileLayout]) -> bytes | None:
    """model.safetensors.index.json for more than one shard, as transformers reads it."""
    if len(layouts) == 1:
        return None
    weight_map = {place.spec.name: layout.path for layout in layouts for place in layout.places}
    total = sum(place.spec.num_bytes for layout in layouts for place in layout.places)
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2).encode()


def read_places(path: Path) -> dict[str, Place]:
    """The tensors of a safetensors file and where their data begins.

    Raises:
        ValueError: not a safetensors file.
    """
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > 100 * 2**20:
            raise ValueError(f"{path} is not a safetensors file")
        header = json.loads(file.read(length))
    places = {}
    for name, entry in header.items():
        if name != "__metadata__":
            spec = TensorSpec(name, entry["dtype"], tuple(entry["shape"]))
            places[name] = Place(str(path), 8 + length + entry["data_offsets"][0], spec)
    return places


def iter_safetensors(folder: Path, stem: str) -> Iterator[Path]:
    """The files that `plan_files(stem)` made in a folder."""
    single = folder / f"{stem}.safetensors"
    if single.is_file():
        yield single
    else:
        yield from sorted(folder.glob(f"{stem}-*-of-*.safetensors"))
