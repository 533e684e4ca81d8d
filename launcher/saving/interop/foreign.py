"""What a checkpoint of transformers' Trainer holds, under its parameters' names; the tensors are still on disk."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from launcher.base.errors import DamagedCheckpointError, LauncherError, ResumeError
from launcher.checkpoint.layout import iter_safetensors
from launcher.checkpoint.load import TensorFiles
from launcher.saving.interop.pickles import load_pickle
from launcher.saving.interop.skeleton import is_adapter, stored_in_parts, trained
from launcher.saving.interop.streams import Source, from_file, from_memory


@contextlib.contextmanager
def named_errors(folder: Path) -> Iterator[None]:
    """Whatever content of a received folder makes this code, torch or transformers stumble, it is that folder's fault.

    Raises:
        DamagedCheckpointError: instead of what nobody could name beforehand. Errors of ours and of the disk pass.
    """
    try:
        yield
    except (LauncherError, OSError):
        raise
    except Exception as error:
        raise DamagedCheckpointError(f"{folder} holds values that do not fit together: {error!r:.500}") from error


@dataclass
class Foreign:
    """A checkpoint of another tool.

    `weights` are named as in the model file, `states` `<slot>.<parameter>`, and `groups` is as in our state.json.
    `loss_scaler` and the settings after it are None where it does not record them; `train_batch_size` is in samples.
    """

    weights: list[Source]
    states: list[Source]
    groups: list[dict[str, Any]]
    world_size: int = 1
    zero_stage: int = 0
    loss_scaler: dict[str, Any] | None = None
    train_batch_size: int | None = None
    max_grad_norm: float | None = None
    mixed_precision: str | None = None


def plain(settings: dict[str, Any]) -> dict[str, Any]:
    """The plain values among an optimizer group's settings, as state.json holds them."""
    settings = {k: v.item() if isinstance(v, Tensor) and v.dim() == 0 else v for k, v in settings.items()}
    kept = {k: v for k, v in settings.items() if k != "params" and isinstance(v, (int, float, str, bool, list, tuple))}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in kept.items()}


def split_state(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, float | int]]:
    """A parameter's optimizer state as tensors and as numbers (step)."""
    tensors = {k: v for k, v in state.items() if isinstance(v, Tensor) and v.dim() > 0}
    numbers = {k: v.item() for k, v in state.items() if isinstance(v, Tensor) and v.dim() == 0}
    numbers |= {k: v for k, v in state.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
    return tensors, numbers


def group_entries(
    group: int, names: list[str], scalars: dict[str, dict[str, Any]], settings: dict[str, Any]
) -> list[dict[str, Any]]:
    """The entries of one parameter group in state.json: one for each set of scalars."""
    by_scalars: dict[str, list[str]] = {}
    for name in names:
        by_scalars.setdefault(json.dumps(scalars.get(name, {}), sort_keys=True), []).append(name)
    return [
        {"group": group, "params": same, "scalars": json.loads(key), "settings": plain(settings)}
        for key, same in by_scalars.items()
    ]


def read_replicated(
    folder: Path, model: nn.Module, orders: list[list[list[str]]], stored_name: Callable[[str], str]
) -> Foreign:
    """A checkpoint of one process or of DDP: model.safetensors and optimizer.pt.

    Args:
        orders: the parameter groups that the optimizer may have had; optimizer.pt holds numbers instead of names, so
            the first order is taken in which every state has its parameter's shape.

    Raises:
        ResumeError: no order fits, or a parameter has no weights. DamagedCheckpointError: a file cannot be read.
    """
    params = trained(model)
    saved = load_pickle(folder / "optimizer.pt")
    try:
        groups, state = saved["param_groups"], saved["state"]
        order = next((o for o in orders if _fits(groups, state, o, params)), None)
    except (KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError(f"{folder / 'optimizer.pt'} is not the state of a torch optimizer") from error
    if order is None:
        shown = " + ".join(str(len(g["params"])) for g in groups)
        raise ResumeError(
            f"{folder}: its optimizer.pt is of {shown} parameters, which do not match this model's {len(params)} "
            "trainable ones. Parameters that were frozen, or optimizer groups of one's own, are not known here"
        )
    states: list[Source] = []
    entries: list[dict[str, Any]] = []
    for i, (group, names) in enumerate(zip(groups, order, strict=True)):
        scalars = {}
        for key, name in zip(group["params"], names, strict=True):
            tensors, scalars[name] = split_state(state.get(key, {}))
            states += [from_memory(f"{slot}.{name}", tensor) for slot, tensor in sorted(tensors.items())]
        entries += group_entries(i, names, scalars, group)
    scaler = folder / "scaler.pt"
    return Foreign(
        weights=_weights(folder, model, stored_name), states=states, groups=entries,
        world_size=max(1, len(list(folder.glob("rng_state_*.pth")))),
        loss_scaler=load_pickle(scaler) if scaler.is_file() else None,
    )  # fmt: skip


def _fits(
    groups: list[dict[str, Any]], state: dict[int, Any], order: list[list[str]], params: dict[str, nn.Parameter]
) -> bool:
    if [len(g["params"]) for g in groups] != [len(names) for names in order]:
        return False
    for group, names in zip(groups, order, strict=True):
        for key, name in zip(group["params"], names, strict=True):
            shape = tuple(params[name].shape)
            # Adafactor keeps sums over rows and over columns, with or without the summed dimension.
            factors = {shape[:-1], shape[:-2] + shape[-1:], (*shape[:-1], 1), (*shape[:-2], 1, *shape[-1:])}
            tensors, _ = split_state(state.get(key, {}))
            if any(tuple(t.shape) != shape and tuple(t.shape) not in factors for t in tensors.values()):
                return False
    return True


def _weights(folder: Path, model: nn.Module, stored_name: Callable[[str], str]) -> list[Source]:
    """All tensors of the model file; a tied parameter stands under the name that named_parameters() gives it.

    Parameters that `save_pretrained` stores in parts (a layer's experts) stay in those parts, which `load_state` reads.
    """
    found = _stored_weights(folder)
    in_parts = {} if is_adapter(folder) else stored_in_parts(model)
    aliases: dict[int, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(param), []).append(stored_name(name))
    for name, param in trained(model).items():
        parts = in_parts.get(name, ())
        if parts and all(part.name in found and found[part.name].spec.shape == part.shape for part in parts):
            continue
        wanted = stored_name(name)
        other = next((alias for alias in aliases[id(param)] if alias in found), None)
        if other is None or found[other].spec.shape != tuple(param.shape):
            what = "has no weights" if other is None else f"has shape {list(found[other].spec.shape)}"
            raise ResumeError(f"{folder}: {name} with shape {list(param.shape)} {what} in its model file")
        if wanted not in found:
            found[wanted] = found.pop(other).renamed(wanted)
    return list(found.values())


def _stored_weights(folder: Path) -> dict[str, Source]:
    stem = "adapter_model" if (folder / "adapter_config.json").is_file() else "model"
    if any(iter_safetensors(folder, stem)):
        stored = TensorFiles(folder, stem)
        return {name: from_file(stored, name) for name in stored.specs}
    pickled = "adapter_model" if stem == "adapter_model" else "pytorch_model"
    paths = sorted(folder.glob(f"{pickled}.bin")) or sorted(folder.glob(f"{pickled}-*-of-*.bin"))
    if not paths:
        raise ResumeError(f"{folder} holds neither {stem}.safetensors nor {pickled}.bin")
    return {name: from_memory(name, tensor) for path in paths for name, tensor in load_pickle(path).items()}
