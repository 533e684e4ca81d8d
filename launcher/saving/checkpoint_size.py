"""How large a checkpoint is, by part, before there is one: the same layout of the same tensors, without their bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from launcher.base import files, manifest
from launcher.base.paths import RunPaths
from launcher.base.words import size
from launcher.checkpoint.layout import TensorSpec, plan_files
from launcher.checkpoint.segments import ParamInfo, cut_all
from launcher.checkpoint.snapshot import MASTER, OPTIMIZER_STEM, SAFETENSORS_NAMES
from launcher.config.settings import RunConfig, is_local_path
from launcher.model.build import weights_stem
from launcher.model.memory.empty import EmptyModel, EmptyParam, OptimizerStates

_SUB_GROUP = 10**9
"""ZeRO-3 cuts a group of parameters where a process's part of it has so many elements (DeepSpeed's default)."""
_RANDOM_STREAM_BYTES = 21_500
"""state/rng-N.json of a process."""
_TEXT_BYTES = 20_000
"""config.json, manifest.json, trainer_state.json and state.json of a short run."""
_BYTE_TOKENIZER_BYTES = 7_300
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges*", "special_tokens*", "added_tokens*", "chat_template*", "*.model")


@dataclass(frozen=True)
class CheckpointSize:
    """`model`: what from_pretrained reads of weights; `state`: what a resume needs beside it; the rest is small."""

    model: int
    state: int
    total: int
    masters: int
    """Of the state: fp32 weights, where the model file holds them rounded."""
    optimizer: int
    """Of the state: what the optimizer keeps."""


def checkpoint_size(
    config: RunConfig, model: EmptyModel, states: OptimizerStates, *, zero_stage: int, num_processes: int
) -> CheckpointSize:
    """In bytes, under a strategy: ZeRO-3 pads each process's rows to whole blocks."""
    weights = sum(file.num_bytes for file in plan_files(weights_stem(config), _weights(model), {"format": "pt"}))
    small = _TEXT_BYTES + _tokenizer_bytes(config)
    if config.checkpoint.save_only_model:
        return CheckpointSize(weights, 0, weights + small, 0, 0)
    if zero_stage == 3:
        specs = list(_rows(model, states, num_processes))
    else:
        specs = list(_own_states(model, states, is_flat=zero_stage > 0))
    files = sum(file.num_bytes for file in plan_files(OPTIMIZER_STEM, specs, {"format": "pt"}))
    masters = sum(spec.num_bytes for spec in specs if spec.name.startswith(f"{MASTER}."))
    optimizer = sum(spec.num_bytes for spec in specs) - masters
    state = files + num_processes * _RANDOM_STREAM_BYTES
    return CheckpointSize(weights, state, weights + state + small, masters, optimizer)


def _weights(model: EmptyModel) -> Iterator[TensorSpec]:
    for name, parts in model.stored.items():
        default = SAFETENSORS_NAMES[model.dtypes[name]]
        for part in parts:
            yield TensorSpec(part.name, part.dtype or default, part.shape)


def _is_exact(param: EmptyParam) -> bool:
    return SAFETENSORS_NAMES[param.dtype] == "F32"


def _own_states(model: EmptyModel, states: OptimizerStates, *, is_flat: bool) -> Iterator[TensorSpec]:
    for param in model.trained:
        if not _is_exact(param):
            yield TensorSpec(f"{MASTER}.{param.name}", "F32", param.shape)
        shape = (param.numel,) if is_flat else param.shape
        for name, state_shape, dtype in states.slots(shape):
            yield TensorSpec(f"{name}.{param.name}", SAFETENSORS_NAMES[dtype], state_shape)


def _rows(model: EmptyModel, states: OptimizerStates, num_processes: int) -> Iterator[TensorSpec]:
    groups = [[p for p in model.trained if p.is_decayed], [p for p in model.trained if not p.is_decayed]]
    number = 0
    for group in groups:
        for sub_group in _sub_groups(group, num_processes):
            columns = [(ParamInfo(p.name, p.shape, number), -(-p.numel // num_processes)) for p in sub_group]
            slots = {name: SAFETENSORS_NAMES[dtype] for name, _, dtype in states.slots((1024,))}
            if not all(map(_is_exact, sub_group)):
                slots[MASTER] = "F32"
            partition = dataclasses.replace(cut_all(str(number), columns, num_processes), slots=slots)
            yield from (partition.row_spec(slot, row) for row in range(num_processes) for slot in slots)
            number += 1


def _sub_groups(params: list[EmptyParam], num_processes: int) -> Iterator[list[EmptyParam]]:
    group: list[EmptyParam] = []
    used = 0
    for param in params:
        group.append(param)
        used += -(-param.numel // num_processes)
        if used >= _SUB_GROUP:
            yield group
            group, used = [], 0
    if group:
        yield group


def _tokenizer_bytes(config: RunConfig) -> int:
    name = config.model.tokenizer_name_or_path or config.model.model_name_or_path
    if not name or not is_local_path(name):
        return _BYTE_TOKENIZER_BYTES
    folder = Path(name).expanduser()
    found = {path for pattern in _TOKENIZER_FILES for path in folder.glob(pattern) if path.is_file()}
    return sum(path.stat().st_size for path in found)


def disk_bytes(config: RunConfig, total: int, model: int, num_steps: int | None) -> int | None:
    """What the run needs on disk at most: its checkpoints with the one that is being written, and the model at the end.

    Args:
        total, model: bytes of a checkpoint, and of the model in it.

    Returns:
        None where every checkpoint is kept and their number is not known.
    """
    checkpoint = config.checkpoint
    if checkpoint.save_strategy == "no":
        return model
    limit, saves = checkpoint.save_total_limit, num_saves(config, num_steps)
    # The newest, the best, and one to go back to may be three.
    apart = 1 + checkpoint.load_best_model_at_end + (config.train.on_spike == "rollback")
    if config.eval.in_background:  # the newest is one of those that are not judged yet
        apart += (checkpoint.max_unjudged or 1) - 1 + (not checkpoint.load_best_model_at_end)
    kept = None if limit is None else max(limit, apart) + 1
    if saves is not None:
        kept = saves if kept is None else min(kept, saves)
    return None if kept is None else kept * total + model


def num_saves(config: RunConfig, num_steps: int | None) -> int | None:
    """Of the whole run, the final one included; None where it cannot be said beforehand."""
    every = config.checkpoint.save_steps
    if num_steps is None or config.checkpoint.save_strategy != "steps" or not isinstance(every, int):
        return None
    return max(1, -(-num_steps // every))


def short_of_room(config: RunConfig, paths: RunPaths, total: int, model: int, num_steps: int | None) -> str | None:
    """A notice where the disk has no room for all that the retention lets stay, by the estimate of `launcher plan`.

    Args:
        total, model: see `disk_bytes`; of this very run's checkpoints.
    """
    needed = disk_bytes(config, total, model, num_steps)
    held = sum(manifest.bytes_of(folder) for _, folder in paths.checkpoint_dirs())
    try:
        free = files.free_bytes(paths.root)
    except OSError:  # the save says what that means
        return None
    if needed is None or needed - held <= free:
        return None
    return (
        f"the checkpoints of this run will need up to {size(needed)}, and {paths.root} has {size(free)} "
        "free: a save that does not fit waits for room. Fewer: checkpoint.save_total_limit=2; what a run needs: "
        "launcher plan"
    )
