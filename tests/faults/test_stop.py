"""A request to stop is obeyed at any moment, whatever lies where STOP should be: promise 1, exit code 75."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from launcher.base import manifest
from tests.distributed.runs import Lab, different, settings, write_rows
from tests.faults.launches import launched


def overrides(folder: Path, *more: str) -> list[str]:
    write_rows(folder / "rows.jsonl")
    common = settings(folder / "rows.jsonl", folder / "cache")
    return [*common, "strategy=ddp", "launch.num_processes=2", *more]


@pytest.mark.timeout(300)
def test_stop_before_the_first_step_ends_within_seconds(tmp_path: Path) -> None:
    """While the ranks import their libraries: nothing is lost, so the code is 75."""
    with launched(overrides(tmp_path), tmp_path / "run") as run:
        time.sleep(3.0)
        started = time.monotonic()
        os.kill(run.process.pid, signal.SIGTERM)
        assert run.wait(30) == 75, run.text()
        assert time.monotonic() - started < 10, run.text()
        assert run.run_state().get("state") == "interrupted" and run.run_state().get("reason") == "signal"
        assert not (tmp_path / "run" / "STOP").exists()


@pytest.mark.timeout(300)
def test_signal_is_not_lost_when_stop_is_a_folder_and_nobody_reads_the_output(tmp_path: Path) -> None:
    """`launcher train … | head -1` in a folder with a directory STOP."""
    run_dir = tmp_path / "run"
    (run_dir / "STOP").mkdir(parents=True)
    (run_dir / "STOP" / "mine").write_text("kept")
    slow = {"FAULTS": '[{"kind": "sleep", "seconds": 0.1}]'}
    more = overrides(tmp_path, "train.max_steps=2000", "checkpoint.save_steps=500")
    with launched(more, run_dir, slow, reader_gone=True) as run:
        run.wait_for_step(5)
        os.kill(run.process.pid, signal.SIGHUP)  # a terminal that closes
        time.sleep(0.5)
        os.kill(run.process.pid, signal.SIGTERM)
        assert run.wait(60) == 75
        state = run.run_state()
        assert state["state"] == "interrupted" and state["reason"] == "signal"
        assert manifest.verify(run_dir / f"checkpoint-{state['step']}") == []
    assert (run_dir / "STOP" / "mine").read_text() == "kept"


def test_weights_are_the_same_when_the_environment_says_to_accumulate(lab: Lab, tmp_path: Path) -> None:
    plain = lab.run(tmp_path / "plain", "zero2", 2, "train.max_steps=6")
    divided = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}
    for strategy, count in (("zero2", 2), ("ddp", 2)):
        found = lab.run(tmp_path / strategy, strategy, count, "train.max_steps=6", env=divided)
        reference = plain if strategy == "zero2" else lab.run(tmp_path / "ddp-plain", "ddp", 2, "train.max_steps=6")
        assert different(reference.checkpoint_dir(6), found.checkpoint_dir(6)) == []
