"""`checkpoint.resume_from_checkpoint=PATH` with transformers' Trainer's `checkpoint-N`: made one of ours, then resumed.

The conversion runs on the main process alone and streams; what it commits is a checkpoint like any other, so that any
number of processes under any strategy goes on from it.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from launcher.base import files, manifest
from launcher.base.errors import (
    CheckpointWriteError,
    DamagedCheckpointError,
    ResumeError,
    ResumeMismatchError,
    UnsafeFileError,
)
from launcher.base.files import to_text
from launcher.base.inner_files import inner_file
from launcher.base.paths import CheckpointPaths, RunPaths, checkpoint_step
from launcher.checkpoint.resume import from_weights, origin_id
from launcher.checkpoint.snapshot import OPTIMIZER_STEM
from launcher.checkpoint.writer import Writer
from launcher.config.settings import RunConfig
from launcher.model.build import stored_name, weights_stem
from launcher.saving.interop.foreign import Foreign, named_errors, read_replicated
from launcher.saving.interop.pickles import load_pickle
from launcher.saving.interop.skeleton import build_skeleton, is_adapter, our_groups, trained, trainer_groups
from launcher.saving.interop.streams import write_sources
from launcher.saving.interop.zero_shards import read_zero, shards_dir
from launcher.saving.training_state import STATE_VERSION

_COPIED = (".json", ".jinja", ".model", ".txt")
_OWN = ("trainer_state.json", manifest.NAME)
_IMPLEMENTATION = ("lr", "initial_lr", "weight_decay", "foreach", "fused", "capturable", "differentiable", "maximize")
"""Settings of an optimizer's groups that are compared elsewhere, or change no more than the rounding."""


_MAYBE_RECORDED = ("train.train_batch_size", "train.max_grad_norm", "train.mixed_precision")
"""By DeepSpeed they are."""


def import_checkpoint(source: Path, config: RunConfig, paths: RunPaths) -> Path:
    """Converts a checkpoint of the Trainer into one of ours inside output_dir. Main process.

    It becomes output_dir/checkpoint-N, or output_dir/imported/checkpoint-N where the Trainer's own folder has that
    name. After a crash only `.tmp-checkpoint-N` can remain.

    Raises:
        ResumeError: it cannot be resumed, or holds a pickle that is refused. ResumeMismatchError: its optimizer is
        another one. DamagedCheckpointError: files are missing or broken. CheckpointWriteError: no room.
    """
    if not (source / "trainer_state.json").is_file():
        raise ResumeError(
            f"checkpoint.resume_from_checkpoint={source} has neither our manifest.json nor trainer_state.json. "
            "Valid: auto, never, hf://ORG/NAME, a checkpoint-N folder of ours or of transformers' Trainer"
        )
    _refuse_links(source)
    state = _trainer_state(source)
    step = int(state["global_step"])
    target = paths.checkpoint_dir(step)
    if files.is_taken(target):
        target = paths.imported_dir / target.name
        if _is_import_of(target, source):
            return target
    temporary = paths.temporary_dir(step)
    with named_errors(source):
        foreign, model = _read(source, config)
        run_state = _run_state(source, state, foreign, config, model)
        text = to_text(run_state)
    try:
        files.remove_tree(temporary)
        paths.root.mkdir(parents=True, exist_ok=True)
        files.make_dirs(temporary / "state", within=paths.root)
        with named_errors(source):
            _write(temporary, source, foreign, text, config)
        files.make_dirs(target.parent, within=paths.root)
        files.remove_tree(target, within=paths.root)  # an earlier import that was damaged
        Writer(memoryview(b"")).commit(
            {"step": step, "dir": temporary, "target": target, "world_size": foreign.world_size,
             "zero_stage": foreign.zero_stage, "files": [], "hashed": []}
        )  # fmt: skip
    except OSError as error:
        raise CheckpointWriteError(f"{source} could not be imported into {paths.root}: {error}") from error
    finally:
        files.remove_tree(temporary)  # after the commit it has its other name
    return target


def _refuse_links(source: Path) -> None:
    """An import makes real files of what it reads, and those may go to the Hub: nothing from outside becomes one.

    Raises:
        ResumeError: a file or folder below it is a link, or no regular file.
    """
    for folder, folders, names in os.walk(source):
        for name in [*names, *(n for n in folders if (Path(folder) / n).is_symlink())]:
            path = Path(folder) / name
            try:
                inner_file(source, path.relative_to(source).as_posix())
            except UnsafeFileError as error:
                raise ResumeError(f"checkpoint.resume_from_checkpoint={source} is not imported: {error}") from error


def _is_import_of(folder: Path, source: Path) -> bool:
    state = files.read_json_or(CheckpointPaths(folder).run_state, {})
    return state.get("origin") == origin_id(source) and not manifest.verify(folder)


def _trainer_state(source: Path) -> dict[str, Any]:
    path = CheckpointPaths(source).trainer_state
    state: dict[str, Any] = files.read_json_or(path, {}, files.MAX_HISTORY_BYTES)
    step = state.get("global_step")
    if type(step) is not int or not 0 <= step < 2**53:
        raise DamagedCheckpointError(f"{path} is not a Trainer's state: its global_step is {step!r:.100}")
    step = checkpoint_step(source)
    if step is not None and step != state["global_step"]:
        raise DamagedCheckpointError(f"{path} is of step {state['global_step']}, its folder is {source.name}")
    return state


def _read(source: Path, config: RunConfig) -> tuple[Foreign, nn.Module]:
    if is_adapter(source) != config.model.is_adapter:
        mend = "model/peft=lora" if is_adapter(source) else "model/peft=none"
        raise ResumeError(f"{source} holds {'a LoRA adapter' if is_adapter(source) else 'a whole model'}. Set {mend}")
    base = config.model.model_name_or_path
    model = build_skeleton(source, trust_remote_code=config.model.trust_remote_code, base=base)
    named = stored_name(config)
    shards = shards_dir(source)
    if shards is not None:
        foreign = read_zero(shards, named)
        there, here = {s.spec.name for s in foreign.weights}, {named(n) for n in trained(model)}
        if here - there:
            raise ResumeError(
                f"{source}: DeepSpeed trained {len(there)} parameters, this model has {len(here)} trainable ones, "
                f"as {sorted(here - there)[0]}. Parameters that were frozen there are not known here"
            )
        return foreign, model
    if not (source / "optimizer.pt").is_file():
        if any(source.glob("pytorch_model_fsdp*")) or any(source.glob("optimizer*/")):
            raise ResumeError(
                f"{source} was written by FSDP, whose shards are not read here: DDP's and DeepSpeed's are"
            )
        raise ResumeError(
            f"{source} has no optimizer.pt and no global_step folder (save_only_model=true?) and cannot be resumed. "
            f"To train on from its weights: {from_weights(source)} checkpoint.resume_from_checkpoint=auto"
        )
    return read_replicated(source, model, [trainer_groups(model), our_groups(config, model)[0]], named), model


def _write(folder: Path, source: Path, foreign: Foreign, run_state: str, config: RunConfig) -> None:
    write_sources(folder, weights_stem(config), foreign.weights)
    write_sources(folder, OPTIMIZER_STEM, foreign.states)
    for path in sorted(source.iterdir()):
        is_ours = path.name in _OWN or path.name.endswith(".index.json")
        if path.is_file() and path.suffix in _COPIED and not is_ours:
            files.copy_file(path, folder / path.name)
    trainer_state = _trainer_state(source)
    best = trainer_state.get("best_model_checkpoint")
    trainer_state["best_model_checkpoint"] = Path(best).name if isinstance(best, str) else None  # no path of a machine
    files.write_file(folder / "trainer_state.json", to_text(trainer_state).encode())
    files.write_file(CheckpointPaths(folder).run_state, run_state.encode())


def _run_state(
    source: Path, state: dict[str, Any], foreign: Foreign, config: RunConfig, model: nn.Module
) -> dict[str, Any]:
    """Our state.json. `settings` are only those that the Trainer recorded."""
    step, rate = int(state["global_step"]), float(foreign.groups[0]["settings"].get("lr", config.optim.learning_rate))
    groups, optimizer = our_groups(config, model)
    values: dict[str, Any] = {}
    if (source / "scheduler.pt").is_file():
        values = load_pickle(source / "scheduler.pt")
        rate = float((values.get("_last_lr") or [rate])[0])
        values = {k: v for k, v in values.items() if isinstance(v, (int, float, str, bool, list)) and k != "lr_lambdas"}
    is_best = state.get("best_global_step") == step  # an earlier best one is not in output_dir
    # The two kinds of loss scaler have different fields; another kind starts anew, which costs a few skipped steps.
    keeps_scaler = config.mixed_precision == "fp16" and bool(foreign.zero_stage) == bool(config.strategy.zero_stage)
    return {
        "version": STATE_VERSION, "step": step, "total_steps": int(state.get("max_steps") or 0), "seed": config.seed,
        "samples_seen": step * config.train.train_batch_size, "world_size": foreign.world_size,
        "strategy": f"zero{foreign.zero_stage}" if foreign.zero_stage else "ddp",
        "progress": {
            "step": step, "epoch": float(state.get("epoch") or 0.0),
            "num_tokens": int(state.get("num_input_tokens_seen") or 0),
            "best_metric": state.get("best_metric") if is_best else None, "best_step": step if is_best else None,
        },
        "scheduler": {"values": values, "learning_rates": [rate] * len(groups)},
        "scaler": foreign.loss_scaler if keeps_scaler else None,
        "optimizer": {"name": config.optim.name, "groups": foreign.groups},
        "settings": _known_settings(source, foreign, config, optimizer),
        "origin": origin_id(source),
        "imported": {"from": source.name, "epoch": state.get("epoch"), "learning_rate": rate},
    }  # fmt: skip


def _known_settings(
    source: Path, foreign: Foreign, config: RunConfig, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """What the Trainer recorded of the settings that decide the result, under our keys.

    Raises:
        ResumeMismatchError: its optimizer keeps other states than `optim.name` does.
    """
    settings = [g["settings"] for g in foreign.groups]
    there = {s.spec.name.partition(".")[0] for s in foreign.states}
    here = _slots(type(optimizer), config)
    if there and there != here:
        raise ResumeMismatchError(
            f"the optimizer of {source} keeps {', '.join(sorted(there))} for each parameter, {config.optim.name} keeps "
            f"{', '.join(sorted(here)) or 'nothing'}. Set optim.name to the one that it was trained with"
        )
    known: dict[str, Any] = {
        "optim.learning_rate": float(settings[0].get("initial_lr", config.optim.learning_rate)),
        "optim.weight_decay": max(float(s.get("weight_decay", 0.0)) for s in settings),
    }
    defaults = {k: list(v) if isinstance(v, tuple) else v for k, v in optimizer.defaults.items()}
    others = {
        k: v for k, v in settings[0].items() if k in defaults and k not in _IMPLEMENTATION and v != defaults[k]
    }  # fmt: skip
    known["optim.kwargs"] = {**config.optim.kwargs, **others}
    recorded = {key: getattr(foreign, key.removeprefix("train.")) for key in _MAYBE_RECORDED}
    return known | {key: value for key, value in recorded.items() if value is not None}


def _slots(cls: Any, config: RunConfig) -> set[str]:
    """The states with more than a number that an optimizer keeps, found out by a step on four zeros."""
    param = nn.Parameter(torch.zeros(2, 2))
    param.grad = torch.zeros(2, 2)
    optimizer = cls([param], lr=config.optim.learning_rate, **config.optim.kwargs)
    optimizer.step()
    return {k for k, v in optimizer.state[param].items() if isinstance(v, torch.Tensor) and v.dim() > 0}


def import_notices(
    state: dict[str, Any], *, learning_rate: float, total_steps: int, epoch: float, accept: bool
) -> list[str]:
    """What the user should know after going on from an import; empty for checkpoints of our own.

    Args:
        state: state.json of the checkpoint.
        learning_rate: of the next step, by this run's schedule.
        epoch: passes over the rows at this step, by this run's data.

    Raises:
        ResumeMismatchError: the schedules differ and `checkpoint.accept_changes` is not set.
    """
    imported = state.get("imported")
    if not imported:
        return []
    known = ", ".join(sorted(state["settings"]))
    unknown = [key for key in _MAYBE_RECORDED if key not in state["settings"]]
    lines = [
        f"imported from transformers' Trainer ({imported['from']}): weights, optimizer, schedule, step and epoch. "
        f"Compared with this run's settings: {known}. Not recorded there and taken from this run: the data and its "
        + ", ".join(["order", "seed", *unknown])
    ]
    rate = imported["learning_rate"]
    if not math.isclose(rate, learning_rate, rel_tol=1e-6, abs_tol=1e-15):
        differs = f"the learning rate of the next step is {rate:g} there and {learning_rate:g} here"
        if state["total_steps"] == total_steps and not accept:
            raise ResumeMismatchError(
                f"{differs}: set scheduler.lr_scheduler_type, scheduler.warmup_steps and scheduler.lr_scheduler_kwargs "
                "as they were there. To continue with this run's schedule: checkpoint.accept_changes=true"
            )
        lines.append(differs)
    if imported["epoch"] is not None and abs(imported["epoch"] - epoch) > 0.01 * max(1.0, epoch):
        lines.append(
            f"step {state['step']} was epoch {imported['epoch']:.3f} there and is {epoch:.3f} here: the rows or "
            "train.train_batch_size differ (the Trainer's is per device times accumulation times processes)"
        )
    return lines
