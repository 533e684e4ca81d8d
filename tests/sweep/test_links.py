"""A sweep writes inside of its own folder alone, and a job that cannot be started is no end of the others."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launcher.slurm import queue
from tests.decoy import Decoy
from tests.sweep.runner import SweepRunner


@pytest.mark.parametrize("name", ["seed=1", "seed=1/logs", "seed=1/.hub"])
def test_a_sweep_is_refused_before_any_job_when_a_jobs_folder_is_a_link(
    sweep: SweepRunner, tmp_path: Path, name: str
) -> None:
    outside = Decoy(tmp_path / "outside")
    (sweep.root / name).parent.mkdir(parents=True)
    (sweep.root / name).symlink_to(outside.root)
    code, output = sweep.run("seed=1,2")
    assert code == 2, output
    assert f"{sweep.root / name} is a link to {outside.root}" in output
    assert outside.disturbed() == [] and not sweep.ended()


@pytest.mark.parametrize("name", ["launcher.log", "job.json"])
def test_nothing_outside_is_written_when_a_jobs_file_is_a_link(sweep: SweepRunner, tmp_path: Path, name: str) -> None:
    outside = Decoy(tmp_path / "outside")
    (sweep.root / "seed=1/logs").mkdir(parents=True)
    (sweep.root / "seed=1/logs" / name).symlink_to(outside.root / "a")
    code, output = sweep.run("seed=1,2")
    assert outside.disturbed() == []
    assert "seed=2" in sweep.ended(), output
    if name == "launcher.log":
        assert code == 1
        assert "failed    seed=1" in output and "launcher.log" in output and "Traceback" not in output


def test_a_sweep_is_refused_before_any_job_when_there_is_a_file_in_place_of_a_jobs_folder(sweep: SweepRunner) -> None:
    sweep.root.mkdir()
    (sweep.root / "seed=1").write_text("mine")
    code, output = sweep.run("seed=1,2,3")
    assert code == 2 and "seed=1 is a file" in output, output
    assert (sweep.root / "seed=1").read_text() == "mine" and not sweep.ended()


@pytest.mark.parametrize("more", [(), ("hydra/sweeper=optuna", "hydra/sweeper/sampler=brute_force")])
def test_other_jobs_go_on_when_one_cannot_be_started(sweep: SweepRunner, more: tuple[str, ...]) -> None:
    (sweep.root / "seed=1/logs").mkdir(parents=True)
    os.mkfifo(sweep.root / "seed=1/logs/launcher.log")
    code, output = sweep.run("seed=1,2,3", "sweep.num_slots=2", *more)
    assert code == 1, output
    assert "failed    seed=1" in output and "is a pipe" in output and "Traceback" not in output
    assert sweep.ended().keys() == {"seed=2", "seed=3"}


@pytest.mark.parametrize("content", [b"\xff\xfe", b"12; scancel 3", b"1,2", b"x" * 100_000, b""])
def test_a_noted_job_is_none_when_it_is_no_id(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm/job_id").write_bytes(content)
    assert queue.submitted_id(tmp_path) is None


def test_a_noted_job_is_none_when_it_lies_behind_a_link(tmp_path: Path) -> None:
    outside = Decoy(tmp_path / "outside")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/slurm").symlink_to(outside.root)
    (outside.root / "job_id").write_text("12")
    assert queue.submitted_id(tmp_path / "run") is None
