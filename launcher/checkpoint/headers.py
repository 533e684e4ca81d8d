"""Reading the header of a safetensors file, which may come from anywhere: nothing in it is believed.

What is refused is what the safetensors library refuses: its `Metadata::validate` wants the tensors to cover the data
exactly, in order, without a gap, an overlap or a byte left over. Beyond it: a bound on the header's length that is
checked before anything is read, twice the same name, and anything that is not a file.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from launcher.base import files
from launcher.base.errors import DamagedCheckpointError
from launcher.checkpoint.layout import ITEM_BYTES, Column, Partition, Place, TensorSpec

MAX_HEADER_BYTES = 16 * 2**20
"""For about 100,000 tensors in one file, which take half a second. The library allows 100 MB: 20 s and 1 GB."""
_MAX_DIMENSIONS = 64
_METADATA = "__metadata__"


def read_places(path: Path, *, within: Path | None = None) -> dict[str, Place]:
    """The tensors of a safetensors file and where their data begins; it is opened as `files.open_fd` opens it.

    Raises:
        DamagedCheckpointError: it cannot be read, or is not a whole safetensors file.
    """
    try:
        with files.open_read(path, within=within) as file:
            size = os.fstat(file.fileno()).st_size
            return _places(path, size, _header(file, size))
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedCheckpointError(f"{path} is not a whole safetensors file: {error}") from error


def _header(file: BinaryIO, size: int) -> bytes:
    start = file.read(8)
    if len(start) < 8:
        raise ValueError(f"it has {len(start)} bytes")
    (length,) = struct.unpack("<Q", start)
    if length > size - 8:
        raise ValueError(f"a header of {length:,} bytes in a file of {size:,}")
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"a header of {length:,} bytes, at most {MAX_HEADER_BYTES:,} are read")
    text = file.read(length)
    if text[:1] != b"{":
        raise ValueError("its header does not begin with {")
    return text


def _places(path: Path, size: int, text: bytes) -> dict[str, Place]:
    header = json.loads(text.decode(), object_pairs_hook=_unique, parse_constant=_refuse)
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{_METADATA} is not a map from text to text")
    data_start = 8 + len(text)
    found = []
    for name, entry in header.items():
        spec, (start, end) = _entry(name, entry)
        if end - start != spec.num_bytes:
            raise ValueError(f"{name} has {end - start} bytes, {spec.dtype}{list(spec.shape)} needs {spec.num_bytes}")
        found.append((start, end, spec))
    covered = 0
    for start, end, spec in sorted(found, key=lambda item: item[:2]):
        if start != covered:
            raise ValueError(f"{spec.name} begins at byte {start} of the data, the tensor before it ends at {covered}")
        covered = end
    if data_start + covered != size:
        raise ValueError(f"its tensors end at byte {data_start + covered}, the file at {size}")
    return {spec.name: Place(str(path), data_start + start, spec) for start, _, spec in found}


def _entry(name: str, entry: Any) -> tuple[TensorSpec, tuple[int, int]]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name} has not dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise ValueError(f"{name} has the dtype {dtype!r}, known are {', '.join(ITEM_BYTES)}")
    if not _is_counts(shape) or len(shape) > _MAX_DIMENSIONS or math.prod(shape) >= 2**63:
        raise ValueError(f"{name} has an impossible shape")
    if not _is_counts(offsets) or len(offsets) != 2:
        raise ValueError(f"{name} has impossible data_offsets")
    return TensorSpec(name, dtype, tuple(shape)), (offsets[0], offsets[1])


@dataclass(frozen=True)
class StateIndex:
    """What the index of the optimizer's states says; empty where there is none. File names are within its folder."""

    weight_map: Mapping[str, str]
    partitions: tuple[Partition, ...]

    def names(self, file_name: str) -> set[str]:
        """The tensors of a file."""
        return {name for name, found in self.weight_map.items() if found == file_name}


def read_state_index(path: Path, *, within: Path | None = None) -> StateIndex:
    """The index that `layout.state_index` or `layout.weight_index` made.

    Raises:
        DamagedCheckpointError: it cannot be read, or describes partitions that its files cannot hold.
    """
    try:
        text = files.read_bytes(path, MAX_HEADER_BYTES, within=within)
        raw = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse)
        weight_map = raw["weight_map"]
        if not all(isinstance(name, str) and Path(name).name == name for name in weight_map.values()):
            raise ValueError("its weight_map names files elsewhere")
        partitions = tuple(_partition(name, entry) for name, entry in raw.get("partitions", {}).items())
        for p in partitions:
            if p.num_rows > len(weight_map):  # before that many names are made
                raise ValueError(f"{p.name} has {p.num_rows} rows, there are {len(weight_map)} tensors")
            missing = {p.row_name(slot, row) for slot in p.slots for row in range(p.num_rows)} - set(weight_map)
            if missing:
                raise ValueError(f"{min(missing)} is in no file")
        return StateIndex(weight_map, partitions)
    except FileNotFoundError:
        return StateIndex({}, ())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedCheckpointError(f"{path} cannot be read: {error}") from error


def _partition(name: str, entry: Any) -> Partition:
    num_rows, slots, columns = entry["num_rows"], entry["slots"], {}
    if not _is_counts([num_rows]) or not all(dtype in ITEM_BYTES for dtype in slots.values()):
        raise ValueError(f"{name} has impossible rows or states")
    for param, (shape, start, width) in entry["columns"].items():
        if not _is_counts(shape) or not _is_counts([start, width]) or width * num_rows < math.prod(shape):
            raise ValueError(f"{param} does not fit into {name}")
        columns[param] = Column(tuple(shape), start, width)
    return Partition(name, num_rows, columns, slots)


def _is_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands in it twice")
    return found


def _refuse(text: str) -> Any:
    raise ValueError(f"{text} is not a number")
