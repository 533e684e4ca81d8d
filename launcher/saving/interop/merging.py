"""`launcher export --merge` and `model.merge_at_end`: a LoRA adapter merged into its base, a module at a time.

peft itself merges each module, so that everything that it knows (rslora, DoRA, ranks by pattern, embeddings, whole
modules, rows of tokens) is merged as it would be. Only one module is in memory, in fp32: with the fp32 masters of the
adapter where the checkpoint has them, and rounded once, to the dtype of the result.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from launcher.base import files
from launcher.base.errors import CheckpointWriteError, ResumeError, UserError
from launcher.base.stored import StoredTensor, StoredTensors
from launcher.checkpoint.layout import TensorSpec, plan_files
from launcher.checkpoint.snapshot import SAFETENSORS_NAMES, TORCH_DTYPES
from launcher.config.model_rules import why_not_merged
from launcher.model import _transformers, processor
from launcher.model.identity import local_folder
from launcher.model.lora import adapter_key
from launcher.model.vocabulary import num_rows
from launcher.saving.interop.base_weights import BaseWeights
from launcher.saving.interop.serving import model_sources
from launcher.saving.interop.skeleton import build_skeleton
from launcher.saving.interop.streams import CHUNK_ITEMS, Source, write_sources
from launcher.saving.interop.target import Exported

_ADAPTER_FILES = ("adapter_config.json", "generation_config.json", "README.md")
_BY_PEFT = "Load both with peft (PeftModel.from_pretrained)"
_PREFIX = "base_model.model."
_INNER = ("token_adapter.", "base_layer.", "original_module.", "modules_to_save.default.")


def write_merged(
    source: Exported, folder: Path, *, base: str | None = None, dtype: str | None = None, max_shard_bytes: int,
    trust_remote_code: bool = False, alive: Callable[[], None] = lambda: None,
) -> int:  # fmt: skip
    """Writes model, config, generation config and tokenizer into a folder that is there; returns the model's bytes.

    Args:
        base: the base model instead of the one that the adapter names: a folder or Hub id.
        dtype: of the weights; None: as the base stores them.
        alive: called now and then.

    Raises:
        UserError: no adapter, or no base for it. CheckpointWriteError: no room.
    """
    merge = _Merge.of(source, base, trust_remote_code=trust_remote_code)
    sources = [_watched(s, alive) for s in merge.sources(getattr(torch, dtype) if dtype else None)]
    layouts = plan_files("model", [s.spec for s in sources], {"format": "pt"}, max_shard_bytes=max_shard_bytes)
    size, free = sum(layout.num_bytes for layout in layouts), files.free_bytes(folder)
    if size > free:
        raise CheckpointWriteError(f"not enough disk space: the merged model needs {size:,} bytes, {free:,} are free")
    write_sources(folder, "model", sources, max_shard_bytes=max_shard_bytes)
    merge.write_configs(folder, sources)
    for name in source.copied:
        if name not in _ADAPTER_FILES:
            files.make_dirs((folder / name).parent, within=folder)
            files.copy_file(source.folder / name, folder / name)
    return size


def _watched(source: Source, alive: Callable[[], None]) -> Source:
    def pieces() -> Iterator[tuple[int, Tensor]]:
        for piece in source.pieces():
            alive()
            yield piece

    return Source(source.spec, pieces)


@dataclass
class _Merge:
    """A checkpoint's adapter on its base; both still on disk."""

    plain: Any
    """The model without adapter, on the meta device; its config is the result's."""
    base_folder: Path
    base: BaseWeights
    wrapped: dict[str, nn.Module]
    """What the adapter changes, by its module's name in the plain model; on the meta device."""
    adapter: dict[str, Source]
    """In fp32, by names in adapter_model.safetensors."""
    shared: dict[int, str]
    """Which of them a parameter is (by id), under whichever of its names."""
    stored: StoredTensors
    aliases: dict[str, str]
    """From the other names of tied parameters to those in `stored`."""
    source: Exported
    _last: tuple[str, dict[str, Tensor]] = field(default=("", {}))

    @classmethod
    def of(cls, source: Exported, base: str | None, *, trust_remote_code: bool) -> _Merge:
        if source.stem != "adapter_model":
            raise UserError(f"{source.folder} holds no LoRA adapter but a whole model. Leave --merge out")
        own = files.read_json(source.folder / "adapter_config.json", within=source.folder)
        if reason := why_not_merged(own):
            raise UserError(f"{source.folder} cannot be merged into the base as it is: it has {reason}. {_BY_PEFT}")
        folder = _base_folder(source, own, base)
        rows = _rows_of_tokenizer(source.folder)
        options: dict[str, Any] = {"base": str(folder), "trust_remote_code": trust_remote_code, "min_rows": rows}
        plain = build_skeleton(folder, trust_remote_code=trust_remote_code, min_rows=rows)
        with warnings.catch_warnings(action="ignore"):
            adapted = build_skeleton(source.folder, **options)
        stored = _transformers.stored_tensors(plain)
        weights = BaseWeights(folder, plain, stored, trust_remote_code=trust_remote_code)
        adapter = {s.spec.name: s for s in model_sources(source, torch.float32)}
        names = adapted.named_parameters(remove_duplicate=False)
        shared = {id(param): key for name, param in names if (key := adapter_key(name)) in adapter}
        if len(set(shared.values())) != len(adapter):
            left = sorted(set(adapter) - set(shared.values()))
            raise UserError(f"{folder} is not the base of {source.folder}: it has no place for {left[0]}")
        return cls(plain, folder, weights, _wrapped(adapted), adapter, shared, stored, _aliases(plain, stored), source)

    def sources(self, dtype: torch.dtype | None) -> list[Source]:
        """Every tensor of the merged model, made when it is written."""
        stored = {**self.stored, **self._untied()}
        kept = self._dtypes(dtype) if dtype else {}
        found = []
        for name, parts in stored.items():
            own = self.base.dtype(self.aliases.get(name, name))
            if dtype is not None and TORCH_DTYPES[own].is_floating_point:
                own = SAFETENSORS_NAMES[kept.get(name, dtype)]
            module = self._module_of(name)
            for part in parts:
                spec = TensorSpec(part.name, own, part.shape)
                found.append(Source(spec, self._outside(name, part) if module is None
                                    else self._changed(module, name, part)))  # fmt: skip
        return found

    def _dtypes(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        """As `save_pretrained` of a model in that dtype has them: some stay fp32."""
        empty = _transformers.build_without_memory(type(self.plain), self.plain.config, dtype)
        return _transformers.stored_dtypes(empty, dtype)

    def _outside(self, name: str, part: StoredTensor) -> Callable[[], Iterator[tuple[int, Tensor]]]:
        """Of modules without adapter: the base's, or what was trained of them itself (`bias=all`)."""
        own = self.adapter.get(adapter_key(_PREFIX + name))

        def pieces() -> Iterator[tuple[int, Tensor]]:
            if own is not None:
                yield 0, _whole(own)[part.start : part.start + part.numel]
                return
            for start in range(0, part.numel, CHUNK_ITEMS):
                yield (
                    start,
                    self.base.read(
                        self.aliases.get(name, name), part.start + start, min(CHUNK_ITEMS, part.numel - start)
                    ),
                )

        return pieces

    def _changed(self, module: str, name: str, part: StoredTensor) -> Callable[[], Iterator[tuple[int, Tensor]]]:
        def pieces() -> Iterator[tuple[int, Tensor]]:
            merged = self._merged(module)[name.removeprefix(f"{module}.")]
            yield 0, merged.reshape(-1)[part.start : part.start + part.numel]

        return pieces

    # ------------------------------------------------------------------ one module

    def _module_of(self, name: str) -> str | None:
        """The wrapped module that a parameter belongs to."""
        return next((module for module in self.wrapped if name.startswith(f"{module}.")), None)

    def _merged(self, name: str) -> dict[str, Tensor]:
        """A wrapped module's parameters and buffers with the adapter merged; the last one is kept."""
        if self._last[0] != name:
            self._last = name, self._merge(name)
        return self._last[1]

    @torch.no_grad()
    def _merge(self, name: str) -> dict[str, Tensor]:
        self._last = "", {}
        module: Any = copy.deepcopy(self.wrapped[name]).float().to_empty(device="cpu")
        tensors = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}
        originals = dict(self.wrapped[name].named_parameters(remove_duplicate=False))
        for local, tensor in tensors.items():
            key = self.shared.get(id(originals.get(local)))
            plain = f"{name}.{_plain_name(local)}"
            plain = self.aliases.get(plain, plain)
            if key is not None:
                tensor.copy_(_whole(self.adapter[key]).view(tensor.shape))
            elif plain in self.stored:
                tensor.copy_(self.base.read(plain, 0, tensor.numel()).view(tensor.shape))
        try:
            if hasattr(module, "unload_and_optionally_merge_module"):
                result: Any = module.unload_and_optionally_merge_module(
                    merge=True, safe_merge=False, adapter_names=None
                )
            else:
                module.merge()
                result = module.get_base_layer()
        except (RuntimeError, ValueError, NotImplementedError) as error:  # lora_bias on layers without a bias
            raise UserError(f"{self.source.folder}: peft cannot merge {name}: {error!s:.300} {_BY_PEFT}") from error
        found = {**dict(result.named_parameters()), **dict(result.named_buffers())}
        return {local: tensor.detach() for local, tensor in found.items()}

    def _now(self, name: str) -> Tensor:
        """A parameter of the merged model, by any of its names."""
        module = self._module_of(name)
        if module is not None:
            return self._merged(module)[name.removeprefix(f"{module}.")]
        stored = self.aliases.get(name, name)
        shape = self.plain.get_parameter(stored).shape
        return self.base.read(stored, 0, shape.numel()).view(shape)

    def _untied(self) -> dict[str, tuple[StoredTensor, ...]]:
        """Tied parameters that the adapter makes different from each other: each is stored from now on."""
        found: dict[str, tuple[StoredTensor, ...]] = {}
        for name, stored in self.aliases.items():
            is_changed = self._module_of(name) is not None or self._module_of(stored) is not None
            if is_changed and not torch.equal(self._now(name), self._now(stored)):
                found[name] = (StoredTensor(name, tuple(self.plain.get_parameter(name).shape), 0),)
        for config in (self.plain.config, self.plain.config.get_text_config()) if found else ():
            config.tie_word_embeddings = False
        return found

    def write_configs(self, folder: Path, sources: list[Source]) -> None:
        """As `save_pretrained` of the merged model would."""
        config = self.plain.config
        config.architectures = [type(self.plain).__name__]
        dtypes = {TORCH_DTYPES[s.spec.dtype] for s in sources if TORCH_DTYPES[s.spec.dtype].is_floating_point}
        config.dtype = max(dtypes, key=lambda d: sum(s.spec.numel for s in sources if TORCH_DTYPES[s.spec.dtype] == d))
        config.save_pretrained(folder)
        for place in (self.source.folder, self.base_folder):  # with the stop tokens of what was learned
            if (place / "generation_config.json").is_file():
                files.copy_file(place / "generation_config.json", folder / "generation_config.json")
                break
        for name in processor.FILES if processor.takes_more_than_text(config) else ():
            if (self.base_folder / name).is_file():
                files.copy_file(self.base_folder / name, folder / name)


def _aliases(plain: nn.Module, stored: StoredTensors) -> dict[str, str]:
    names = list(plain.named_parameters(remove_duplicate=False))
    known = {id(param): name for name, param in names if name in stored}
    return {name: known[id(param)] for name, param in names if name not in stored and id(param) in known}


def _wrapped(adapted: nn.Module) -> dict[str, nn.Module]:
    """The outermost modules of peft's, by the names of what they stand for."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    found: dict[str, Any] = {}
    modules: list[tuple[str, Any]] = list(adapted.named_modules())
    for name, module in modules:
        plain = name.removeprefix(_PREFIX)
        is_inside = any(name.startswith(f"{_PREFIX}{outer}.") for outer in found)
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)) and not is_inside:
            found[plain] = module
    return found


def _plain_name(local: str) -> str:
    """A parameter's name inside of a wrapped module as the plain module has it."""
    while inner := next((prefix for prefix in _INNER if local.startswith(prefix)), None):
        local = local.removeprefix(inner)
    return local


def _whole(source: Source) -> Tensor:
    found = torch.empty(source.spec.numel)
    for start, piece in source.pieces():
        found[start : start + piece.numel()] = piece.float()
    return found


def _base_folder(source: Exported, own: dict[str, Any], base: str | None) -> Path:
    name = base or own.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise UserError(f"{source.folder}/adapter_config.json names no base model. Add --base FOLDER_OR_HUB_ID")
    revision = own.get("revision") if base is None else None
    folder = local_folder(name, revision)
    if folder is None:
        raise UserError(
            f"the base model {name} of {source.folder} is not here. Download it (launcher prefetch "
            f"model.model_name_or_path={name}), or say where it is: --base FOLDER_OR_HUB_ID"
        )
    if files.read_json_or(folder / "config.json", {}).get("quantization_config"):
        raise UserError(
            f"the base model {name} is quantised: what is added to it would be rounded away. "
            "Give the model that it was made of: --base FOLDER_OR_HUB_ID"
        )
    return folder


def _rows_of_tokenizer(folder: Path) -> int:
    from transformers import AutoTokenizer

    if not (folder / "tokenizer_config.json").is_file():
        return 0
    try:
        return num_rows(AutoTokenizer.from_pretrained(str(folder)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ResumeError(f"the tokenizer of {folder} cannot be loaded: {error!s:.300}") from error
