"""A NaN never reaches a checkpoint, under any strategy: it ends the run, or its step is left out."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.base.paths import RunPaths
from tests.distributed.runs import Lab, lines, log_text, losses, tensors

_NAN = {"FAULTS": '[{"kind": "nan", "rank": 0, "step": 8}]'}
_SIZES = [
    ("single", 1), ("ddp", 2), ("zero2", 2), ("zero3", 2), pytest.param("zero1", 2, marks=pytest.mark.slow),
    pytest.param("zero3_offload", 2, marks=pytest.mark.slow),
]  # fmt: skip


def _check_finite(run: RunPaths) -> None:
    for step, checkpoint in run.checkpoint_dirs():
        bad = [name for name, tensor in tensors(checkpoint).items() if not tensor.isfinite().all()]
        assert bad == [], f"step {step}"


@pytest.mark.parametrize(("strategy", "num_processes"), _SIZES)
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_a_gradient_of_nan_ends_the_run_or_is_left_out(
    lab: Lab, tmp_path: Path, strategy: str, num_processes: int, dtype: str
) -> None:
    more = (f"model.dtype={dtype}", "checkpoint.save_steps=4")
    codes = lab.run_codes(tmp_path / "stop", strategy, num_processes, *more, env=_NAN)
    assert 1 in codes and set(codes) <= {1, -9}
    stopped = RunPaths(tmp_path / "stop")
    assert "train.on_nonfinite=skip" in log_text(stopped.root)
    assert [s for s, _ in stopped.checkpoint_dirs()] == [4]
    _check_finite(stopped)

    skipped = lab.run(tmp_path / "skip", strategy, num_processes, *more, "train.on_nonfinite=skip", env=_NAN)
    _check_finite(skipped)
    assert sum(line.get("skipped_steps", 0) for line in lines(skipped).values()) == 1
    found = losses(skipped)
    assert found[20] < found[1]
    assert found[8] is None, "a line whose steps were all left out has no loss"


def test_logged_loss_is_the_mean_of_the_steps_that_count_when_one_is_left_out(lab: Lab, tmp_path: Path) -> None:
    each = lab.run(tmp_path / "each", "ddp", 2, "train.on_nonfinite=skip", "train.max_steps=10", env=_NAN)
    mean = lab.run(
        tmp_path / "mean", "ddp", 2, "train.on_nonfinite=skip", "train.max_steps=10", "train.logging_steps=10", env=_NAN
    )
    counted = [loss for loss in losses(each).values() if loss is not None]
    assert min(counted) < losses(mean)[10] < max(counted)
    assert abs(losses(mean)[10] - sum(counted) / len(counted)) < 0.05 * losses(mean)[10]
