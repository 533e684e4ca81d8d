"""A real Slurm for the whole session, and runs of the stand-in on it."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from launcher.config.compose import compose_arguments
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

    def agent_pid(self, node: int) -> int:
        """Of the agent that has started the stand-in of a node."""
        stat = Path(f"/proc/{self.pid(node)}/stat").read_text()
        return int(stat.rpartition(")")[2].split()[1])

    def wait_step(self, step: int, timeout_s: float = 240) -> None:
        wait_for(lambda: self.step >= step, timeout_s, lambda: f"step {step}: {self.run_json()}\n{self.log()}", 0.05)

    def wait_completed(self, timeout_s: float = 240) -> None:
        """The job is COMPLETED and every step was done exactly once."""
        try:
            assert self.cluster.wait_state(self.job_id, "COMPLETED", "FAILED", timeout_s=timeout_s) == "COMPLETED"
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log()}") from None
        assert self.run_json()["state"] == "finished"
        assert json.loads((self.root / "checkpoint.json").read_text())["weights"] == expected_weights(self.num_steps)


SubmitStandIn = Callable[..., StandInRun]


def stand_in_launch(modules_dir: Path, *, num_steps: int, step_s: float = 0.1, **launch: Any) -> LaunchConfig:
    """A launch group whose jobs find the stand-in where Accelerate would be."""
    module = modules_dir / "accelerate" / "commands" / "launch.py"
    module.parent.mkdir(parents=True, exist_ok=True)
    for package in (module.parent, module.parent.parent):  # without, those of site-packages would be found
        (package / "__init__.py").touch()
    module.write_text(_STAND_IN.read_text(encoding="utf-8"), encoding="utf-8")
    env = {"STAND_IN_STEPS": str(num_steps), "STAND_IN_STEP_S": str(step_s), **launch.pop("env", {})}
    setup = [*launch.pop("setup", []), f"export PYTHONPATH={modules_dir}:$PYTHONPATH"]
    return LaunchConfig(**{"num_machines": 2, "env": env, "setup": setup, **launch})


def stand_in_config(launch: LaunchConfig, **fields: Any) -> RunConfig:
    """Settings that the agent takes for those of a real run."""
    return dataclasses.replace(compose_arguments(["strategy=ddp"]), launch=launch, **fields)


@pytest.fixture
def submit_stand_in(use_cluster: Cluster, tmp_path: Path) -> SubmitStandIn:
    return submitter(use_cluster, tmp_path)


def submitter(cluster: Cluster, folder: Path) -> SubmitStandIn:
    def submit(output_dir: str = "run", num_steps: int = 40, **launch: Any) -> StandInRun:
        group = stand_in_launch(folder / "modules", num_steps=num_steps, **launch)
        submission = submit_run(stand_in_config(group, output_dir=output_dir, run_name="stand-in"))
        return StandInRun(cluster, Path(output_dir).resolve(), submission.job_id, num_steps)

    return submit
