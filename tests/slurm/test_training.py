"""Real two-node ZeRO-3 runs: whatever Slurm does, they end with the weights of the undisturbed run (promise 1)."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from launcher import cli
from tests.distributed import faulty
from tests.slurm.cluster import Cluster, wait_for
from tests.slurm.conftest import talking_to

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

_SETTINGS = (
    "strategy=zero3", "launch=slurm", "launch.num_machines=2", "launch.num_processes=2", "train.max_steps=60",
    "train.train_batch_size=8", "train.per_device_train_batch_size=4", "train.logging_steps=1", "eval.eval_strategy=no",
    "checkpoint.save_steps=5", "checkpoint.save_total_limit=2", "tracker=off", "launch.env={OMP_NUM_THREADS: '1'}",
)  # fmt: skip
_TIMEOUT_S = 900


def _slow_steps(seconds: float) -> str:
    return f"""launch.env.FAULTS='[{{"kind": "sleep", "seconds": {seconds}}}]'"""


class TrainingRun:
    """A job in the working directory, whose steps take long enough for something to happen between them."""

    def __init__(self, cluster: Cluster, root: Path, *overrides: str) -> None:
        self.cluster, self.root = cluster, root
        shutil.copy(faulty.__file__, "faulty.py")  # part of the code that a job takes along
        paced = ("optim.name=faulty.FaultyAdamW", _slow_steps(0.3))
        assert cli.main(["submit", *_SETTINGS, *paced, f"output_dir={root}", *overrides]) == 0
        self.job_id = (root / "slurm" / "job_id").read_text().strip()

    def run_json(self) -> dict[str, Any]:
        path = self.root / "run.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def log(self) -> str:
        return "".join(p.read_text(errors="replace") for p in sorted((self.root / "logs").glob("*.log")))

    def wait_step(self, step: int) -> None:
        wait_for(lambda: self.run_json().get("step", 0) >= step, _TIMEOUT_S, lambda: f"step {step}:\n{self.log()}")

    def wait_completed(self) -> str:
        """The digest of the final weights."""
        ends = ("COMPLETED", "FAILED")
        wait_for(lambda: self.cluster.state(self.job_id) in ends, _TIMEOUT_S, lambda: f"an end:\n{self.log()}")
        assert self.cluster.state(self.job_id) == "COMPLETED", self.log()
        assert self.run_json()["state"] == "finished"
        return hashlib.sha256((self.root / "model.safetensors").read_bytes()).hexdigest()

    def rank_pid(self, rank: int) -> int:
        """The process of a rank of the start that runs now."""
        wanted = {f"RANK={rank}", f"LAUNCHER_ATTEMPT={self.run_json()['attempt']}"}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                environ = set((folder / "environ").read_text().split("\0"))
                command = (folder / "cmdline").read_text()
            except (OSError, UnicodeDecodeError):
                continue
            if wanted <= environ and "launcher.train" in command:
                return int(folder.name)
        raise AssertionError(f"no process of rank {rank}")


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("undisturbed")
    with talking_to(cluster, folder):
        return TrainingRun(cluster, folder / "run").wait_completed()


def test_weights_are_identical_when_preempted(undisturbed: str, use_cluster: Cluster, tmp_path: Path) -> None:
    run = TrainingRun(use_cluster, tmp_path / "run")
    run.wait_step(7)
    with use_cluster.occupied() as other:
        use_cluster.wait_state(other, "RUNNING", timeout_s=120)
        assert (run.run_json()["state"], run.run_json()["reason"]) == ("interrupted", "preempted")
        assert (run.root / f"checkpoint-{run.run_json()['step']}").is_dir()
    assert run.wait_completed() == undisturbed
    assert use_cluster.job(run.job_id)["Restarts"] == "1"


def test_weights_are_identical_when_time_limit_is_hit(undisturbed: str, use_cluster: Cluster, tmp_path: Path) -> None:
    """The first start is told that its end is near, so that the ranks stop for it by themselves."""
    moved = "launch.setup=['squeue() { date -d \"+$((SLURM_RESTART_COUNT * 3600 + 70)) seconds\" +%s; }']"
    run = TrainingRun(use_cluster, tmp_path / "run", moved, "launch.sbatch.signal='B:USR1@0'")
    assert run.wait_completed() == undisturbed
    assert use_cluster.job(run.job_id)["Restarts"] == "1"
    assert "stopped and saved: time_limit" in run.log()


def test_weights_are_identical_when_a_rank_is_killed(undisturbed: str, use_cluster: Cluster, tmp_path: Path) -> None:
    run = TrainingRun(use_cluster, tmp_path / "run")
    run.wait_step(7)
    os.kill(run.rank_pid(1), signal.SIGKILL)
    assert run.wait_completed() == undisturbed
    assert use_cluster.job(run.job_id)["Restarts"] == "0"
    assert "restarting from the last checkpoint (1 of" in run.log()


def test_weights_are_identical_when_a_node_is_set_down(undisturbed: str, use_cluster: Cluster, tmp_path: Path) -> None:
    run = TrainingRun(use_cluster, tmp_path / "run")
    run.wait_step(7)
    use_cluster.run("scontrol", "update", "NodeName=n1", "State=DOWN", "Reason=test")
    wait_for(lambda: use_cluster.job(run.job_id).get("Restarts") == "1", 120, "Slurm to requeue the job")
    use_cluster.run("scontrol", "update", "NodeName=n1", "State=RESUME")
    assert run.wait_completed() == undisturbed


def test_weights_are_identical_when_a_rank_hangs(undisturbed: str, use_cluster: Cluster, tmp_path: Path) -> None:
    run = TrainingRun(use_cluster, tmp_path / "run", "launch.hang_timeout_s=120")
    run.wait_step(7)
    stopped = run.rank_pid(1)
    os.kill(stopped, signal.SIGSTOP)
    try:
        wait_for(lambda: "restarting from the last checkpoint" in run.log(), 300, lambda: f"a restart\n{run.log()}")
    finally:
        wait_for(lambda: not Path(f"/proc/{stopped}").exists(), 60, "the hanging rank to be killed")
    assert "Thread" in (run.root / "logs" / "stacks-rank-0.txt").read_text()
    assert run.wait_completed() == undisturbed


@pytest.mark.parametrize(("num_processes", "strategy"), [(1, "single"), (2, "ddp")])
def test_run_on_one_node_continues_when_it_gets_sigterm(
    use_cluster: Cluster, tmp_path: Path, num_processes: int, strategy: str
) -> None:
    """With one process, accelerate starts the rank without torchrun."""
    own = ("launch.num_machines=1", f"launch.num_processes={num_processes}", f"strategy={strategy}")
    run = TrainingRun(use_cluster, tmp_path / "run", *own)
    run.wait_step(3)
    use_cluster.run("scancel", "--signal=TERM", run.job_id)
    run.wait_completed()
    assert "stopped and saved: signal" in run.log()
    assert use_cluster.job(run.job_id)["Restarts"] == "1"


# --------------------------------------------------------------------------- Slurm's own time limit

_LIMIT_S, _STEP_S = 180, 2.0
"""60 steps of 2 s do not fit between the start and the stop, a minute before the limit of three minutes."""
_NO_SQUEUE = "launch.setup=['unset SLURM_JOB_END_TIME', 'squeue() { echo no answer >&2; return 1; }']"


@dataclass
class LimitedRun:
    """A run under a time limit of Slurm's own, and what was seen of each of its starts."""

    run: TrainingRun
    ends: dict[int, float] = field(default_factory=dict)
    stops: dict[int, dict[str, Any]] = field(default_factory=dict)
    _attempts: list[str] = field(default_factory=list)

    def look(self) -> bool:
        """Notes how the job stands; True once it has ended."""
        job, run = self.run.cluster.job(self.run.job_id), self.run.run_json()
        state = job["JobState"]
        if state == "RUNNING":
            self.ends[int(job["Restarts"])] = datetime.fromisoformat(job["EndTime"]).timestamp()
        if run.get("attempt") not in (None, *self._attempts):
            self._attempts.append(run["attempt"])
        if run.get("state", "running") != "running":
            self.stops[self._attempts.index(run["attempt"])] = run
        return state not in ("RUNNING", "PENDING", "COMPLETING", "REQUEUED")

    def check(self) -> None:
        """Every start but the last saved, stopped before Slurm's limit, and was requeued; Slurm ended none."""
        assert self.run.cluster.state(self.run.job_id) == "COMPLETED", self.run.log()
        *stopped, last = sorted(self.ends)
        assert stopped and last == int(self.run.cluster.job(self.run.job_id)["Restarts"])
        for start in stopped:
            assert (self.stops[start]["state"], self.stops[start]["reason"]) == ("interrupted", "time_limit")
            assert 0 < self.stops[start]["step"] < 60
        assert self.run.run_json()["state"] == "finished"
        assert self.run.log().count("stopped and saved: time_limit") == len(stopped)
        accounting = (self.run.cluster.root / "jobcomp.log").read_text()
        states = re.findall(rf"^JobId={self.run.job_id} .* JobState=(\w+)", accounting, re.MULTILINE)
        assert states == ["PENDING"] * len(stopped) + ["COMPLETED"], "of each start; PENDING: it was requeued"

    def spare_s(self) -> dict[int, float]:
        """Between the end of each stop and Slurm's limit, by start."""
        stops = {start: stop for start, stop in self.stops.items() if stop["state"] == "interrupted"}
        return {start: self.ends[start] - stop["updated_at"] for start, stop in stops.items()}

    def save_s(self, start: int) -> float:
        """How long the last save before the stop took: a writer gives way to all others on two cores."""
        lines = map(json.loads, (self.run.root / "metrics.jsonl").read_text().splitlines())
        saves = [line for line in lines if "save_write_s" in line and line["step"] < self.stops[start]["step"]]
        return float(saves[-1]["save_write_s"]) if saves else 0.0

    def tensors(self) -> dict[str, str]:
        """The digests of the final weights, and of the weights and the optimizer's state of the last checkpoint."""
        files = [self.run.root / "model.safetensors", *sorted((self.run.root / "checkpoint-60").rglob("*.safetensors"))]
        return {str(p.relative_to(self.run.root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def limited(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, LimitedRun]]:
    """An undisturbed run, then both ways to stop for the limit at once: their time is mostly sleep."""
    folder = tmp_path_factory.mktemp("limited")
    with talking_to(cluster, folder):

        def submit(name: str, *overrides: str) -> LimitedRun:
            return LimitedRun(TrainingRun(cluster, folder / name, *overrides))

        runs = {"undisturbed": submit("undisturbed")}
        runs["undisturbed"].run.wait_completed()
        limit = f"launch.sbatch.time='00:{_LIMIT_S // 60:02}:00'"
        runs["end_time"] = submit("end_time", limit, _slow_steps(_STEP_S))
        runs["backstop"] = submit("backstop", limit, _slow_steps(_STEP_S), _NO_SQUEUE)
        both = (runs["end_time"], runs["backstop"])
        wait_for(
            lambda: all([run.look() for run in both]), _TIMEOUT_S, lambda: "".join(run.run.log() for run in both), 0.5
        )
        yield runs


def test_weights_and_state_are_identical_when_slurms_time_limit_is_near(limited: dict[str, LimitedRun]) -> None:
    """The main process knows the end of its job from Slurm, and stops save_s + step_s + 60 s before it."""
    limited["end_time"].check()
    for start, spare_s in limited["end_time"].spare_s().items():
        assert 58 < spare_s < 60 + limited["end_time"].save_s(start) + 4 * _STEP_S  # a busy machine steps slower
    assert limited["end_time"].tensors() == limited["undisturbed"].tensors()


def test_weights_and_state_are_identical_when_only_slurms_signal_tells_of_the_limit(
    limited: dict[str, LimitedRun],
) -> None:
    """No end time is to be had: SIGUSR1 comes from Slurm itself, one to two minutes before the limit."""
    limited["backstop"].check()
    assert all(30 < spare_s < 120 for spare_s in limited["backstop"].spare_s().values())
    assert "no answer" in limited["backstop"].run.log()
    assert limited["backstop"].tensors() == limited["undisturbed"].tensors()
