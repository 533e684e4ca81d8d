"""The weights of a pretrained model under their names in memory, read from its files range by range."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from launcher.base.errors import UserError
from launcher.base.stored import StoredTensors
from launcher.checkpoint.layout import iter_safetensors, overlaps
from launcher.checkpoint.load import StoredWeights, TensorFiles
from launcher.checkpoint.snapshot import SAFETENSORS_NAMES, TORCH_DTYPES
from launcher.saving.interop.streams import CHUNK_ITEMS


class BaseWeights:
    """Reads elements of parameters and buffers; rows beyond those of the files are the mean of the others.

    Files under names that transformers converts when it loads them (of older releases, or pickled) cannot be read in
    parts: such a model is loaded whole.

    Args:
        skeleton: the model on the meta device, its vocabulary grown if need be.
        stored: how `save_pretrained` stores it.

    Raises:
        UserError: there are no weights, or not those of the model.
    """

    def __init__(self, folder: Path, skeleton: nn.Module, stored: StoredTensors, *, trust_remote_code: bool) -> None:
        self._shapes = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
        self._stored = stored
        self._memory: dict[str, Tensor] = {}
        self._files: StoredWeights | None = None
        if any(iter_safetensors(folder, "model")):
            self._files = StoredWeights(TensorFiles(folder, "model", follow_links=True), stored)
        if self._files is None or any(self._parts(name) is None for name in stored):
            self._files = None
            self._memory = _loaded(folder, trust_remote_code)
        missing = [name for name in stored if self._num_held(name) == 0]
        if missing:
            raise UserError(f"{folder} holds no weights for {missing[0]}: it is not the model of this adapter")

    def dtype(self, name: str) -> str:
        """As it is stored, under safetensors' name."""
        if self._files is None:
            return SAFETENSORS_NAMES[self._memory[name].dtype]
        parts = self._parts(name)
        assert parts is not None
        return self._files.files.specs[parts[0].name].dtype

    def read(self, name: str, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) in fp32, or as they are where they are no floats; flat."""
        dtype = TORCH_DTYPES[self.dtype(name)]
        found = torch.empty(numel, dtype=torch.float32 if dtype.is_floating_point else dtype)
        held = min(numel, max(0, self._num_held(name) - start))
        if held:
            self._read(name, start, found[:held])
        if held < numel:
            row = self._mean_row(name).to(dtype).to(found.dtype)
            width = row.numel()
            places = torch.arange(start + held, start + numel) % width
            found[held:] = row[places]
        return found

    def _read(self, name: str, start: int, target: Tensor) -> None:
        if self._files is None:
            target.copy_(self._memory[name].reshape(-1)[start : start + target.numel()])
            return
        parts = self._parts(name)
        for part, first, count in overlaps(parts or (), start, target.numel()):
            self._files.files.read_into(part.name, first - part.start, target[first - start : first - start + count])

    def _parts(self, name: str) -> Any:
        assert self._files is not None
        shape = self._shapes[name]
        return self._files.parts(name, shape) or self._files.first_rows(name, shape)

    def _num_held(self, name: str) -> int:
        if self._files is None:
            return self._memory[name].numel() if name in self._memory else 0
        return sum(part.numel for part in self._parts(name) or ())

    def _mean_row(self, name: str) -> Tensor:
        """In fp64, as `model.vocabulary.grow` has it."""
        shape, held = self._shapes[name], self._num_held(name)
        width = max(1, torch.Size(shape[1:]).numel())
        total, step = torch.zeros(width, dtype=torch.float64), max(1, CHUNK_ITEMS // width) * width
        for start in range(0, held, step):
            some = torch.empty(min(step, held - start))
            self._read(name, start, some)
            total += some.view(-1, width).sum(0, dtype=torch.float64)
        return total / (held // width)


def _loaded(folder: Path, trust_remote_code: bool) -> dict[str, Tensor]:
    from transformers import AutoModelForCausalLM

    try:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError, KeyError, RuntimeError) as error:
        raise UserError(f"the base model {folder} cannot be loaded: {error!s:.500}") from error
    found: dict[str, Tensor] = model.state_dict()
    return found
