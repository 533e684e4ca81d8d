"""`launcher export --format trainer`: a folder that `Trainer(...).train(resume_from_checkpoint=DIR)` goes on from.

Its files are those that transformers' Trainer writes on one process or under DDP: model.safetensors, optimizer.pt,
scheduler.pt, scaler.pt, rng_state*.pth, trainer_state.json. training_args.bin is not needed: the Trainer has its own.
"""

from __future__ import annotations

import base64
import importlib
import math
import mmap
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from launcher.base import files
from launcher.base.errors import ResumeError, UserError
from launcher.base.files import to_text
from launcher.checkpoint.load import TensorFiles
from launcher.checkpoint.resume import read_state
from launcher.checkpoint.snapshot import MASTER, OPTIMIZER_STEM, TORCH_DTYPES
from launcher.saving.interop.foreign import named_errors
from launcher.saving.interop.serving import model_sources
from launcher.saving.interop.skeleton import build_skeleton, trainer_groups
from launcher.saving.interop.streams import write_sources
from launcher.saving.interop.target import Exported, choose, copy_files, new_folder

_RNG_FILE = re.compile(r"state/rng-\d{1,9}\.json")
_KNOWN_OPTIMIZERS = ("torch.optim.", "transformers.", "deepspeed.", "bitsandbytes.")


def export_trainer(
    checkpoint: Path, target: Path, *, dtype: str | None, max_shard_bytes: int, trust_remote_code: bool = False
) -> str:
    """Writes the whole training state of a checkpoint (of a run: its newest) as transformers' Trainer does.

    Args:
        dtype: of the weights; default float32, the masters, since the Trainer's own weights are its masters.

    Returns:
        What was exported, for the user.

    Raises:
        UserError, DamagedCheckpointError: see `choose` and `new_folder`; or the checkpoint holds no training state.
    """
    source = choose(checkpoint, newest=True)
    if not source.is_resumable:
        raise UserError(
            f"{source.folder} holds only a model, the Trainer could not go on from it. For the model alone: "
            f"launcher export {checkpoint} {target} --format safetensors"
        )
    with named_errors(source.folder):
        state = read_state(source.folder)
        groups = trainer_groups(build_skeleton(source.folder, trust_remote_code=trust_remote_code))
        with new_folder(target) as folder:
            weights = model_sources(source, getattr(torch, dtype or "float32"))
            write_sources(folder, source.stem, weights, max_shard_bytes=max_shard_bytes)
            copy_files(source, folder, dtype=dtype or "float32")
            defaults = _defaults(state["optimizer"]["name"], trust_remote_code)
            _save(_optimizer(source, state["optimizer"], groups, defaults, folder), folder / "optimizer.pt")
            _save(_scheduler(state["scheduler"], len(groups)), folder / "scheduler.pt")
            if state["scaler"] and "scale" in state["scaler"]:  # DeepSpeed's own scaler has other fields
                _save(state["scaler"], folder / "scaler.pt")
            _write_rng(source, folder)
            trainer_state = _trainer_state(
                files.read_json(source.folder / "trainer_state.json", files.MAX_HISTORY_BYTES, within=source.folder),
                source.folder.parent,
            )
            files.write_file(folder / "trainer_state.json", to_text(trainer_state).encode())
    return f"exported {source.folder} (step {state['step']}) to {target}: Trainer(...).train(resume_from_checkpoint=…)"


def _save(value: Any, path: Path) -> None:
    torch.save(value, path)
    with path.open("rb+") as file:
        files.fsync_file(file.fileno(), path)


def _optimizer(
    source: Exported, saved: dict[str, Any], groups: list[list[str]], defaults: dict[str, Any], scratch: Path
) -> dict[str, Any]:
    """The state_dict of a torch optimizer over the Trainer's parameter groups; its tensors stay on disk until written.

    Raises:
        ResumeError: the checkpoint's parameters are not the model's.
    """
    stored = TensorFiles(source.folder, OPTIMIZER_STEM, source.listed)
    names = [name for group in groups for name in group]
    entries = {name: entry for entry in saved["groups"] for name in entry["params"]}
    if set(entries) != set(names):
        odd = sorted(set(entries) ^ set(names))
        raise ResumeError(
            f"{source.folder}: its optimizer and the model of its config.json differ in {len(odd)} parameters: {odd[0]}"
        )
    state: dict[int, dict[str, Any]] = {}
    for i, name in enumerate(names):
        state[i] = {k: torch.tensor(float(v)) for k, v in entries[name]["scalars"].items()}
    number = {name: i for i, name in enumerate(names)}
    for key in stored.specs:
        slot, _, name = key.partition(".")
        if slot != MASTER:
            state[number[name]][slot] = _mapped(stored, key, scratch)
    param_groups, start = [], 0
    for group in groups:
        like = entries[group[0]] if group else _without_decay(saved["groups"])
        settings = {k: tuple(v) if isinstance(v, list) else v for k, v in like["settings"].items()}
        known = {k: v for k, v in settings.items() if k in defaults or k == "initial_lr"}
        param_groups.append({**defaults, **known, "params": list(range(start, start + len(group)))})
        start += len(group)
    return {"state": {k: v for k, v in state.items() if v}, "param_groups": param_groups}


def _without_decay(entries: list[dict[str, Any]]) -> dict[str, Any]:
    return min(entries, key=lambda entry: float(entry["settings"].get("weight_decay", 0.0)))


def _defaults(name: str, trust_remote_code: bool) -> dict[str, Any]:
    """All settings of a parameter group of an optimizer class, so that what JSON cannot hold (None) is there too.

    Raises:
        ResumeError: the class cannot be imported, or is one of somebody's own: a checkpoint may come from elsewhere,
            and importing what it names would run it.
    """
    if not name.startswith(_KNOWN_OPTIMIZERS) and not trust_remote_code:
        raise ResumeError(
            f"the optimizer {name} of this checkpoint is of none of {', '.join(_KNOWN_OPTIMIZERS)}. If you trust the "
            "checkpoint, add --trust-remote-code"
        )
    module, _, attribute = name.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), attribute)
        if not issubclass(cls, torch.optim.Optimizer):
            raise TypeError("it is no torch.optim.Optimizer")
        return dict(cls([nn.Parameter(torch.zeros(1))], lr=0.0).defaults)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ResumeError(f"the optimizer {name} of this checkpoint cannot be made here: {error}") from error


def _mapped(stored: TensorFiles, name: str, scratch: Path) -> Tensor:
    """A stored tensor as memory-mapped pages, so that saving it needs no memory of its own.

    One that lies in pieces is put together in a file without a name in `scratch` first.
    """
    spec, place = stored.specs[name], stored.place(name)
    dtype = TORCH_DTYPES[spec.dtype]
    if place is not None:
        with os.fdopen(stored.open_fd(place), "rb") as file:
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return torch.frombuffer(mapping, dtype=dtype, count=spec.numel, offset=place.offset).view(spec.shape)
    with tempfile.TemporaryFile(dir=scratch) as whole:
        whole.truncate(spec.num_bytes)
        flat = torch.frombuffer(mmap.mmap(whole.fileno(), spec.num_bytes), dtype=dtype)
    stored.read_into(name, 0, flat)
    return flat.view(spec.shape)


def _scheduler(saved: dict[str, Any], num_groups: int) -> dict[str, Any]:
    """The scheduler's state_dict; the Trainer's own schedule is that of its arguments."""
    values = dict(saved["values"])
    if "base_lrs" in values:  # one entry for each of the Trainer's groups, the empty one too
        for key in ("base_lrs", "_last_lr"):
            values[key] = (values[key] * num_groups)[:num_groups]
        values["lr_lambdas"] = [None] * num_groups
    return values


def _write_rng(source: Exported, folder: Path) -> None:
    """rng_state.pth for one process and rng_state_R.pth for each of several."""
    for name in sorted(path for path in source.listed or () if _RNG_FILE.fullmatch(path)):
        saved = files.read_json(source.folder / name, within=source.folder)
        rank, state = int(name.partition("-")[2].removesuffix(".json")), _rng_state(saved)
        _save(state, folder / f"rng_state_{rank}.pth")
        if rank == 0:
            _save(state, folder / "rng_state.pth")


def _rng_state(saved: dict[str, Any]) -> dict[str, Any]:
    """Our stored generators (`launcher.checkpoint.rng.capture`) as the Trainer keeps them."""
    version, internal, gauss = saved["python"]
    name, keys, *rest = saved["numpy"]
    state: dict[str, Any] = {
        "python": (version, tuple(internal), gauss),
        "numpy": (name, np.array(keys, dtype=np.uint32), *rest),
        "cpu": _bytes_tensor(saved["torch"]),
    }
    if "cuda" in saved:
        state["cuda"] = _bytes_tensor(saved["cuda"])
    return state


def _bytes_tensor(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def _trainer_state(saved: dict[str, Any], run_dir: Path) -> dict[str, Any]:
    """Ours, with what the Trainer stumbles over put right; its best checkpoint is looked for in `run_dir`."""
    control = dict.fromkeys(
        ("should_epoch_stop", "should_evaluate", "should_log", "should_save", "should_training_stop"), False
    )
    best = run_dir / Path(saved.get("best_model_checkpoint") or "none").name
    save_steps = saved.get("save_steps")
    callbacks = saved.get("stateful_callbacks") or {}  # none where it was imported from a Trainer before 4.44
    return {
        **saved,
        "best_model_checkpoint": str(best) if best.is_dir() else None,
        "num_train_epochs": math.ceil(saved.get("num_train_epochs") or 1),
        "save_steps": save_steps if isinstance(save_steps, (int, float)) else 500,
        # Without its entry the Trainer's next save is a KeyError (trainer.py, _save_checkpoint).
        "stateful_callbacks": {"TrainerControl": {"args": control, "attributes": {}}, **callbacks},
    }
