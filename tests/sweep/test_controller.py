"""The controller with stub jobs: slots, stops, kills, and running again."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.sweep.controller_main import STUB
from tests.sweep.runner import COMMON, ROOT, SweepRunner, wait_until

EIGHT = ["optim.learning_rate=1e-3,2e-3,3e-3,4e-3", "seed=1,2", "sweep.num_slots=2"]


def test_all_jobs_run_on_disjoint_devices_and_are_ranked(sweep: SweepRunner, tmp_path: Path) -> None:
    devices = tmp_path / "devices"
    code, output = sweep.run(
        "seed=1,2,3,4,5", "optim.learning_rate=0.2,0.1", "launch.num_processes=2",
        CUDA_VISIBLE_DEVICES="3,5,6,7,8", STUB_DEVICES=str(devices),
    )  # fmt: skip
    assert code == 0, output
    assert "10 to run on 2 slots" in output
    assert {p.name for p in devices.iterdir()} == {"3", "5", "6", "7"}  # 8 is left over; no OVERLAP
    assert not list(sweep.root.glob("*/OVERLAP"))
    assert len(sweep.ended()) == 10
    ranking = [line for line in output.splitlines() if line.lstrip()[:1].isdigit() and "learning_rate=" in line]
    assert "learning_rate=0.1" in ranking[0]
    assert "learning_rate=0.2" in ranking[-1]


def test_next_job_starts_at_once_when_one_ends(sweep: SweepRunner) -> None:
    """No batches: with one long job, the short ones pass by on the other slot."""
    code, output = sweep.run(
        "seed=1,2,3,4", "+launch.env.A=x", "sweep.num_slots=2", STUB_LAST="seed=1", STUB_OTHERS="3"
    )
    assert code == 0, output
    assert sweep.ended().keys() == {"seed=1", "seed=2", "seed=3", "seed=4"}
    assert output.index("started   seed=4") < output.index("finished  seed=1")


def test_nothing_runs_twice_when_the_command_is_repeated_and_new_values_add_jobs(sweep: SweepRunner) -> None:
    assert sweep.run("seed=1,2", "optim.learning_rate=0.1", "sweep.num_slots=2")[0] == 0
    code, output = sweep.run("seed=1,2", "optim.learning_rate=0.1", "sweep.num_slots=2")
    assert code == 0
    assert "0 to run" in output
    # The key that was fixed is swept now: the jobs that are there keep their folders.
    code, output = sweep.run("seed=1,2,3", "optim.learning_rate=0.1,0.2", "sweep.num_slots=2")
    assert code == 0
    assert "4 to run" in output
    ended = sweep.ended()
    assert len(ended) == 6
    assert all(len(times) == 1 for times in ended.values())
    assert {"seed=1", "seed=2", "optim.learning_rate=0.2,seed=1", "optim.learning_rate=0.1,seed=3"} <= ended.keys()


def test_finished_jobs_start_again_when_a_fixed_setting_changed(sweep: SweepRunner) -> None:
    """`launcher train` decides what a longer run means; the sweep must not hide the question from it."""
    assert sweep.run("seed=1,2", "train.max_steps=4")[0] == 0
    code, output = sweep.run("seed=1,2", "train.max_steps=8", STUB_STEPS="8")
    assert code == 0
    assert "2 to run" in output
    assert all(len(times) == 2 for times in sweep.ended().values())


def test_others_go_on_when_a_job_fails_and_it_is_retried_on_demand(sweep: SweepRunner) -> None:
    code, output = sweep.run("seed=1,2,3", "sweep.num_slots=1", STUB_FAIL="seed=1")
    assert code == 1
    assert "failed    seed=1" in output
    assert "exit code 1" in output
    assert sweep.ended().keys() == {"seed=2", "seed=3"}
    assert "stub: failing as asked" in (sweep.job("seed=1") / "logs" / "launcher.log").read_text()
    code, output = sweep.run("seed=1,2,3", "sweep.num_slots=1")
    assert code == 1
    assert "0 to run" in output
    assert "sweep.retry_failed=true" in output
    assert sweep.run("seed=1,2,3", "sweep.num_slots=1", "sweep.retry_failed=true")[0] == 0
    assert sweep.ended().keys() == {"seed=1", "seed=2", "seed=3"}


def test_every_job_saves_when_the_sweep_is_stopped(sweep: SweepRunner) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        process = sweep.start(*EIGHT, STUB_STEPS="300", STUB_STEP_S="0.05")
        wait_until(
            lambda: [json.loads(p.read_text())["state"] for p in sweep.root.glob("*/run.json")] == ["running"] * 2
        )
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 75, output
        states = [json.loads(p.read_text())["state"] for p in sweep.root.glob("*/run.json")]
        assert states == ["interrupted"] * 2, output
    code, output = sweep.run(*EIGHT, STUB_STEPS="300", STUB_STEP_S="0")
    assert code == 0, output
    assert [len(times) for times in sweep.ended().values()] == [1] * 8


def test_sweep_goes_on_when_its_terminal_is_closed_and_nobody_reads_its_output(tmp_path: Path) -> None:
    """As `launcher train -m … | head -1`, which used to kill every job."""
    script = (
        "import sys; from launcher.sweep import jobs; from launcher import cli\n"
        f"jobs.job_command = lambda job: [sys.executable, {str(STUB)!r}, *job.arguments]\n"
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    reader, writer = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", script, "train", "-m", *COMMON, "seed=1,2,3", "sweep.num_slots=1",
         f"output_dir={tmp_path / 'sweep'}"],
        stdout=writer, stderr=writer, cwd=tmp_path, start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "LAUNCHER_REPORT": "0", "STUB_STEP_S": "0.2"},
    )  # fmt: skip
    os.close(writer)
    os.read(reader, 1)
    os.close(reader)
    try:
        wait_until(lambda: list(tmp_path.glob("sweep/*/run.json")))
        process.send_signal(signal.SIGHUP)
        assert process.wait(60) == 0
    finally:
        process.kill()
    assert len(list(tmp_path.glob("sweep/*/ended.log"))) == 3


def test_jobs_are_killed_when_asked_twice(sweep: SweepRunner) -> None:
    process = sweep.start("seed=1,2", "sweep.num_slots=2", STUB_STEPS="1000", STUB_STEP_S="0.05", STUB_IGNORE_STOP="1")
    wait_until(lambda: len(list(sweep.root.glob("*/run.json"))) == 2)
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None
    assert any("stopping 2 jobs" in line for line in process.stdout)
    time.sleep(1.0)  # signals close together are one
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1, output
    assert not any(os.path.exists(f"/proc/{record['pid']}") for record in sweep.records().values())  # noqa: PTH110
    assert "0 failed" not in output
    assert "interrupted" in output


def test_second_controller_is_refused_and_a_dead_ones_lock_is_taken_over(sweep: SweepRunner) -> None:
    process = sweep.start("seed=1,2", STUB_STEPS="100", STUB_STEP_S="0.1")
    wait_until(lambda: list(sweep.root.glob("*/run.json")))
    code, output = sweep.run("seed=1,2")
    assert code == 2
    assert f"pid {process.pid}" in output
    process.kill()
    process.wait()
    assert (sweep.root / ".lock").exists()
    code, output = sweep.run("seed=1,2", STUB_STEPS="100", STUB_STEP_S="0.001")
    assert code == 0, output


def test_jobs_stop_with_a_save_when_their_controller_is_killed(sweep: SweepRunner) -> None:
    process = sweep.start("seed=1,2", "sweep.num_slots=2", STUB_STEPS="1000", STUB_STEP_S="0.02")
    wait_until(lambda: len(list(sweep.root.glob("*/run.json"))) == 2)
    process.kill()
    process.wait()
    wait_until(lambda: sweep.state("seed=1") == sweep.state("seed=2") == "interrupted")


def test_every_job_ends_exactly_once_when_controller_and_jobs_are_killed_at_random(sweep: SweepRunner) -> None:
    """Promise 1 for a sweep: run again until done, each job ended once, with the results of an undisturbed sweep."""
    rng = random.Random(0)
    work = {"STUB_STEPS": "40", "STUB_STEP_S": "0.02"}
    for _ in range(6):
        process = sweep.start(*EIGHT, **work)
        wait_until(lambda: process.poll() is not None or sweep.records(), timeout_s=60)  # noqa: B023
        for _ in range(rng.randint(1, 3)):
            time.sleep(rng.uniform(0.1, 0.9))
            pids = [r["pid"] for r in sweep.records().values() if "exit_code" not in r]
            for pid in rng.sample(pids, k=min(1, len(pids))):
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
        process.kill()
        process.communicate(timeout=60)
    code = -1
    for _ in range(3):
        code, output = sweep.run(*EIGHT, **work)
        if code == 0:
            break
    assert code == 0, output
    calm = SweepRunner(sweep.root.parent / "calm")
    assert calm.run(*EIGHT, **{**work, "STUB_STEP_S": "0.001"})[0] == 0
    assert len(calm.ended()) == 8
    assert sweep.ended() == calm.ended()
    assert not list(sweep.root.glob("*/OVERLAP"))


def test_thousand_jobs_are_planned_and_listed_in_five_seconds(sweep: SweepRunner) -> None:
    from launcher.cli import status

    began = _cpu_s()
    process = sweep.start("seed=range(500)", "optim.learning_rate=1e-5,3e-5", "sweep.num_slots=1", STUB_STEP_S="1")
    wait_until(lambda: list(sweep.root.glob("*/logs/job.json")), timeout_s=120)
    assert status.main([str(sweep.root), "--json"]) == 0
    process.kill()
    process.wait()
    assert len(json.loads((sweep.root / "sweep.json").read_text())["jobs"]) == 1000
    assert _cpu_s() - began < 5


def _cpu_s() -> float:
    """Of this process and of those that it has waited for: a busy machine takes no part in it."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime
