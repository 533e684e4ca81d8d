"""A real Slurm for the whole session, and runs of the stand-in on it."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from launcher.config.settings import LaunchConfig, RunConfig
from launcher.slurm import submit_run
from tests.slurm.cluster import Cluster, missing, wait_for
from tests.slurm.stand_in import expected_weights

_STAND_IN = Path(__file__).with_name("stand_in.py")


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if reason := missing():
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as folder:
        own = Cluster(Path(folder) / "c")
        try:
            own.start()
            yield own
        finally:
            own.stop()


@contextmanager
def talking_to(cluster: Cluster, folder: Path) -> Iterator[Cluster]:
    """Slurm's commands go to the test's own Slurm; the working directory is `folder`."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_", "LAUNCHER_"))]:
            patch.delenv(name)
        patch.setenv("SLURM_CONF", cluster.env["SLURM_CONF"])
        patch.chdir(folder)
        yield cluster


@pytest.fixture
def use_cluster(cluster: Cluster, tmp_path: Path) -> Iterator[Cluster]:
    with talking_to(cluster, tmp_path):
        yield cluster


@dataclass
class StandInRun:
    """A submitted run of the stand-in, and what it left in its folder."""

    cluster: Cluster
    root: Path
    job_id: str
    num_steps: int

    @property
    def step(self) -> int:
        return int(self.run_json().get("step", 0))

    def run_json(self) -> dict[str, Any]:
        path = self.root / "run.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def ends(self) -> list[dict[str, Any]]:
        """How each start that could say so ended."""
        path = self.root / "ends.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def reasons(self) -> list[str | None]:
        return [end["reason"] for end in self.ends()]

    def log(self) -> str:
        return "".join(p.read_text() for p in sorted((self.root / "logs").glob("slurm-*.log")))

    def pid(self, node: int) -> int:
        return int((self.root / f"pid-{node}").read_text())

    def wait_step(self, step: int, timeout_s: float = 30) -> None:
        wait_for(lambda: self.step >= step, timeout_s, lambda: f"step {step}: {self.run_json()}\n{self.log()}", 0.05)

    def wait_completed(self, timeout_s: float = 60) -> None:
        """The job is COMPLETED and every step was done exactly once."""
        try:
            assert self.cluster.wait_state(self.job_id, "COMPLETED", "FAILED", timeout_s=timeout_s) == "COMPLETED"
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log()}") from None
        assert self.run_json()["state"] == "finished"
        assert json.loads((self.root / "checkpoint.json").read_text())["weights"] == expected_weights(self.num_steps)


SubmitStandIn = Callable[..., StandInRun]


def stand_in_launch(bin_dir: Path, *, num_steps: int, step_s: float = 0.1, **launch: Any) -> LaunchConfig:
    """A launch group whose jobs find the stand-in where `accelerate` would be."""
    bin_dir.mkdir(exist_ok=True)
    accelerate = bin_dir / "accelerate"
    accelerate.write_text(f'#!/bin/bash\nexec {sys.executable} {_STAND_IN} "$@"\n', encoding="utf-8")
    accelerate.chmod(0o755)
    env = {"STAND_IN_STEPS": str(num_steps), "STAND_IN_STEP_S": str(step_s), **launch.pop("env", {})}
    setup = [*launch.pop("setup", []), f"export PATH={bin_dir}:$PATH"]
    return LaunchConfig(**{"num_machines": 2, "env": env, "setup": setup, **launch})


@pytest.fixture
def submit_stand_in(use_cluster: Cluster, tmp_path: Path) -> SubmitStandIn:
    return submitter(use_cluster, tmp_path)


def submitter(cluster: Cluster, folder: Path) -> SubmitStandIn:
    def submit(output_dir: str = "run", num_steps: int = 40, **launch: Any) -> StandInRun:
        group = stand_in_launch(folder / "bin", num_steps=num_steps, **launch)
        submission = submit_run(RunConfig(output_dir=output_dir, run_name="stand-in", launch=group))
        return StandInRun(cluster, Path(output_dir).resolve(), submission.job_id, num_steps)

    return submit
