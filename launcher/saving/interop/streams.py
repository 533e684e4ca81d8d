"""Tensors from anywhere into safetensors files, chunk by chunk, so that neither side is ever whole in memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from launcher.base import files
from launcher.base.errors import DamagedCheckpointError
from launcher.base.stored import StoredTensor
from launcher.checkpoint.layout import MAX_SHARD_BYTES, FileLayout, Place, TensorSpec, plan_files, weight_index
from launcher.checkpoint.load import TensorFiles
from launcher.checkpoint.snapshot import SAFETENSORS_NAMES, TORCH_DTYPES

CHUNK_ITEMS = 2**22


@dataclass(frozen=True)
class Source:
    """A tensor to store under `spec`, and its content: (number of the first element, flat tensor) in pieces."""

    spec: TensorSpec
    pieces: Callable[[], Iterable[tuple[int, Tensor]]]

    def renamed(self, name: str) -> Source:
        return Source(replace(self.spec, name=name), self.pieces)

    def in_dtype(self, dtype: torch.dtype) -> Source:
        """To be stored in another dtype; integers stay what they are."""
        if not TORCH_DTYPES[self.spec.dtype].is_floating_point:
            return self
        return Source(replace(self.spec, dtype=SAFETENSORS_NAMES[dtype]), self.pieces)


def from_memory(name: str, tensor: Tensor) -> Source:
    """A tensor in memory, or memory-mapped."""
    spec = TensorSpec(name, SAFETENSORS_NAMES[tensor.dtype], tuple(tensor.shape))
    return Source(spec, lambda: [(0, tensor.detach().reshape(-1))])


def from_file(stored: TensorFiles, name: str) -> Source:
    """A tensor of a safetensors file, read when it is written."""
    return part_of_file(stored, name, StoredTensor(name, stored.specs[name].shape, 0))


def part_of_file(stored: TensorFiles, name: str, part: StoredTensor) -> Source:
    """A part of a stored tensor as a tensor of its own."""
    dtype = stored.specs[name].dtype

    def pieces() -> Iterator[tuple[int, Tensor]]:
        for start in range(0, part.numel, CHUNK_ITEMS):
            chunk = torch.empty(min(CHUNK_ITEMS, part.numel - start), dtype=TORCH_DTYPES[dtype])
            stored.read_into(name, part.start + start, chunk)
            yield start, chunk

    return Source(TensorSpec(part.name, dtype, part.shape), pieces)


def write_sources(
    folder: Path, stem: str, sources: list[Source], *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> list[FileLayout]:
    """Writes safetensors files, and the index where they are more than one. The bytes are durable on return.

    Raises:
        DamagedCheckpointError: a source did not give each of its elements once.
    """
    by_name = {source.spec.name: source for source in sources}
    layouts = plan_files(stem, [s.spec for s in sources], {"format": "pt"}, max_shard_bytes=max_shard_bytes)
    for layout in layouts:
        path = folder / layout.path
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            os.ftruncate(fd, layout.num_bytes)
            files.write_at(fd, layout.header, 0, path)
            for place in layout.places:
                _write_tensor(fd, path, place, by_name[place.spec.name])
            files.fsync_file(fd, path)
        finally:
            os.close(fd)
    index = weight_index(layouts)
    if index is not None:
        files.write_file(folder / f"{stem}.safetensors.index.json", index)
    return layouts


def _write_tensor(fd: int, path: Path, place: Place, source: Source) -> None:
    dtype, item, written = TORCH_DTYPES[place.spec.dtype], place.spec.item_bytes, 0
    for start, flat in source.pieces():
        for low in range(0, flat.numel(), CHUNK_ITEMS):
            part = flat[low : low + CHUNK_ITEMS].to(dtype).contiguous()
            data = memoryview(part.view(torch.uint8).numpy())  # type: ignore[arg-type]
            files.write_at(fd, data, place.offset + (start + low) * item, path)
        written += flat.numel()
    if written != place.spec.numel:
        raise DamagedCheckpointError(f"{place.spec.name} has {written} elements instead of {place.spec.numel}")
