"""An output_dir that the processes do not share is refused before the first step, however they were started."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.runs import Lab, log_text


@pytest.mark.parametrize("num_processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_run_is_refused_when_the_last_process_has_an_output_dir_of_its_own(
    lab: Lab, tmp_path: Path, num_processes: int
) -> None:
    """The same relative path from two working directories, as on two machines without a shared file system."""
    folders = [tmp_path / "a"] * (num_processes - 1) + [tmp_path / "b"]
    for folder in folders:
        folder.mkdir(exist_ok=True)
    overrides = lab.overrides(Path("out"), "ddp")
    log = tmp_path / "log"
    lab.zygote.start(overrides, num_processes, log, folders=folders)
    codes = lab.zygote.wait()
    assert 2 in codes and set(codes) <= {2, -9}
    text = log.read_text() + log_text(tmp_path / "a/out")
    assert f"rank 0 has {tmp_path}/a/out on host" in text
    assert f"rank {num_processes - 1} has {tmp_path}/b/out on host" in text
    assert not list((tmp_path / "a/out").glob("checkpoint-*"))
    assert not (tmp_path / "a/out/.lock").exists()


def test_no_proof_stays_when_the_folder_is_shared(lab: Lab, tmp_path: Path) -> None:
    run = lab.run(tmp_path / "run", "ddp", 3, "train.max_steps=2")
    assert list(run.root.glob(".shared-*")) == []
