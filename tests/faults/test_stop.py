"""A request to stop is obeyed at any moment, whatever lies where STOP should be: promise 1, exit code 75."""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from pathlib import Path

import pytest

from launcher.base import files, json_lines, manifest
from launcher.base.paths import RunPaths
from tests.distributed.runs import Lab, different, lines, log_text, settings, wait_until, write_rows
from tests.faults.launches import launched


def overrides(folder: Path, *more: str) -> list[str]:
    write_rows(folder / "rows.jsonl")
    common = settings(folder / "rows.jsonl", folder / "cache")
    return [*common, "strategy=ddp", "launch.num_processes=2", *more]


@pytest.mark.timeout(300)
def test_stop_before_the_first_step_ends_within_seconds(tmp_path: Path) -> None:
    """While the ranks import their libraries: nothing is lost, so the code is 75."""
    with launched(overrides(tmp_path), tmp_path / "run") as run:
        wait_until(lambda: (tmp_path / "run" / "logs" / "agent.log").exists(), "the start of the ranks")
        time.sleep(1.0)
        started = time.monotonic()
        os.kill(run.process.pid, signal.SIGTERM)
        assert run.wait(120) == 75, run.text()
        assert time.monotonic() - started < 25, run.text()
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
        assert run.wait(120) == 75
        state = run.run_state()
        assert state["state"] == "interrupted" and state["reason"] == "signal"
        assert manifest.verify(run_dir / f"checkpoint-{state['step']}") == []
    assert (run_dir / "STOP" / "mine").read_text() == "kept"


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("strategy", "count"), [("zero2", 3), pytest.param("single", 1, marks=pytest.mark.slow)])
def test_stop_ends_with_1_and_names_what_is_lost_when_its_save_fails_twice(
    lab: Lab, tmp_path: Path, strategy: str, count: int
) -> None:
    """75 would say that it is saved. The next start goes on from the checkpoint before, bit for bit."""
    run, more = RunPaths(tmp_path / "run"), ("checkpoint.async_save=false", "train.max_steps=40")
    asked = tmp_path / "asked"
    faults = [
        {"kind": "sleep", "seconds": 0.05}, {"kind": "quota", "rank": 0, "step": 12, "bytes": 30_000},
        {"kind": "wait", "step": 18, "file": str(asked)},
    ]  # fmt: skip
    pids = lab.start(run.root, strategy, count, *more, env={"FAULTS": json.dumps(faults)})
    wait_until(lambda: max(lines(run), default=0) >= 14, "step 14")
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
    asked.touch()
    codes = lab.zygote.wait()
    assert 1 in codes and set(codes) <= {1, -9}, log_text(run.root)
    state = files.read_json(run.run_state)
    assert (state["state"], state["reason"], state["exit_code"]) == ("interrupted", "signal", 1)
    assert f"step {state['step']} could not be saved: " in state["error"] and os.strerror(errno.EFBIG) in state["error"]
    assert "The steps after 10 are lost: the same command goes on from checkpoint-10" in state["error"]
    assert state["error"].partition("but ")[2] in log_text(run.root)
    assert [step for step, _ in run.checkpoint_dirs()] == [10] and not run.stop_file.exists()
    plain = lab.run(tmp_path / "plain", strategy, count, *more)
    lab.run(run.root, strategy, count, *more)
    assert different(plain.checkpoint_dir(40), run.checkpoint_dir(40)) == []
    assert "error" not in files.read_json(run.run_state)
    saves = [line for line in json_lines.read(plain.metrics) if "save_stall_s" in line]
    stalls, writes = (sum(line[key] for line in saves) for key in ("save_stall_s", "save_write_s"))
    assert saves and stalls > 0.8 * writes, "nothing else ran"


def test_stop_ends_with_0_when_nothing_was_to_be_saved(lab: Lab, tmp_path: Path) -> None:
    run = RunPaths(tmp_path / "run")
    slow = {"FAULTS": json.dumps([{"kind": "sleep", "seconds": 0.05}])}
    pids = lab.start(run.root, "single", 1, "checkpoint=off", "train.max_steps=2000", env=slow)
    wait_until(lambda: max(lines(run), default=0) >= 3, "step 3")
    os.kill(pids[0], signal.SIGTERM)
    assert lab.zygote.wait() == [0], log_text(run.root)
    assert files.read_json(run.run_state)["exit_code"] == 75


def test_weights_are_the_same_when_the_environment_says_to_accumulate(lab: Lab, tmp_path: Path) -> None:
    plain = lab.run(tmp_path / "plain", "zero2", 2, "train.max_steps=6")
    divided = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}
    for strategy, count in (("zero2", 2), ("ddp", 2)):
        found = lab.run(tmp_path / strategy, strategy, count, "train.max_steps=6", env=divided)
        reference = plain if strategy == "zero2" else lab.run(tmp_path / "ddp-plain", "ddp", 2, "train.max_steps=6")
        assert different(reference.checkpoint_dir(6), found.checkpoint_dir(6)) == []
