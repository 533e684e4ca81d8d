"""A disk that is too small, full, read-only or gone, under real runs. At every operation: test_kill_points.py."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.base import manifest
from launcher.base.paths import RunPaths
from tests.distributed.runs import Lab, different, kill, lines, log_text, losses, wait_until

_MIB = 2**20
_SLOW = {"FAULTS": '[{"kind": "sleep", "seconds": 0.1}]'}


def _slow_until(file: Path) -> dict[str, str]:
    """What happens after the save of step 10 happens before that of step 20, however busy the machine is."""
    return {"FAULTS": json.dumps([{"kind": "sleep", "seconds": 0.1}, {"kind": "wait", "step": 15, "file": str(file)}])}


def _mount(folder: Path, *options: str) -> None:
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", folder], capture_output=True)
    if done.returncode:
        pytest.skip("a file system of its own can only be mounted as root")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for about three checkpoints beside the margin that a save leaves free."""
    folder = tmp_path / "disk"
    folder.mkdir()
    _mount(folder, "size=20m")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def _fill(disk: Path, leave: int) -> Path:
    stats = os.statvfs(disk)
    ballast = disk / "ballast"
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, stats.f_bavail * stats.f_frsize - leave)
    return ballast


@pytest.mark.timeout(300)
def test_saves_are_skipped_while_there_is_no_room_and_resume_when_there_is(
    lab: Lab, disk: Path, tmp_path: Path
) -> None:
    """Promise 4: the earlier checkpoint stays whole, the training goes on, the missed save is made up for."""
    undisturbed = lab.run(tmp_path / "a", "single", 1, "train.max_steps=60")
    run = RunPaths(disk / "run")
    lab.start(run.root, "single", 1, "train.max_steps=60", env=_SLOW)
    wait_until(lambda: run.checkpoint_dir(10).exists(), "checkpoint-10")
    run.temporary_dir(7).mkdir()  # as a failed save leaves it where the disk refuses its deletion, too
    ballast = _fill(disk, leave=_MIB // 2)
    wait_until(lambda: "no checkpoint saved" in log_text(run.root), "the warning")
    assert [s for s, _ in run.checkpoint_dirs()] == [10] and manifest.verify(run.checkpoint_dir(10)) == []
    ballast.unlink()
    before = max(lines(run))
    wait_until(lambda: len(list(run.checkpoint_dirs())) > 1, "the save that was missed")
    made_up = min(s for s, _ in run.checkpoint_dirs() if s > 10)
    assert made_up <= before + 5, "the save was not made up for at once"
    assert lab.zygote.wait() == [0], log_text(run.root)
    text = log_text(run.root)
    assert "bytes" in text and "free. Training goes on and saves as soon as there is room" in text
    assert "room; checkpoint-10 is as it was" in text
    assert "the checkpoints of this run will need up to" in text and "checkpoint.save_total_limit=2" in text
    assert different(undisturbed.checkpoint_dir(60), run.checkpoint_dir(60)) == []
    assert not run.temporary_dir(7).exists()


@pytest.mark.timeout(300)
def test_a_write_that_finds_the_disk_full_costs_only_that_save(lab: Lab, tmp_path: Path) -> None:
    """A quota: the file system says that there is room, and a write fails all the same."""
    folder = tmp_path / "run"
    limit = {"FAULTS": '[{"kind": "quota", "step": 9, "bytes": 100000}, {"kind": "quota", "step": 11, "bytes": -1}]'}
    run = lab.run(folder, "single", 1, "checkpoint.async_save=false", env=limit)
    text = log_text(folder)
    assert "the save of step 10 failed" in text and os.strerror(errno.EFBIG) in text
    assert "no checkpoint is here yet" in text and "as it was" not in text
    steps = [s for s, _ in run.checkpoint_dirs()]
    assert steps == [11, 20], "the failed save was not repeated at the next step"
    assert all(manifest.verify(f) == [] for _, f in run.checkpoint_dirs())
    assert not [p.name for p in run.root.iterdir() if p.name.startswith(".tmp")]


@pytest.mark.timeout(300)
def test_the_run_stops_with_exit_1_when_a_save_fails_and_on_error_is_stop(lab: Lab, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    limit = {"FAULTS": '[{"kind": "quota", "step": 15, "bytes": 100000}]'}
    codes = lab.run_codes(folder, "single", 1, "checkpoint.async_save=false", "checkpoint.on_error=stop", env=limit)
    assert codes == [1]
    run = RunPaths(folder)
    assert "the save of step 20 failed" in log_text(folder) and "Traceback" not in log_text(folder).split("{")[0]
    assert "Nothing of it was committed; checkpoint-10 is as it was. " in log_text(folder)
    assert [s for s, _ in run.checkpoint_dirs()] == [10] and manifest.verify(run.checkpoint_dir(10)) == []
    done = lab.run(folder, "single", 1, "checkpoint.async_save=false", "checkpoint.on_error=stop")
    assert len(losses(done)) == 20


@pytest.mark.timeout(300)
def test_an_output_dir_that_vanishes_is_a_clear_error(lab: Lab, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    pids = lab.start(folder, "ddp", 2, env=_slow_until(tmp_path / "elsewhere"))
    try:
        wait_until(lambda: (folder / "checkpoint-10").exists(), "checkpoint-10")
        folder.rename(tmp_path / "elsewhere")
        codes = lab.zygote.wait()
    finally:
        kill(pids)
    assert set(codes) & {1} and set(codes) <= {1, -9}
    text = log_text(tmp_path / "elsewhere")
    assert f"output_dir={folder} cannot be reached any more" in text and "Traceback" not in text
    assert not folder.exists()
    assert manifest.verify(tmp_path / "elsewhere/checkpoint-10") == []


@pytest.mark.timeout(300)
def test_a_read_only_output_dir_is_refused(lab: Lab, disk: Path, tmp_path: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    log = tmp_path / "log"
    codes = lab.zygote.run(lab.overrides(disk / "run", "single"), 1, log)
    assert codes == [2]
    assert f"output_dir={disk / 'run'} cannot be written" in log.read_text()


@pytest.mark.timeout(300)
def test_the_model_alone_is_published_when_the_last_checkpoint_has_no_room(lab: Lab, disk: Path) -> None:
    """Promises 1 and 4: what was trained is not lost, the earlier checkpoint stays, and the run says what it kept."""
    run = RunPaths(disk / "run")
    lab.start(run.root, "single", 1, "train.max_steps=20", env=_slow_until(disk.parent / "filled"))
    wait_until(lambda: run.checkpoint_dir(10).exists(), "checkpoint-10")
    model = (run.checkpoint_dir(10) / "model.safetensors").stat().st_size
    _fill(disk, leave=16 * _MIB + 2 * model)  # beside the margin: more than the model, less than a checkpoint
    (disk.parent / "filled").touch()
    assert lab.zygote.wait() == [0], log_text(run.root)
    assert [step for step, _ in run.checkpoint_dirs()] == [10]
    assert manifest.verify(run.checkpoint_dir(10)) == []
    assert "its checkpoint could not be saved: only a model is kept" in log_text(run.root)
    published = (run.root / "model.safetensors").read_bytes()
    assert len(published) == model and published != (run.checkpoint_dir(10) / "model.safetensors").read_bytes()
    assert not [p.name for p in run.root.iterdir() if p.name.startswith(".tmp")]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("leave", [0, 12_288])
def test_a_full_cache_is_named_with_its_key(lab: Lab, disk: Path, tmp_path: Path, leave: int) -> None:
    _fill(disk, leave=leave)
    log = tmp_path / "log"
    codes = lab.zygote.run(lab.overrides(tmp_path / "run", "ddp", f"data.cache_dir={disk / 'cache'}"), 2, log)
    text = log.read_text()
    assert 2 in codes, text
    assert f"tokenised data cannot be kept in {disk / 'cache'}: " in text and "Set data.cache_dir=FOLDER" in text
    assert "Traceback" not in text
