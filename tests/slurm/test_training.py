"""Real two-node ZeRO-3 runs: whatever Slurm does, they end with the weights of the undisturbed run (promise 1)."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from launcher.compose import compose
from launcher.slurm import submit_run
from tests.slurm.cluster import Cluster, wait_for
from tests.slurm.conftest import talking_to

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

_SETTINGS = (
    "strategy=zero3", "launch=slurm", "launch.num_machines=2", "launch.num_processes=2", "train.max_steps=60",
    "train.train_batch_size=8", "train.per_device_train_batch_size=4", "train.logging_steps=1", "eval.eval_strategy=no",
    "checkpoint.save_steps=5", "checkpoint.save_total_limit=2", "tracker=off", "launch.env={OMP_NUM_THREADS: '1'}",
)  # fmt: skip
_TIMEOUT_S = 900


class TrainingRun:
    def __init__(self, cluster: Cluster, root: Path, *overrides: str) -> None:
        self.cluster, self.root = cluster, root
        self.job_id = submit_run(compose((*_SETTINGS, f"output_dir={root}", *overrides))).job_id

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
    moved = "launch.setup=['squeue() { date -d \"+$((SLURM_RESTART_COUNT * 3600 + 90)) seconds\" +%FT%T; }']"
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
