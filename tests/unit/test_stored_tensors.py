"""Promise 8: how parameters are stored is what `save_pretrained` writes, found without a model in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from launcher.model import _transformers
from tests.architectures import ARCHITECTURES, model_config


def saved_by_transformers(model: Any, folder: Path) -> dict[str, Tensor]:
    model.save_pretrained(folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def cut(model: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """The model's tensors, cut as `stored_tensors` says, in the dtypes that `stored_dtypes` says."""
    empty = _transformers.build_without_memory(type(model), model.config, dtype)
    dtypes = _transformers.stored_dtypes(empty, dtype)
    state, found = model.state_dict(), {}
    for name, parts in _transformers.stored_tensors(empty).items():
        flat = state[name].reshape(-1).to(dtypes[name])
        for part in parts:
            found[part.name] = flat[part.start : part.start + part.numel].view(part.shape)
    return found


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_stored_tensors_are_those_of_save_pretrained(tmp_path: Path, name: str) -> None:
    """In bfloat16, where some parameters and buffers stay float32."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(**model_config(name))
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "pretrained")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "pretrained", dtype=torch.bfloat16)
    expected = saved_by_transformers(model, tmp_path / "saved")
    found = cut(model, torch.bfloat16)
    assert {n: (t.dtype, t.shape) for n, t in found.items()} == {n: (t.dtype, t.shape) for n, t in expected.items()}
    assert [n for n in found if not found[n].equal(expected[n])] == []


@pytest.mark.parametrize("name", ["hrm_text", "inkling2_text"])
def test_parameters_that_cannot_be_cut_are_stored_whole_under_their_names_in_memory(name: str) -> None:
    config = AutoConfig.for_model(name)
    empty = _transformers.build_without_memory(AutoModelForCausalLM._model_mapping[type(config)], config, torch.float32)
    state = empty.state_dict()
    stored = _transformers.stored_tensors(empty)
    assert {n for n, _ in empty.named_parameters()} <= set(stored)
    assert all(sum(part.numel for part in parts) == state[n].numel() for n, parts in stored.items())
    names = [part.name for parts in stored.values() for part in parts]
    assert len(names) == len(set(names))
    renamed = [n for n, parts in stored.items() if [p.name for p in parts] != [n]]
    whole = {n for n in stored if n not in renamed}
    assert any("gate" in n for n in whole), "these are the ones that transformers would weave together"


def test_what_save_pretrained_leaves_out_is_not_stored(tmp_path: Path) -> None:
    """`_keys_to_ignore_on_save`, and buffers that are not persistent."""
    config = AutoConfig.for_model(**model_config("deepseek_v3"))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    left_out = "model.layers.1.mlp.gate.e_score_correction_bias"
    model._keys_to_ignore_on_save = {left_out}
    expected = saved_by_transformers(model, tmp_path / "saved")
    empty = _transformers.build_without_memory(type(model), model.config, torch.float32)
    assert left_out in _transformers.stored_tensors(empty)
    empty._keys_to_ignore_on_save = {left_out}
    stored = _transformers.stored_tensors(empty)
    assert left_out not in stored
    assert {part.name for parts in stored.values() for part in parts} == set(expected)
    assert any("inv_freq" in name for name, _ in model.named_buffers())
