"""What a pretrained model is, whatever its folder is called: a hash of its config, its tensors' names and samples."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launcher.base.errors import UserError
from launcher.base.processes import Processes
from launcher.config.settings import RunConfig

_PAGE_BYTES = 4096
_MAX_PAGES = 1024
"""Read of all the weights together: a megabyte or two, where hashing 14 GB would take as long as loading them."""
_NOT_THE_MODEL = ("transformers_version", "_name_or_path", "torch_dtype", "dtype", "use_cache")
"""Fields of config.json that say by whom and for what it was written."""


def agreed_identity(config: RunConfig, processes: Processes) -> str | None:
    """`identity` of the run's pretrained model, the same for all machines. Collective.

    Returns:
        None: trained from scratch, or its files are not here (a Hub model that was not downloaded yet).

    Raises:
        UserError: the machines have different models under that name.
    """
    name, mine = config.model.model_name_or_path, None
    if name and processes.is_local_main:
        folder = local_folder(name, config.model.revision)
        with contextlib.suppress(OSError, ValueError, KeyError, struct.error):  # loading it says what is wrong with it
            mine = identity(folder) if folder is not None else None
    found = {value for value in processes.gather(mine) if value is not None}
    if len(found) > 1:
        raise UserError(
            f"model.model_name_or_path={name} is not the same model on all machines: its config.json or its weights "
            "differ. Put it on a disk that they share, or copy it again"
        )
    return found.pop() if found else None


def local_folder(name: str, revision: str | None, file: str = "config.json") -> Path | None:
    """The folder of a model, or of its copy in the Hub's cache, by a file that it has. No network call."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    from transformers.utils.hub import cached_file

    try:
        found = cached_file(name, file, revision=revision, local_files_only=True)
    except (OSError, ValueError):
        return None
    return Path(found).parent if found else None


def identity(folder: Path) -> str | None:
    """A hash that other weights or another config do not share; the folder's name and its shards do not matter.

    Of the weights: every tensor's name, dtype and shape, and a page out of the middle of up to 1024 of them, so it
    takes no longer for a large model. Training changes every page of a tensor; a change of a few numbers by hand may be
    missed.

    Returns:
        None where there are no weights that transformers would load.
    """
    files = _weight_files(folder)
    if not files or not (folder / "config.json").is_file():
        return None
    config = json.loads((folder / "config.json").read_bytes())
    digest = hashlib.sha256()
    digest.update(json.dumps({k: v for k, v in config.items() if k not in _NOT_THE_MODEL}, sort_keys=True).encode())
    is_safetensors = files[0].suffix == ".safetensors"
    pieces = sorted(p for f in files for p in (_tensors(f) if is_safetensors else _blocks(f)))
    for label, *_ in pieces:
        digest.update(label.encode() + b"\0")
    for label, path, offset, num_bytes in pieces[:: -(-len(pieces) // _MAX_PAGES)]:
        with Path(path).open("rb") as file:
            count = min(_PAGE_BYTES, num_bytes)
            page = os.pread(file.fileno(), count, offset + (num_bytes - count) // 2)
        digest.update(label.encode() + b"\0" + page)
    return digest.hexdigest()


def _weight_files(folder: Path) -> list[Path]:
    """In the order in which transformers looks for them."""
    for single, index in (
        ("model.safetensors", "model.safetensors.index.json"),
        ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    ):
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            names = set(json.loads((folder / index).read_bytes())["weight_map"].values())
            paths = [folder / name for name in sorted(names)]
            return paths if all(path.is_file() for path in paths) else []
    return []


def _tensors(path: Path) -> Iterator[tuple[str, str, int, int]]:
    """(what it is, file, offset, bytes) of every tensor of a safetensors file."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header: dict[str, Any] = json.loads(file.read(length))
    for name, entry in header.items():
        if name != "__metadata__":
            low, high = entry["data_offsets"]
            yield f"{name} {entry['dtype']} {entry['shape']}", str(path), 8 + length + low, high - low


def _blocks(path: Path) -> Iterator[tuple[str, str, int, int]]:
    """The same of a file whose tensors are not known, in 128 pieces."""
    size = path.stat().st_size
    step = max(1, -(-size // 128))
    for low in range(0, size, step):
        yield f"{path.name} {size} {low:015d}", str(path), low, min(step, size - low)
