"""`launcher export --format safetensors`: the model alone, in another dtype if wanted, sharded, for from_pretrained."""

from __future__ import annotations

from pathlib import Path

import torch

from launcher.base.errors import DamagedCheckpointError
from launcher.checkpoint.layout import iter_safetensors
from launcher.checkpoint.load import TensorFiles
from launcher.checkpoint.snapshot import MASTER, OPTIMIZER_STEM, TORCH_DTYPES
from launcher.model.lora import adapter_key
from launcher.saving.interop.foreign import named_errors
from launcher.saving.interop.skeleton import build_skeleton, stored_in_parts
from launcher.saving.interop.streams import Source, from_file, part_of_file, write_sources
from launcher.saving.interop.target import Exported, choose, copy_files, new_folder


def export_safetensors(checkpoint: Path, target: Path, *, dtype: str | None, max_shard_bytes: int) -> str:
    """Writes the model of a checkpoint or run into a new folder; a few chunks are in memory at a time.

    Args:
        dtype: float32, bfloat16 or float16; None: as stored.

    Returns:
        What was exported, for the user.

    Raises:
        UserError, DamagedCheckpointError: see `choose` and `new_folder`.
    """
    source = choose(checkpoint, newest=False)
    with new_folder(target) as folder, named_errors(source.folder):
        weights = model_sources(source, getattr(torch, dtype) if dtype else None)
        layouts = write_sources(folder, source.stem, weights, max_shard_bytes=max_shard_bytes)
        stored = {str(TORCH_DTYPES[s.spec.dtype]).removeprefix("torch.") for s in weights if _is_float(s)}
        copy_files(source, folder, dtype=stored.pop() if len(stored) == 1 else None)
    size = sum(layout.num_bytes for layout in layouts)
    what = "the LoRA adapter" if source.stem == "adapter_model" else "the model"
    return f"exported {what} of {source.folder} to {target}: {size:,} bytes in {len(layouts)} safetensors file(s)"


def export_merged(
    checkpoint: Path, target: Path, *, base: str | None, dtype: str | None, max_shard_bytes: int,
    trust_remote_code: bool = False,
) -> str:  # fmt: skip
    """The same of a LoRA checkpoint, merged into its base; see `merging.write_merged`."""
    from launcher.saving.interop.merging import write_merged

    source = choose(checkpoint, newest=False)
    with new_folder(target) as folder, named_errors(source.folder):
        size = write_merged(source, folder, base=base, dtype=dtype, max_shard_bytes=max_shard_bytes,
                            trust_remote_code=trust_remote_code)  # fmt: skip
    return f"exported {source.folder}, merged into its base, to {target}: {size:,} bytes"


def model_sources(source: Exported, dtype: torch.dtype | None) -> list[Source]:
    """The model's tensors in a dtype: from the fp32 masters where the stored weights would have to be converted.

    Raises:
        DamagedCheckpointError: the folder has no model.
    """
    if not any(iter_safetensors(source.folder, source.stem, source.listed)):
        raise DamagedCheckpointError(f"{source.folder} holds no {source.stem}.safetensors")
    stored = TensorFiles(source.folder, source.stem, source.listed)
    states = TensorFiles(source.folder, OPTIMIZER_STEM, source.listed)
    needs_masters = dtype is not None and any(TORCH_DTYPES[spec.dtype] != dtype for spec in stored.specs.values())
    masters = _masters(source, states, set(stored.specs)) if needs_masters else {}
    found = []
    for name, spec in stored.specs.items():
        weight = from_file(stored, name)
        if dtype is not None and TORCH_DTYPES[spec.dtype] != dtype and name in masters:
            weight = masters[name]
        found.append(weight if dtype is None else weight.in_dtype(dtype))
    return found


def _masters(source: Exported, states: TensorFiles, stored_names: set[str]) -> dict[str, Source]:
    """The fp32 masters under the names of the model file: an expert's is a part of its layer's."""
    prefix, is_adapter = f"{MASTER}.", source.stem == "adapter_model"
    keys = {key.removeprefix(prefix): key for key in states.specs if key.startswith(prefix)}
    if is_adapter:
        return {adapter_key(name): from_file(states, key).renamed(adapter_key(name)) for name, key in keys.items()}
    found = {name: from_file(states, key).renamed(name) for name, key in keys.items() if name in stored_names}
    others = keys.keys() - stored_names
    parts = stored_in_parts(build_skeleton(source.folder)) if others else {}
    for name in others:
        end = states.specs[keys[name]].numel
        fitting = [part for part in parts.get(name, ()) if part.start + part.numel <= end]
        found |= {part.name: part_of_file(states, keys[name], part) for part in fitting}
    return found


def _is_float(source: Source) -> bool:
    return TORCH_DTYPES[source.spec.dtype].is_floating_point
