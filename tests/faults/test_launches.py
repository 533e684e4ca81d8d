"""Promise 1 through real launches: everything that can stop a run, one after the other in one output_dir.

A start costs ten seconds, so a single run goes through all of it; what it ends with is compared with a run that nobody
touched.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from launcher.base.lock import holder
from tests.distributed.runs import Lab, different, losses, wait_until
from tests.faults.launches import Launch, is_running, launched

_STEPS = 120
_SIZE = ("zero2", 2)
_LONG = (f"train.max_steps={_STEPS}", "checkpoint.save_steps=7", "launch.num_processes=2", "launch.max_restarts=1")
_SLOW = json.dumps([{"kind": "sleep", "seconds": 0.05}])


def _stop_by(launch: Launch, number: int, step: int) -> None:
    launch.wait_for_step(step)
    os.kill(launch.process.pid, number)
    assert launch.wait() == 75, launch.text()
    state = launch.run_state()
    assert (state["state"], state["reason"], state["exit_code"]) == ("interrupted", "signal", 75)
    assert state["step"] >= step and launch.paths.checkpoint_dir(state["step"]).is_dir()
    assert not launch.paths.stop_file.exists()
    assert holder(launch.paths.lock) is None


@pytest.mark.timeout(900)
def test_run_ends_bit_identical_when_it_was_stopped_and_killed_in_every_way(lab: Lab, tmp_path: Path) -> None:
    undisturbed = lab.run(tmp_path / "a", *_SIZE, *_LONG)
    overrides = [*lab.overrides(tmp_path / "b", _SIZE[0], *_LONG)]
    folder = tmp_path / "b"
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    slow = {"FAULTS": _SLOW, "TMPDIR": str(temporary)}

    with launched(overrides, folder, slow) as run:
        run.wait_for_step(10)
        with launched(overrides, folder, slow) as second:  # a second run on a live folder is refused
            assert second.wait(120) == 2
            text = second.text()
        state = run.run_state()
        assert f"host {state['host']}, pid {state['pid']}" in text
        _stop_by(run, signal.SIGTERM, 12)

    with launched(overrides, folder, slow) as run:
        _stop_by(run, signal.SIGUSR1, run.run_state()["step"] + 3)

    once = tmp_path / "killed-once"
    fault = [*json.loads(_SLOW), {"kind": "kill", "rank": 1, "step": 12, "once": str(once)}]
    with launched(overrides, folder, {"FAULTS": json.dumps(fault)}) as run:  # one rank dies; the agent restarts the run
        wait_until(once.exists, "the death of rank 1", 400)
        before = run.run_state()["pid"]
        wait_until(lambda: run.run_state()["pid"] != before, "a restart", 400)
        run.wait_for_step(run.run_state()["step"] + 2)
        assert "restarting from the last checkpoint (1 of 1)" in run.text()
        assert "rank 1" in run.text()
        run.paths.stop_file.write_text("")  # and then somebody asks it to stop
        assert run.wait() == 75, run.text()
        assert run.run_state()["reason"] == "stop_file"
        assert not run.paths.stop_file.exists()

    with launched(overrides, folder, slow) as run:  # the agent alone is killed: its ranks and writers must not go on
        run.wait_for_step(run.run_state()["step"] + 3)
        pids = [*run.ranks()]
        assert len(pids) == 2
        agent = int(Path(f"/proc/{pids[0]}/stat").read_text().rpartition(")")[2].split()[1])
        auxiliary = {Path(f"/proc/{pid}/auxv").read_bytes() for pid in (*pids, agent, run.process.pid)}
        assert len(auxiliary) == 1, "not all are forks of launcher train: another program has other addresses"
        run.process.kill()
        run.process.wait()
        for pid in pids:
            wait_until(lambda pid=pid: not is_running(pid), "the end of an orphaned rank", 120)  # type: ignore[misc]
        wait_until(lambda: holder(run.paths.lock) is None, "a free lock", 120)

    with launched(overrides, folder, slow) as run:  # two SIGINTs: at once, without a save
        run.wait_for_step(run.run_state()["step"] + 3)
        os.kill(run.process.pid, signal.SIGINT)
        os.kill(run.process.pid, signal.SIGINT)
        started = time.monotonic()
        assert run.wait(120) in (1, 75), run.text()
        assert time.monotonic() - started < 60

    left = list(temporary.glob("*"))
    with launched(overrides, folder, {"TMPDIR": str(temporary)}) as run:
        assert run.wait() == 0, run.text()
        assert run.run_state()["state"] == "finished"
    assert list(temporary.glob("*")) == left and not list(temporary.glob("torchelastic*"))

    assert different(undisturbed.checkpoint_dir(_STEPS), run.paths.checkpoint_dir(_STEPS)) == []
    assert losses(run.paths) == losses(undisturbed)
    with launched(overrides, folder) as run:
        assert run.wait(120) == 0
        assert "is finished" in run.text()


@pytest.mark.timeout(600)
def test_stacks_are_written_and_the_run_restarts_when_a_rank_hangs(lab: Lab, tmp_path: Path) -> None:
    undisturbed = lab.run(tmp_path / "a", *_SIZE)
    once = tmp_path / "hung-once"
    fault = json.dumps([{"kind": "hang", "rank": 1, "step": 15, "once": str(once)}])
    more = ("launch.num_processes=2", "launch.max_restarts=1", "launch.hang_timeout_s=20")
    with launched(lab.overrides(tmp_path / "b", _SIZE[0], *more), tmp_path / "b", {"FAULTS": fault}) as run:
        assert run.wait() == 0, run.text()
        assert "launch.hang_timeout_s" in run.text() and "restarting" in run.text()
        stacks = run.paths.stacks(1).read_text()
        assert "faulty.py" in stacks and "_maybe" in stacks, stacks
    assert different(undisturbed.checkpoint_dir(20), run.paths.checkpoint_dir(20)) == []
    assert losses(run.paths) == losses(undisturbed)
