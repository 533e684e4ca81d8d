"""Rotary positions whose frequencies follow from the lengths that were seen resume exactly: promise 1."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.distributed.runs import Lab, different, log_text

_DYNAMIC = (
    "model.config.max_position_embeddings=24",
    "+model.config.rope_parameters={rope_type: dynamic, factor: 4.0, rope_theta: 10000.0}",
    "train.per_device_train_batch_size=1", "data.max_length=64", "checkpoint.save_steps=1", "train.max_steps=5",
)  # fmt: skip


def test_a_resume_is_exact_when_frequencies_depend_on_the_longest_row_so_far(lab: Lab, tmp_path: Path) -> None:
    run = lab.run(tmp_path / "run", "ddp", 2, *_DYNAMIC)
    expected = tmp_path / "expected"
    shutil.copytree(run.checkpoint_dir(5), expected)
    for step in (3, 4, 5):
        shutil.rmtree(run.checkpoint_dir(step))
    lab.run(run.root, "ddp", 2, *_DYNAMIC)
    assert "continuing from" in log_text(run.root)
    assert different(run.checkpoint_dir(5), expected) == []
