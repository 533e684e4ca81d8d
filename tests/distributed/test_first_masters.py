"""Precision: the fp32 masters of the first step are the fp32 weights that a run begins with, under every strategy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from launcher.base.paths import RunPaths
from launcher.checkpoint.load import TensorFiles
from launcher.checkpoint.snapshot import OPTIMIZER_STEM
from tests.distributed.runs import Lab
from tests.distributed.test_save_pretrained import pretrained, stored

_STILL = (
    "optim.learning_rate=0", "optim.weight_decay=0", "train.max_steps=1", "checkpoint.save_steps=1",
    "model.dtype=bfloat16",
)  # fmt: skip


def masters(run: RunPaths) -> dict[str, torch.Tensor]:
    states, found = TensorFiles(run.checkpoint_dir(1), OPTIMIZER_STEM), {}
    for key, spec in states.specs.items():
        if key.startswith("master."):
            tensor = torch.empty(spec.numel)
            states.read_into(key, 0, tensor)
            found[key.removeprefix("master.")] = tensor.view(spec.shape)
    states.close()
    return found


@pytest.mark.parametrize("strategy", ["zero2", pytest.param("zero3", marks=pytest.mark.slow)])
def test_masters_are_the_pretrained_models_fp32_weights(lab: Lab, tmp_path: Path, strategy: str) -> None:
    base = pretrained(tmp_path / "base", "llama")
    more = (*_STILL, "model=pretrained", f"model.model_name_or_path={base}")
    run = lab.run(tmp_path / "run", strategy, 2, *more)
    found, expected = masters(run), stored(base)
    assert set(found) == set(expected)
    assert [name for name in found if not found[name].equal(expected[name])] == []
    assert any(not value.equal(value.bfloat16().float()) for value in expected.values()), "bfloat16 would do"
    weights = stored(run.checkpoint_dir(1))
    assert [name for name in found if not weights[name].equal(found[name].bfloat16())] == []


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_masters_are_those_of_ddp_when_trained_from_scratch(lab: Lab, tmp_path: Path, strategy: str) -> None:
    expected = masters(lab.run(tmp_path / "ddp", "ddp", 2, *_STILL))
    found = masters(lab.run(tmp_path / "zero", strategy, 2, *_STILL))
    assert set(found) == set(expected)
    assert [name for name in found if not found[name].equal(expected[name])] == []
