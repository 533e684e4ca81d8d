"""A resume names every setting that would change the result."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.distributed.runs import Lab, log_text
from tests.distributed.test_save_pretrained import pretrained

_LORA = ("model/peft=lora", "model.peft.r=4", "model.peft.target_modules=all-linear", "model=pretrained")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretrained(tmp_path_factory.mktemp("one") / "base", "llama")


def test_lora_refuses_another_base_when_it_has_the_same_name(lab: Lab, tmp_path: Path, base: Path) -> None:
    more = (*_LORA, "checkpoint.save_steps=2")
    lab.run(tmp_path / "run", "single", 1, *more, f"model.model_name_or_path={base}", "train.max_steps=2")

    renamed = tmp_path / "renamed"
    shutil.copytree(base, renamed)
    lab.run(tmp_path / "run", "single", 1, *more, f"model.model_name_or_path={renamed}", "train.max_steps=3")

    other = tmp_path / "other" / base.name
    shutil.copytree(base, other)
    weights = {name: tensor + 0.01 for name, tensor in load_file(other / "model.safetensors").items()}
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    settings = (*more, f"model.model_name_or_path={other}", "train.max_steps=4")
    assert lab.run_codes(tmp_path / "run", "single", 1, *settings) == [2]
    assert "model.base" in log_text(tmp_path / "run")
    lab.run(tmp_path / "run", "single", 1, *settings, "checkpoint.accept_changes=true")


def test_deepspeed_settings_are_compared(lab: Lab, tmp_path: Path) -> None:
    run = ("zero2", 1, "checkpoint.save_steps=2")
    lab.run(tmp_path / "run", *run, "train.max_steps=2")
    rounding = "strategy.deepspeed={zero_optimization: {reduce_bucket_size: 1000}}"
    lab.run(tmp_path / "run", *run, "train.max_steps=3", rounding)
    assert "equal up to rounding from here (strategy.deepspeed.zero_optimization" in log_text(tmp_path / "run")
    changing = "strategy.deepspeed={gradient_clipping: 0.5}"
    before = (tmp_path / "run/config.yaml").read_text()
    assert lab.run_codes(tmp_path / "run", *run, "train.max_steps=4", changing) == [2]
    assert (tmp_path / "run/config.yaml").read_text() == before  # a refused start is not what the run was trained with
    assert "strategy.deepspeed: {} in the checkpoint, {'gradient_clipping': 0.5} now" in log_text(tmp_path / "run")


def test_fewer_steps_are_refused_and_another_model_cannot_be_accepted(lab: Lab, tmp_path: Path) -> None:
    run = (tmp_path / "run", "single", 1)
    lab.run(*run, "train.max_steps=4", "checkpoint.save_steps=2")
    before = (tmp_path / "run/config.yaml").read_text()
    assert lab.run_codes(*run, "train.max_steps=3") == [2]
    assert "(train.max_steps, or train.num_train_epochs): 4 in the checkpoint, 3 now" in log_text(tmp_path / "run")
    accepted = ("train.max_steps=5", "checkpoint.accept_changes=true", "model.config.intermediate_size=24")
    assert lab.run_codes(*run, *accepted) == [2]
    assert "model.config.intermediate_size: " in log_text(tmp_path / "run")
    assert (tmp_path / "run/config.yaml").read_text() == before
    lab.run(*run, "train.max_steps=3", "checkpoint.accept_changes=true")
