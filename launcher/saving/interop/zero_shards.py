"""DeepSpeed's ZeRO-1/2/3 shards (global_stepN/*_optim_states.pt and *_model_states.pt), put together while written.

Source of the layout: deepspeed/utils/zero_to_fp32.py. No DeepSpeed is imported and none of its classes is unpickled.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launcher.base import files
from launcher.base.errors import DamagedCheckpointError, ResumeError
from launcher.checkpoint.layout import TensorSpec
from launcher.checkpoint.snapshot import SAFETENSORS_NAMES
from launcher.saving.interop.foreign import Foreign, group_entries, split_state
from launcher.saving.interop.pickles import load_pickle
from launcher.saving.interop.streams import Source, from_memory

_SHARD = re.compile(r"^(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt$")
_MASTER = "fp32"
_PARTITIONS = "single_partition_of_fp32_groups"
_CHECKED = 4096
"""Elements of each part of a parameter that are compared."""


@dataclass(frozen=True)
class _Part:
    """Elements [start, start + numel) of a parameter, at `offset` in the flat tensors of a process."""

    rank: int
    offset: int
    start: int
    numel: int


@dataclass(frozen=True)
class _Param:
    """A trained parameter: its optimizer group, and the group's part in `_Shards.flats`."""

    name: str
    shape: tuple[int, ...]
    group: int
    parts: tuple[_Part, ...]


def shards_dir(folder: Path) -> Path | None:
    """The global_stepN folder of a checkpoint, if DeepSpeed wrote one.

    Raises:
        DamagedCheckpointError: there are several and `latest` does not say which.
    """
    found = [p for p in folder.glob("global_step*") if p.is_dir() and re.fullmatch(r"global_step\d+", p.name)]
    latest = folder / "latest"
    named = files.read_text(latest).strip() if latest.is_file() else None
    chosen = [p for p in found if named is None or p.name == named]
    if found and len(chosen) != 1:
        raise DamagedCheckpointError(f"{folder}: its file latest names {named}, its folders are {sorted(found)}")
    return chosen[0] if chosen else None


def read_zero(folder: Path, stored_name: Callable[[str], str]) -> Foreign:
    """A checkpoint folder of the Trainer under DeepSpeed; `folder` is the global_stepN folder.

    Raises:
        ResumeError: written in a way that is not read here. DamagedCheckpointError: shards are missing or broken.
    """
    try:
        shards = _Shards(folder)
        params = shards.params()
        entries: list[dict[str, Any]] = []
        for i, group in enumerate(shards.base[0]["param_groups"]):
            names = [p.name for p in params if p.group == i]
            if not names:
                continue
            entries += group_entries(i, names, dict.fromkeys(names, shards.scalars(i)), group)
        shards.check(params)
        if sum(len(entry["params"]) for entry in entries) != len(params):
            raise DamagedCheckpointError(f"{folder}: some parameters belong to no group of its optimizer")
        slots = shards.slots()
        weights = [shards.source(p, _MASTER, stored_name(p.name)) for p in params]
        states = [shards.source(p, slot, f"{slot}.{p.name}") for p in params for slot in slots]
        model = shards.model[0]
        weights += [from_memory(n, model["module"][n]) for n in model.get("buffer_names", []) if n in model["module"]]
        scaler = shards.optim[0].get("loss_scaler")
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise DamagedCheckpointError(f"{folder}: its shards are not as DeepSpeed writes them: {error!r}") from error
    settings = model.get("ds_config", {})
    sizes = [settings.get(k) for k in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")]
    clipping = settings.get("gradient_clipping")
    return Foreign(
        weights=weights, states=states, groups=entries, world_size=shards.world_size, zero_stage=shards.stage,
        loss_scaler={k: v for k, v in vars(scaler).items() if isinstance(v, (int, float))} if scaler else None,
        train_batch_size=math.prod(sizes) * shards.world_size if all(isinstance(s, int) for s in sizes) else None,
        max_grad_norm=float(clipping) if isinstance(clipping, (int, float)) else None,
        mixed_precision=next((k for k in ("bf16", "fp16") if settings.get(k, {}).get("enabled")), "no"),
    )  # fmt: skip


class _Shards:
    """All shard files of one checkpoint, memory-mapped."""

    def __init__(self, folder: Path) -> None:
        found = sorted((int(m[1]), int(m[2]), p) for p in folder.iterdir() if (m := _SHARD.match(p.name)))
        if not found:
            raise DamagedCheckpointError(f"{folder} holds no *_optim_states.pt of ZeRO")
        if any(mp for _, mp, _ in found):
            raise ResumeError(f"{folder} was written with tensor parallelism, which is not read here")
        self.folder = folder
        self.optim: list[dict[str, Any]] = [load_pickle(path)["optimizer_state_dict"] for _, _, path in found]
        self.world_size = len(self.optim)
        self.stage = int(self.optim[0].get("zero_stage", 1))
        counts = self.optim[0]["partition_count"]
        count = max(counts) if isinstance(counts, list) else int(counts)
        if count != len(found) or [rank for rank, _, _ in found] != list(range(count)):
            raise DamagedCheckpointError(
                f"{folder} was written by {count} processes, but the shards of {len(found)} are there"
            )
        name = "zero_pp_rank_0_mp_rank_00_model_states.pt" if self.stage == 3 else "mp_rank_00_model_states.pt"
        self.model: list[dict[str, Any]] = [load_pickle(folder / name)]
        key = "optimizer_state_dict" if self.stage == 3 else "base_optimizer_state"
        self.base: list[dict[str, Any]] = [o[key] for o in self.optim]
        if not isinstance(self.base[0], dict):
            raise ResumeError(f"{folder} is an elastic checkpoint of DeepSpeed. Save it with elastic_checkpoint off")

    def params(self) -> list[_Param]:
        """Every trained parameter and where its elements are."""
        shapes = [{n: tuple(s) for n, s in group.items()} for group in self.model[0]["param_shapes"]]
        if any(type(n) is not int or n < 0 for group in shapes for shape in group.values() for n in shape):
            raise DamagedCheckpointError(f"{self.folder}: a parameter has no shape")
        claimed = sum(math.prod(shape) for group in shapes for shape in group.values())
        there = sum(flat.numel() for rank in range(self.world_size) for flat in self._masters(rank))
        if claimed > there:
            raise DamagedCheckpointError(f"{self.folder}: {claimed} elements are claimed, {there} are stored")
        return list(self._params3(shapes) if self.stage == 3 else self._params12(shapes))

    def _masters(self, rank: int) -> list[Tensor]:
        flats: list[Tensor] = self.optim[rank]["fp32_flat_groups" if self.stage == 3 else _PARTITIONS]
        return flats

    def _params12(self, shapes: list[dict[str, tuple[int, ...]]]) -> Iterator[_Param]:
        # `param_slice_mappings` would say where each parameter is, but is wrong under round_robin_gradients (DeepSpeed
        # 0.19.8 fills it from the order before the shuffle). param_shapes has the order of the flat buffer.
        first = self.optim[0]
        for i, group in enumerate(shapes):
            size = first[_PARTITIONS][i].numel() + first["group_paddings"][i]
            if size * self.world_size < sum(math.prod(shape) for shape in group.values()):
                raise DamagedCheckpointError(f"{self.folder}: its group {i} has more elements than its processes hold")
            paddings = first["param_alignment_paddings"][i] if "param_alignment_paddings" in first else [0] * len(group)
            offset = 0
            for (name, shape), padding in zip(group.items(), paddings, strict=True):
                numel = math.prod(shape)
                yield _Param(name, shape, i, tuple(_split(offset, numel, size)))
                offset += numel + padding

    def _params3(self, shapes: list[dict[str, tuple[int, ...]]]) -> Iterator[_Param]:
        owners = {k: g for g, group in enumerate(self.base[0]["param_groups"]) for k in group["params"]}
        offset = 0  # sub-groups follow each other, and parameters in them
        for sub_group, inside in enumerate(shapes):
            for name, shape in inside.items():
                numel = math.prod(shape)
                size = -(-numel // self.world_size)
                parts = [
                    _Part(rank, offset, rank * size, min(size, numel - rank * size))
                    for rank in range(self.world_size) if rank * size < numel
                ]  # fmt: skip
                yield _Param(name, shape, owners[sub_group], tuple(parts))
                offset += size

    def check(self, params: list[_Param]) -> None:
        """Compares the masters with the weights that stages 1 and 2 store by name: a layout misread would be silent.

        Raises:
            ResumeError: they differ.
        """
        for param in params if self.stage < 3 else ():
            weight = self.model[0]["module"][param.name].reshape(-1)
            for start, master in self.source(param, _MASTER, param.name).pieces():
                piece = master[:_CHECKED]
                if not torch.equal(piece.to(weight.dtype), weight[start : start + piece.numel()]):
                    raise ResumeError(
                        f"{self.folder}: the master weights of {param.name} are not those of the model beside them. "
                        "The shards are laid out in a way that is not known here, or are of different runs"
                    )

    def _indices(self, group: int | None) -> list[int]:
        """The optimizer's numbers of a group's flat tensors; of all groups in order where None."""
        groups = self.base[0]["param_groups"]
        return [k for i, g in enumerate(groups) if group in (None, i) for k in g["params"]]

    def slots(self) -> list[str]:
        """The names of the states with one value per element."""
        return sorted(split_state(self.base[0]["state"][self._indices(None)[0]])[0])

    def scalars(self, group: int) -> dict[str, Any]:
        """One set for all parameters of a group; FusedAdam keeps its step in the group itself."""
        _, numbers = split_state(self.base[0]["state"][self._indices(group)[0]])
        settings = self.base[0]["param_groups"][group]
        return {"step": settings["step"], **numbers} if "step" in settings else numbers

    def _flats(self, rank: int, slot: str, group: int) -> list[Tensor]:
        """The flat tensors of a process in which the offsets of a group's parameters count."""
        if slot == _MASTER:
            flats = self._masters(rank)
            return flats if self.stage == 3 else [flats[group]]
        indices = self._indices(None if self.stage == 3 else group)
        return [self.base[rank]["state"][i][slot] for i in indices]

    def source(self, param: _Param, slot: str, name: str) -> Source:
        """One parameter's master weights or optimizer state, over all processes."""

        def pieces() -> Iterator[tuple[int, Tensor]]:
            for part in param.parts:
                at = part.start
                for flat in _cut(self._flats(part.rank, slot, param.group), part.offset, part.numel):
                    yield at, flat
                    at += flat.numel()

        dtype = self._flats(0, slot, param.group)[0].dtype
        return Source(TensorSpec(name, SAFETENSORS_NAMES[dtype], param.shape), pieces)


def _split(offset: int, numel: int, size: int) -> Iterator[_Part]:
    """The parts of elements [offset, offset + numel) of a flat buffer of which each process has `size`."""
    start = 0
    while start < numel:
        rank, low = divmod(offset + start, size)
        count = min(size - low, numel - start)
        yield _Part(rank, low, start, count)
        start += count


def _cut(flats: list[Tensor], offset: int, numel: int) -> Iterator[Tensor]:
    """Elements [offset, offset + numel) of flat tensors that follow each other."""
    for flat in flats:
        if offset < flat.numel() and numel:
            piece = flat.view(-1)[offset : offset + numel]
            yield piece
            numel -= piece.numel()
        offset = max(0, offset - flat.numel())
