"""hydra/launcher=slurm on the real Slurm, with the stand-in for `accelerate launch`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.base.errors import ConfigError
from launcher.slurm import live_jobs
from launcher.sweep import array, main
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import cluster, stand_in_launch, use_cluster  # noqa: F401 - fixtures
from tests.sweep.runner import ROOT, wait_until


@pytest.fixture
def arguments(use_cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:  # noqa: F811
    monkeypatch.setattr(array, "_POLL_S", 0.5)
    launch = stand_in_launch(tmp_path / "bin", num_steps=20)
    yield [
        "hydra/launcher=slurm", f"output_dir={tmp_path}/sweep", "seed=1,2,3", "sweep.num_slots=2", "train.max_steps=20",
        "launch.num_processes=1", f"launch.setup=[\'{launch.setup[0]}\']",
        *(f"launch.env.{name}=\'{value}\'" for name, value in launch.env.items()),
    ]  # fmt: skip


def states(tmp_path: Path) -> list[str]:
    return [json.loads(p.read_text())["state"] for p in sorted(tmp_path.glob("sweep/*/run.json"))]


def test_array_runs_to_its_end_and_nothing_is_submitted_twice(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "sweep.wait=false"]) == 0
    assert "3 to submit" in capsys.readouterr().out
    assert main(arguments) == 0
    output = capsys.readouterr().out
    assert "3 queued or running, 0 to submit" in output
    assert states(tmp_path) == ["finished"] * 3
    assert main([*arguments, "seed=1,2,3,4"]) == 0
    assert "3 done, 0 queued or running, 1 to submit" in capsys.readouterr().out
    assert states(tmp_path) == ["finished"] * 4


def test_jobs_save_and_leave_the_queue_when_the_waiting_command_is_stopped(
    arguments: list[str], tmp_path: Path
) -> None:
    slow = [a.replace("STAND_IN_STEPS='20'", "STAND_IN_STEPS='1000'") for a in arguments]
    command = [sys.executable, "-c", "import sys; from launcher.sweep import main; sys.exit(main(sys.argv[1:]))", *slow]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True)
    reader = threading.Timer(150, process.kill)
    reader.start()
    wait_until(lambda: states(tmp_path).count("running") == 2, timeout_s=90)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate()
    reader.cancel()
    assert process.returncode == 75, output
    assert states(tmp_path) == ["interrupted"] * 2
    assert live_jobs(tmp_path / "sweep" / f"seed={n}" for n in (1, 2, 3)) == {}


def test_dry_run_prints_the_array_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["hydra/launcher=slurm", f"output_dir={tmp_path}/sweep", "seed=1,2,3", "hydra.launcher.array_parallelism=2"]
    assert main(args, is_dry_run=True) == 0
    assert "#SBATCH --array=0-2%2" in capsys.readouterr().out
    assert not (tmp_path / "sweep").exists()


def test_optuna_needs_the_results_of_earlier_jobs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="one by one"):
        main(["hydra/launcher=slurm", "hydra/sweeper=optuna", f"output_dir={tmp_path}", "seed=choice(1,2)"])
