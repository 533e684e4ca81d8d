"""Checkpoints of earlier versions are gone on from.

`checkpoints/version-1-zero3` was written by the first version (every state under its parameter's name) on two processes
under ZeRO-3 in bfloat16, with the settings below; the lines beside it are those of the undisturbed run.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from launcher.base import json_lines, manifest
from launcher.checkpoint.load import TensorFiles
from launcher.checkpoint.snapshot import OPTIMIZER_STEM
from tests.distributed.runs import Lab, losses

_OLD = Path(__file__).with_name("checkpoints") / "version-1-zero3"
_SETTINGS = (
    "model.config.hidden_size=16", "model.config.intermediate_size=16", "model.config.num_hidden_layers=1",
    "model.config.attention_dropout=0.0", "model.dtype=bfloat16", "checkpoint.accept_changes=true",
)  # fmt: skip


@pytest.mark.parametrize(("strategy", "num_processes"), [("zero3", 2), ("zero2", 3), ("single", 1)])
def test_losses_go_on_when_the_checkpoint_is_of_the_first_version(
    lab: Lab, tmp_path: Path, strategy: str, num_processes: int
) -> None:
    shutil.copytree(_OLD, tmp_path / "run/checkpoint-10")
    shutil.copyfile(_OLD.with_suffix(".jsonl"), tmp_path / "run/metrics.jsonl")
    expected = {line["step"]: line["loss"] for line in json_lines.read(_OLD.with_suffix(".jsonl")) if "loss" in line}
    run = lab.run(tmp_path / "run", strategy, num_processes, *_SETTINGS)
    found = losses(run)
    assert sorted(found) == list(range(1, 21))
    errors = [abs(found[k] - expected[k]) / expected[k] for k in range(11, 21)]
    assert errors[0] < 5e-3 and max(errors) < 3e-2, errors
    assert manifest.read(run.checkpoint_dir(20)).format_version == manifest.FORMAT_VERSION
    before, after = (TensorFiles(run.checkpoint_dir(step), OPTIMIZER_STEM).specs for step in (10, 20))
    assert before == after
