"""Promises 1 and 4 with three and four processes: a stop loses nothing, and the best checkpoint stays the best."""

from __future__ import annotations

import itertools
import json
import os
import signal
from pathlib import Path

import pytest

from launcher.base import files, manifest
from launcher.base.paths import RunPaths
from tests.distributed.runs import Lab, different, lines, log_text, losses, wait_until, write_rows

_SIZES = list(itertools.product(("ddp", "zero1", "zero2", "zero3"), (3, 4)))


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("strategy", "count"), [pytest.param(*s, marks=() if s == ("zero3", 3) else pytest.mark.slow) for s in _SIZES]
)
def test_best_and_result_are_the_same_when_a_run_was_stopped_between_saves(
    lab: Lab, tmp_path: Path, strategy: str, count: int
) -> None:
    """By STOP, or by a signal to the last process alone. The best is the first one here, so that retention would take
    it for the oldest; what the stop itself saved is no candidate and goes."""
    rows = tmp_path / "eval.jsonl"
    write_rows(rows, 5)
    more = (
        f"data.eval_files=[{rows}]", "eval.eval_strategy=steps", "eval.eval_steps=3", "checkpoint.save_steps=3",
        "checkpoint.save_total_limit=2", "checkpoint.load_best_model_at_end=true", "checkpoint.greater_is_better=true",
    )  # fmt: skip
    plain = lab.run(tmp_path / "plain", strategy, count, *more)
    run, asked = RunPaths(tmp_path / "run"), tmp_path / "asked"
    slow = [{"kind": "sleep", "seconds": 0.1}, {"kind": "wait", "step": 14, "file": str(asked)}]
    pids = lab.start(run.root, strategy, count, *more, env={"FAULTS": json.dumps(slow)})
    wait_until(lambda: max(lines(run), default=0) >= 7, "step 7")
    if count == 3:
        run.stop_file.write_text("")
    else:
        os.kill(pids[-1], signal.SIGTERM)
    asked.touch()
    assert lab.zygote.wait() == [0] * count, log_text(run.root)
    state = files.read_json(run.run_state)
    assert (state["state"], state["reason"]) == ("interrupted", "stop_file" if count == 3 else "signal")
    assert 7 <= state["step"] < 20 and manifest.verify(run.checkpoint_dir(state["step"])) == []
    assert manifest.verify(run.checkpoint_dir(3)) == [] and not run.stop_file.exists()

    lab.run(run.root, strategy, count, *more)

    for found in (plain, run):
        assert files.read_json(found.run_state)["best_step"] == 3
        assert [(s, manifest.verify(folder)) for s, folder in found.checkpoint_dirs()] == [(3, []), (20, [])]
        best = (found.checkpoint_dir(3) / "model.safetensors").read_bytes()
        assert (found.root / "model.safetensors").read_bytes() == best
    assert different(plain.checkpoint_dir(20), run.checkpoint_dir(20)) == []
    assert losses(plain) == losses(run)
    assert lines(plain, "eval_loss").keys() == lines(run, "eval_loss").keys()


@pytest.mark.parametrize("background", ["true", "false"])
def test_best_is_found_anew_when_another_metric_decides_from_here(lab: Lab, tmp_path: Path, background: str) -> None:
    """Numbers of two metrics were compared: no loss of 3 was ever below a first metric of 1."""
    rows, root = tmp_path / "eval.jsonl", tmp_path / "run"
    write_rows(rows, 5)
    more = (
        f"data.eval_files=[{rows}]", "eval.eval_strategy=steps", "eval.eval_steps=5", "checkpoint.save_steps=5",
        "checkpoint.load_best_model_at_end=true", f"eval.in_background={background}",
        "eval.metric._target_=tests.distributed.judging.Planned", f"eval.metric.calls={tmp_path / 'calls'}",
    )  # fmt: skip
    lab.run(root, "single", 1, *more, "checkpoint.metric_for_best_model=rows", "train.max_steps=10")
    first = files.read_json(RunPaths(root).run_state)
    assert (first["best_step"], first["best_metric"]) == (5, 1.0)

    run = lab.run(root, "single", 1, *more, "checkpoint.metric_for_best_model=loss", "train.max_steps=15")
    measured = {step: line["eval_loss"] for step, line in lines(run, "eval_loss").items()}
    best = min(measured, key=lambda step: measured[step])
    told = files.read_json(run.run_state)
    assert (told["best_step"], told["best_metric"]) == (best, measured[best])
    is_told = "another metric than before, eval_loss, decides" in log_text(root)
    assert is_told or background == "true"  # then checkpoint-10 was saved before anything was measured

    run = lab.run(root, "single", 1, *more, "checkpoint.greater_is_better=true", "train.max_steps=20")
    measured = {step: line["eval_loss"] for step, line in lines(run, "eval_loss").items()}
    worst = max(measured, key=lambda step: measured[step])
    assert files.read_json(run.run_state)["best_step"] == worst
    weights = (run.checkpoint_dir(worst) / "model.safetensors").read_bytes()
    assert (run.root / "model.safetensors").read_bytes() == weights
