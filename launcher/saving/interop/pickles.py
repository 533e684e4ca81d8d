"""Foreign pickles: read with `weights_only` and an allow list, or refused by name. Nothing in them is ever executed."""

from __future__ import annotations

import contextlib
import os
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launcher.base import files
from launcher.base.errors import DamagedCheckpointError, ResumeError


class Fragment:
    """Stands in for DeepSpeed's `fragment_address`; not read."""


class LossScaler:
    """Stands in for DeepSpeed's loss scalers; only plain numbers are taken from it."""


_STAGES = {"disabled": 0, "optimizer_states": 1, "gradients": 2, "weights": 3}
"""The members of DeepSpeed's `ZeroStageEnum`."""


def _stage_by_name(*given: Any) -> int:
    """Stands in for `getattr`, by which Python 3.11.0 to 3.11.3 pickle the members of an enumeration."""
    match given:
        case (owner, str(name)) if owner is int and name in _STAGES:
            return _STAGES[name]
    raise pickle.UnpicklingError("builtins.getattr of something else than a stage of ZeRO")


# What a pickle may name, beside tensors and plain containers. Stand-ins of our own, so that DeepSpeed is not imported
# and none of its code runs.
_ALLOWED: list[Any] = [
    (Fragment, "deepspeed.utils.tensor_fragment.fragment_address"),
    (LossScaler, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (LossScaler, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (_stage_by_name, "builtins.getattr"),
]


_MAX_SHARED = 4
"""How often the bytes of a file may be tensors, on average: tied weights are several tensors in the same bytes."""


def load_pickle(path: Path) -> Any:
    """The content of a torch.save file; its tensors stay on disk (memory-mapped) until they are read.

    None of them is larger than what lies in the file for it: views with stride 0 and compressed entries, by which a few
    bytes would become terabytes when they are written out, are refused.

    Raises:
        ResumeError: it names something outside the allow list. DamagedCheckpointError: it cannot be read, or its
        tensors are larger than the file.
    """
    size = _check_archive(path)
    with torch.serialization.safe_globals(_ALLOWED), warnings.catch_warnings(action="ignore"):
        try:
            value = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            raise ResumeError(
                f"{path} is refused, nothing in it was executed: it names {_refused(path)}. Only tensors, plain values "
                "and DeepSpeed's records of its partitions are read. Save it again without objects of your own in it"
            ) from error
        except Exception as error:  # whatever bytes that nobody meant to write make of torch's reader
            raise DamagedCheckpointError(f"{path} cannot be read: {error!r:.500}") from error
    try:
        if _tensor_bytes(value, {}) > _MAX_SHARED * size:
            raise ValueError("its tensors have more bytes than are in the file")
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpointError(f"{path} is refused: {error}") from error
    return value


def _check_archive(path: Path) -> int:
    """The bytes of a torch.save file, whose entries are stored as they are, one behind the other."""
    try:
        with files.open_read(path) as file, zipfile.ZipFile(file) as archive:
            size = os.fstat(file.fileno()).st_size
            entries = archive.infolist()
    except Exception as error:  # zipfile's own errors, and those of struct and of text in odd encodings
        raise DamagedCheckpointError(
            f"{path} cannot be read, it is no whole file of torch.save: {error!r:.500}"
        ) from error
    squeezed = [e.filename for e in entries if e.compress_type != zipfile.ZIP_STORED or e.file_size != e.compress_size]
    if squeezed or sum(entry.file_size for entry in entries) > size:
        what = f"{squeezed[0]} is compressed" if squeezed else "its entries overlap"
        raise DamagedCheckpointError(f"{path} was not written by torch.save: {what}")
    return size


def _tensor_bytes(value: Any, known: dict[int, int]) -> int:
    """Bytes of all tensors inside plain containers, as often as they can be reached.

    Raises:
        ValueError: one is not dense, or larger than its part of the file.
    """
    if id(value) in known:  # also where a container holds itself
        return known[id(value)]
    known[id(value)] = 0
    if isinstance(value, Tensor):
        known[id(value)] = _checked_bytes(value)
    elif isinstance(value, dict):
        known[id(value)] = sum(_tensor_bytes(inner, known) for pair in value.items() for inner in pair)
    elif isinstance(value, (list, tuple, set, frozenset)):
        known[id(value)] = sum(_tensor_bytes(inner, known) for inner in value)
    elif isinstance(value, (Fragment, LossScaler)):
        known[id(value)] = _tensor_bytes(vars(value), known)
    return known[id(value)]


def _checked_bytes(tensor: Tensor) -> int:
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        raise ValueError("a tensor in it is not dense")
    num_bytes = tensor.numel() * tensor.element_size()
    if num_bytes > tensor.untyped_storage().nbytes():
        raise ValueError(f"a tensor of shape {list(tensor.shape)} has {num_bytes:,} bytes that are not in the file")
    return num_bytes


def _refused(path: Path) -> str:
    """What a pickle names outside the allow list; found by reading it as data."""
    names: list[str] = []
    with contextlib.suppress(Exception):  # it is damaged too: then there is no name to give
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    return ", ".join(sorted(names)) or "something else than plain data"
