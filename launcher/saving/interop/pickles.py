"""Foreign pickles: read with `weights_only` and an allow list, or refused by name. Nothing in them is ever executed."""

from __future__ import annotations

import contextlib
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from launcher.base.errors import DamagedCheckpointError, ResumeError


class Fragment:
    """Stands in for DeepSpeed's `fragment_address`; not read."""


class LossScaler:
    """Stands in for DeepSpeed's loss scalers; only plain numbers are taken from it."""


# What a pickle may name, beside tensors and plain containers. Stand-ins of our own, so that DeepSpeed is not imported
# and none of its code runs.
_ALLOWED: list[Any] = [
    (Fragment, "deepspeed.utils.tensor_fragment.fragment_address"),
    (LossScaler, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (LossScaler, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
]


def load_pickle(path: Path) -> Any:
    """The content of a torch.save file; its tensors stay on disk (memory-mapped) until they are read.

    Raises:
        ResumeError: it names something outside the allow list. DamagedCheckpointError: it cannot be read.
    """
    with torch.serialization.safe_globals(_ALLOWED):
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except pickle.UnpicklingError as error:
            raise ResumeError(
                f"{path} is refused, nothing in it was executed: it names {_refused(path)}. Only tensors, plain values "
                "and DeepSpeed's records of its partitions are read. Save it again without objects of your own in it"
            ) from error
        except (RuntimeError, ValueError, KeyError, EOFError, OSError) as error:
            raise DamagedCheckpointError(f"{path} cannot be read: {error}") from error


def _refused(path: Path) -> str:
    """What a pickle names outside the allow list; found by reading it as data."""
    names: list[str] = []
    with contextlib.suppress(ValueError, RuntimeError, pickle.UnpicklingError):
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    return ", ".join(sorted(names)) or "something else than plain data"
