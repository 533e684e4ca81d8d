"""Experts are one parameter in memory and stored one by one: exports and imports know both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from launcher.base.paths import RunPaths
from launcher.checkpoint.writer import Writer
from launcher.cli import main
from launcher.saving.interop.importing import import_checkpoint
from launcher.saving.interop.skeleton import trainer_groups
from tests.architectures import model_config
from tests.interop.folders import STEP, config_of

MIXTURES = ("qwen3_moe", "ernie4_5_moe", "mixtral", "deepseek_v3", "gpt_oss")


def mixture(name: str = "qwen3_moe") -> Any:
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**model_config(name)), dtype=torch.float32)


def write_our_mixture(folder: Path, model: Any) -> None:
    """A checkpoint of ours: weights in bfloat16 as `save_pretrained` stores them, masters by their names in memory."""
    temporary = folder.parent / f".tmp-{folder.name}"
    (temporary / "state").mkdir(parents=True)
    masters = {f"master.{name}": param.detach() for name, param in model.named_parameters()}
    save_file(masters, temporary / "state/optimizer.safetensors", metadata={"format": "pt"})
    copy = mixture().to(torch.bfloat16)
    copy.save_pretrained(temporary)
    (temporary / "tokenizer_config.json").write_text("{}")
    (temporary / "trainer_state.json").write_text(json.dumps({"global_step": STEP}))
    (temporary / "state/state.json").write_text(json.dumps({"step": STEP}))
    Writer(memoryview(b"")).commit(
        {"step": STEP, "dir": temporary, "target": folder, "world_size": 1, "zero_stage": 0, "files": [], "hashed": []}
    )


def test_experts_are_parts_of_their_fp32_masters_when_exported_in_another_dtype(tmp_path: Path) -> None:
    model = mixture()
    write_our_mixture(tmp_path / "checkpoint-10", model)
    target = tmp_path / "served"
    assert main(["export", str(tmp_path / "checkpoint-10"), str(target), "--format", "safetensors",
                 "--dtype", "float32"]) == 0  # fmt: skip
    expected: dict[str, Tensor] = model.state_dict()
    found = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).state_dict()
    assert [name for name in expected if not expected[name].equal(found[name])] == []
    assert "model.layers.0.mlp.experts.0.gate_proj.weight" in load_file(target / "model.safetensors")


@pytest.mark.parametrize("name", MIXTURES)
def test_a_trainers_mixture_comes_back_as_it_was_when_imported_and_exported(tmp_path: Path, name: str) -> None:
    """Weights under the names in which they are stored, every master and moment under those in memory, and back.

    ernie4_5_moe also has a parameter that no gradient reaches: the correction of its router.
    """
    source, model = tmp_path / "trainer" / f"checkpoint-{STEP}", mixture(name)
    params = dict(model.named_parameters())
    groups = [
        {"params": [params[name] for name in names], "weight_decay": decay}
        for names, decay in zip(trainer_groups(model), (0.1, 0.0), strict=True)
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    for number, param in enumerate(params.values()):
        if param.requires_grad:
            param.grad = torch.full_like(param, 0.01 * (number + 1))
    optimizer.step()
    model.save_pretrained(source)
    torch.save(optimizer.state_dict(), source / "optimizer.pt")
    (source / "trainer_state.json").write_text(json.dumps({"global_step": STEP, "max_steps": 20}))
    output_dir = tmp_path / "run"
    imported = import_checkpoint(source, config_of(output_dir), RunPaths(output_dir))
    stored, expected = load_file(imported / "model.safetensors"), load_file(source / "model.safetensors")
    assert set(stored) == set(expected)
    assert [name for name in expected if not expected[name].equal(stored[name])] == []
    states = load_file(imported / "state/optimizer.safetensors")
    for key, param in params.items():
        if param.requires_grad:
            assert states[f"exp_avg.{key}"].equal(optimizer.state[param]["exp_avg"].view_as(states[f"exp_avg.{key}"]))
    back = tmp_path / "back"
    assert main(["export", str(imported), str(back), "--format", "trainer"]) == 0
    first, second = (torch.load(d / "optimizer.pt", weights_only=True) for d in (source, back))
    assert first["param_groups"] == second["param_groups"] and first["state"].keys() == second["state"].keys()
    for key, state in first["state"].items():
        assert all(torch.equal(state[slot], second["state"][key][slot]) for slot in state), key
    again = load_file(back / "model.safetensors")
    assert set(again) == set(expected) and all(expected[name].equal(again[name]) for name in expected)
