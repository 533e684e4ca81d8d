"""Several processes on one spool: no checkpoint is damaged, each upload is queued once, one uploader runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.base import manifest
from launcher.base.paths import RunPaths
from launcher.hub import copies
from launcher.hub.client import SpoolHub
from launcher.hub.items import checkpoint_item
from launcher.hub.spool import Spool
from tests.hub.helpers import make_checkpoint, make_config, prepare_spool, wait_until
from tests.hub.server import HubServer

NUM_STARTS = 25
STEPS = (10, 20, 30, 40)
_STARTS = """
import sys, time
from pathlib import Path
from launcher.base.paths import RunPaths
from launcher.hub import build_hub
from launcher.hub.client import UploaderProcess
from tests.hub.helpers import make_config
root, me, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
UploaderProcess.ensure_running = lambda self: None
def meet(run, what):
    (run / f"{what}-{me}").touch()
    while len(list(run.glob(f"{what}-*"))) < count:
        time.sleep(0.0005)
for run in sorted(root.glob("run-*")):
    hub = build_hub(make_config(run, hub_strategy="all_checkpoints"), RunPaths(run))
    meet(run, "ready")
    hub.start()
    meet(run, "started")
    if me == "0":
        (run / "later").rename(run / "checkpoint-40")
    meet(run, "saved")
    hub.checkpoint_committed(40, run / "checkpoint-40")
    told = hub.poll()
    assert all("another process pushes" in text for text in told), told
    meet(run, "done")  # until then the one that fills the spool goes on doing so
    hub.finish(None, max_wait_s=0.0)
"""


@pytest.mark.parametrize("num_processes", [1, 2, 3, 4])
def test_no_checkpoint_is_damaged_when_push_is_switched_on_later(tmp_path: Path, num_processes: int) -> None:
    """Promise 4. The processes start at the same moment in a run that has checkpoints already, 25 times."""
    runs = [tmp_path / f"run-{i:02d}" for i in range(NUM_STARTS)]
    for run in runs:
        for step in STEPS:
            make_checkpoint(run, step, num_bytes=1000)
        (run / "checkpoint-40").rename(run / "later")  # it is saved during the run
    command = [sys.executable, "-c", _STARTS, str(tmp_path)]
    started = [subprocess.Popen([*command, str(i), str(num_processes)], stderr=subprocess.PIPE, text=True)
               for i in range(num_processes)]  # fmt: skip
    errors = [process.communicate(timeout=120)[1] for process in started]
    assert [process.returncode for process in started] == [0] * num_processes, errors
    for run in runs:
        assert [manifest.verify(run / f"checkpoint-{step}") for step in STEPS] == [[]] * 4
        spool = Spool(run / ".hub")
        assert spool.pending() == [f"checkpoint-{step}" for step in STEPS]
        assert [list(spool.read_item(spool.queue_dir / n).problems()) for n in spool.names(spool.queue_dir)] == [[]] * 4
        assert not list(spool.root.glob("tmp-*"))


def test_a_file_in_the_way_is_an_error_when_linking(tmp_path: Path) -> None:
    """It must not be taken for a file system without links and then be written into: it may be a checkpoint's file."""
    run = tmp_path / "run"
    spool = prepare_spool(run, make_config(run))
    checkpoint = make_checkpoint(run, 10)
    home = spool.root / f"tmp-00000001-checkpoint-10-{os.getpid()}" / "files"
    home.mkdir(parents=True)
    os.link(checkpoint / "model.safetensors", home / "model.safetensors")
    with pytest.raises(FileExistsError):
        spool.add(checkpoint_item(10, checkpoint))
    assert manifest.verify(checkpoint) == []


def test_existing_file_is_not_opened_when_copying(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    spool = prepare_spool(run, make_config(run))
    checkpoint = make_checkpoint(run, 10)
    make = copies._make

    def planted(copy: copies.Copy) -> None:
        copy.sources[0][1].symlink_to(checkpoint / "model.safetensors")
        make(copy)

    def no_links(*_: object, **__: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(copies, "_make", planted)
    monkeypatch.setattr(os, "link", no_links)
    spool.add(checkpoint_item(10, checkpoint))
    spool.copies.wait(20.0, lambda: False)
    assert manifest.verify(checkpoint) == []


def uploaders(run: Path) -> list[int]:
    """Pids of the uploader processes of a run that have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"launcher.hub.uploader" in words and str(run / ".hub").encode() in words:
            found.append(int(path.parent.name))
    return found


def test_one_uploader_runs_when_two_starts_happen_at_once(
    hub: HubServer, trainer_env: dict[str, str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    fault = hub.fail("POST .*/commit/", hang=60.0, times=None)
    config = make_config(run, hub_strategy="checkpoint")
    syncs = [SpoolHub(config, RunPaths(run)) for _ in range(2)]
    folder = make_checkpoint(run, 10)
    for sync in syncs:
        sync.start()
    for sync in syncs:
        sync.checkpoint_committed(10, folder)
    wait_until(lambda: fault.hits)
    assert len(uploaders(run)) == 1
    assert syncs[0].poll() == [] and "another process pushes" in syncs[1].poll()[0]
    hub.heal()
    syncs[0].finish(None, max_wait_s=0.0)
    assert uploaders(run) == []
    syncs[1].finish(None)
    assert "last-checkpoint/manifest.json" in hub.repos[config.hub.hub_model_id or ""].files


def test_order_is_kept_when_several_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    spool = prepare_spool(run, make_config(run))

    def no_links(*_: object, **__: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", no_links)
    homes = [spool.add(checkpoint_item(s, make_checkpoint(run, s))) for s in (90, 100)]
    spool.copies.wait(20.0, lambda: False)
    assert spool.pending() == ["checkpoint-90", "checkpoint-100"] and spool.pass_over(homes[1].name) == [
        "checkpoint-90"
    ]
