"""Promise 5 from the trainer's side: nothing waits for the Hub, and what is pending is named and sent later."""

from __future__ import annotations

import errno
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from launcher.base.paths import RunPaths
from launcher.hub import NoHub, build_hub, pending_uploads, pushed_checkpoints, send_left_over
from launcher.hub.client import SpoolHub
from launcher.hub.items import Item, UploadSettings
from launcher.hub.spool import Spool
from tests.hub.helpers import REPO, make_checkpoint, make_config, wait_until, write_model
from tests.hub.server import HubServer

MAX_STALL_S = 5.0  # generous: the test machine may be busy


def make_hub(run: Path, **settings: Any) -> SpoolHub:
    hub = build_hub(make_config(run, **settings), RunPaths(run))
    assert isinstance(hub, SpoolHub)
    return hub


def test_nothing_happens_when_not_pushing(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    config.hub.push_to_hub = False
    hub = build_hub(config, RunPaths(tmp_path))
    assert isinstance(hub, NoHub)
    hub.start()
    hub.checkpoint_committed(10, make_checkpoint(tmp_path, 10))
    assert (hub.poll(), hub.status(), hub.finish(tmp_path)) == ([], {}, [])
    assert not RunPaths(tmp_path).hub_dir.exists()


def test_everything_arrives_when_folders_are_deleted_at_once(
    hub: HubServer, trainer_env: dict[str, str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    sync = make_hub(run, hub_strategy="all_checkpoints")
    sync.start()
    assert not hub.requests
    models = {}
    for step in (10, 20, 30):
        folder = make_checkpoint(run, step)
        models[step] = (folder / "model.safetensors").read_bytes()
        sync.checkpoint_committed(step, folder)
        shutil.rmtree(folder)  # retention does not wait for the upload
    write_model(run, 30)
    lines = sync.finish(run)
    assert sync.status()["pending"] == [] and sync.status()["command"] is None
    assert any("model is at" in line for line in lines) and not any("not sent yet" in line for line in lines)
    for step, data in models.items():
        assert hub.read(REPO, f"checkpoint-{step}/model.safetensors") == data
    assert hub.read(REPO, "model.safetensors") == models[30]
    assert set(pushed_checkpoints(RunPaths(run))) == {10, 20, 30}
    assert pending_uploads(RunPaths(run)) == []


def test_training_never_waits_when_hub_hangs(hub: HubServer, trainer_env: dict[str, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    hub.fail(".*", hang=60.0, times=None)
    sync = make_hub(run, hub_strategy="checkpoint")
    folders = [make_checkpoint(run, step) for step in (10, 20, 30)]
    stalls = []
    for step, folder in zip((10, 20, 30), folders, strict=True):
        for call in (sync.start, lambda s=step, f=folder: sync.checkpoint_committed(s, f), sync.poll, sync.status):
            started = time.monotonic()
            call()
            stalls.append(time.monotonic() - started)
        time.sleep(0.3)
    started = time.monotonic()
    lines = sync.finish(None, max_wait_s=1.0)
    assert time.monotonic() - started < 1.0 + 5 * MAX_STALL_S
    assert sorted(stalls)[-2] < MAX_STALL_S, stalls
    assert any("not sent yet" in line and f"launcher push {run}" in line for line in lines)
    status = sync.status()
    assert status["pending"] and status["command"] == f"launcher push {run}"
    hub.heal()
    following = make_hub(run, hub_strategy="checkpoint")  # the next `launcher train` on the folder
    following.start()
    assert following.finish(None)
    assert following.status()["pending"] == []
    assert b'"step": 30' in hub.read(REPO, "last-checkpoint/manifest.json")


def test_newest_wins_and_the_others_are_counted_when_link_is_slow(tmp_path: Path) -> None:
    run = tmp_path / "run"
    sync = make_hub(run, hub_strategy="checkpoint")
    sync._uploader.ensure_running = lambda: None  # type: ignore[method-assign]  # a link of no bandwidth at all
    sync.start()
    for step in (10, 20, 30):
        sync.checkpoint_committed(step, make_checkpoint(run, step))
    assert sync.status()["pending"] == ["checkpoint-30"]
    assert sync.status()["passed_over"] == ["checkpoint-10", "checkpoint-20"]


def test_nothing_is_dropped_when_all_checkpoints(tmp_path: Path) -> None:
    run = tmp_path / "run"
    sync = make_hub(run, hub_strategy="all_checkpoints")
    sync._uploader.ensure_running = lambda: None  # type: ignore[method-assign]
    sync.start()
    for step in range(1, 8):
        sync.checkpoint_committed(step, make_checkpoint(run, step, num_bytes=100))
    assert sync.status()["pending"] == [f"checkpoint-{s}" for s in range(1, 8)]


def test_oldest_is_dropped_and_named_when_spool_is_full(tmp_path: Path) -> None:
    run = tmp_path / "run"
    sync = make_hub(run, hub_strategy="all_checkpoints", max_spool_bytes=100_000)
    sync._uploader.ensure_running = lambda: None  # type: ignore[method-assign]
    sync.start()
    for step in (10, 20, 30):
        sync.checkpoint_committed(step, make_checkpoint(run, step))
    assert sync.status()["pending"] == ["checkpoint-20", "checkpoint-30"]
    assert sync.status()["failed"] == ["checkpoint-10"]
    notices = sync.poll()
    assert len(notices) == 1 and "checkpoint-10" in notices[0] and "hub.max_spool_bytes" in notices[0]
    held = sum(f.stat().st_size for f in (run / ".hub" / "queue").rglob("*") if f.is_file())
    assert held < 110_000
    again = make_hub(run, hub_strategy="all_checkpoints", max_spool_bytes=100_000)
    again.start()  # what was dropped is not queued again behind the user's back
    assert again.status()["pending"] == ["checkpoint-20", "checkpoint-30"]


def test_files_are_copied_without_waiting_when_links_are_impossible(
    hub: HubServer, trainer_env: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    sync = make_hub(run, hub_strategy="every_save")
    sync.start()

    def no_links(*_: Any, **__: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", no_links)
    may_copy = threading.Event()
    copy = shutil.copyfileobj
    monkeypatch.setattr(shutil, "copyfileobj", lambda *a: may_copy.wait(20) and copy(*a))
    folder = make_checkpoint(run, 10)
    data = (folder / "model.safetensors").read_bytes()
    sync.checkpoint_committed(10, folder)
    shutil.rmtree(folder)
    assert sync.status()["pending"] == ["checkpoint-10"]
    may_copy.set()
    sync.finish(None)
    assert hub.read(REPO, "model.safetensors") == data


def test_finish_returns_at_once_when_only_the_user_can_help(
    hub: HubServer, trainer_env: dict[str, str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    hub.tokens.clear()
    sync = make_hub(run, hub_strategy="every_save", max_wait_s=300.0)
    sync.start()
    sync.checkpoint_committed(10, make_checkpoint(run, 10))
    started = time.monotonic()
    lines = sync.finish(None)
    assert time.monotonic() - started < 200
    assert any("ERROR" in line and "hf auth login" in line for line in lines)
    assert "hf auth login" in str(sync.status()["last_error"])


def test_uploader_is_started_again_when_it_dies(
    hub: HubServer, trainer_env: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.hub.client.RESTART_INTERVAL_S", 0.1)
    run = tmp_path / "run"
    hub.fail("POST .*/commit/", hang=30.0)
    sync = make_hub(run, hub_strategy="every_save")
    sync.start()
    sync.checkpoint_committed(10, make_checkpoint(run, 10))
    wait_until(lambda: hub.faults[0].hits)
    process = sync._uploader._process
    assert process is not None
    process.kill()
    process.wait()
    wait_until(lambda: sync.poll() is not None and sync.status()["pending"] == [])
    sync.finish(None)
    assert "model.safetensors" in hub.repos[REPO].files


def test_uploader_is_nice_and_without_torch(hub: HubServer, trainer_env: dict[str, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    fault = hub.fail("POST .*/commit/", hang=30.0)
    sync = make_hub(run, hub_strategy="every_save")
    sync.start()
    sync.checkpoint_committed(10, make_checkpoint(run, 10))
    wait_until(lambda: fault.hits)
    assert sync._uploader._process is not None
    pid = sync._uploader._process.pid
    assert os.getpriority(os.PRIO_PROCESS, pid) == 19
    group = Path(f"/proc/{pid}/autogroup")  # not in every kernel; it is in a session of its own
    assert not group.exists() or group.read_text().endswith("nice 19\n")
    assert "torch" not in Path(f"/proc/{pid}/maps").read_text()
    sync.finish(None, max_wait_s=0.0)
    assert not Path(f"/proc/{pid}").exists()


def test_no_call_raises_when_the_disk_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    sync = make_hub(run, hub_strategy="every_save")
    sync.start()
    shutil.rmtree(run / ".hub")
    (run / ".hub").write_text("in the way")
    sync.checkpoint_committed(10, make_checkpoint(run, 10))
    notices = sync.poll()
    assert any("queueing checkpoint-10 failed" in n and f"launcher push {run}" in n for n in notices)
    sync.finish(None, max_wait_s=0.0)


def test_importing_the_package_imports_no_client() -> None:
    import subprocess
    import sys

    code = (
        "import sys, launcher.hub, launcher.hub.client; print(sorted({'torch', 'huggingface_hub'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_left_over_is_sent_when_the_run_is_finished(
    hub: HubServer, trainer_env: dict[str, str], tmp_path: Path
) -> None:
    run, config = tmp_path / "run", make_config(tmp_path / "run", hub_strategy="end")
    write_model(run, 1)
    sync = make_hub(run, hub_strategy="end")
    sync.start()
    for _ in range(2):  # the end of the run was reached twice: one final model is pending
        assert any("not sent yet: model." in line for line in sync.finish(run, max_wait_s=0.0))
    assert any("model is at" in line for line in send_left_over(config, RunPaths(run)))
    assert send_left_over(config, RunPaths(run)) == []
    assert hub.count("POST .*/commit/") == 1


def test_checkpoints_are_sent_to_another_repository_when_it_is_chosen_later(
    hub: HubServer, trainer_env: dict[str, str], tmp_path: Path
) -> None:
    """They were taken for sent, because the first repository has them, and listed as on the Hub."""
    run = tmp_path / "run"
    for repo in (REPO, "org/other"):
        sync = make_hub(run, hub_strategy="all_checkpoints", hub_model_id=repo)
        sync.start()
        if repo == REPO:
            for step in (10, 20):
                sync.checkpoint_committed(step, make_checkpoint(run, step))
        sync.finish(None)
        assert set(hub.repos[repo].tags) == {"step-10", "step-20"}
        assert set(pushed_checkpoints(RunPaths(run))) == {10, 20}


# --------------------------------------------------------------------------- full disks


@pytest.fixture
def refusals(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """So many times more the disk refuses to queue something. No uploader runs."""
    left, add = [0], Spool.add

    def full(self: Spool, item: Item) -> Path:
        if left[0]:
            left[0] -= 1
            raise OSError(errno.ENOSPC, "No space left on device")
        return add(self, item)

    monkeypatch.setattr(Spool, "add", full)
    monkeypatch.setattr("launcher.hub.client.UploaderProcess.ensure_running", lambda self: None)
    monkeypatch.setattr("launcher.hub.client.POLL_INTERVAL_S", 0.0)
    monkeypatch.setattr("launcher.hub.client.RETRY_INTERVAL_S", 0.0)
    return left


def test_what_a_full_disk_refused_is_queued_in_its_order_when_there_is_room(
    tmp_path: Path, refusals: list[int]
) -> None:
    """It was named once, in the midst of the run, with a command that sends something else, and never sent."""
    run = tmp_path / "run"
    sync = make_hub(run, hub_strategy="all_checkpoints")
    sync.start()
    refusals[0] = 3
    sync.checkpoint_committed(10, make_checkpoint(run, 10))
    assert f"launcher push {run}/checkpoint-10" in sync.poll()[0]  # and the second refusal
    sync.checkpoint_committed(20, make_checkpoint(run, 20))
    assert (sync.status()["pending"], sync.status()["failed"]) == ([], ["checkpoint-10", "checkpoint-20"])
    sync.poll()
    sync.checkpoint_committed(30, make_checkpoint(run, 30))
    assert sync.status()["pending"] == ["checkpoint-10", "checkpoint-20", "checkpoint-30"]
    assert sync.status()["failed"] == []


def test_newest_is_enough_when_a_full_disk_refused_several(tmp_path: Path, refusals: list[int]) -> None:
    run = tmp_path / "run"
    sync = make_hub(run, hub_strategy="checkpoint")
    sync.start()
    refusals[0] = 2
    for step in (10, 20, 30):
        sync.checkpoint_committed(step, make_checkpoint(run, step))
    status = sync.status()
    assert (status["pending"], status["passed_over"]) == (["checkpoint-30"], ["checkpoint-10", "checkpoint-20"])


def test_what_was_refused_to_the_end_is_named_with_its_command(tmp_path: Path, refusals: list[int]) -> None:
    run = tmp_path / "run"
    sync = make_hub(run, hub_strategy="all_checkpoints")
    sync.start()
    refusals[0] = 10**6
    for step in (10, 20):
        sync.checkpoint_committed(step, make_checkpoint(run, step))
    shutil.rmtree(run / "checkpoint-10")
    write_model(run, 20)
    lines = [*sync.poll(), *sync.finish(run, max_wait_s=0.0)]
    assert any("checkpoint-10 is not pushed" in line for line in lines)
    assert any(line.endswith(f"launcher push {run}/checkpoint-20") and "was not sent" in line for line in lines)
    assert any("the final model could not be queued" in line and f"launcher push {run}" in line for line in lines)
    again = make_hub(run, hub_strategy="all_checkpoints")
    refusals[0] = 0
    again.start()
    assert again.status()["pending"] == ["checkpoint-20"]


def test_settings_of_an_earlier_start_are_not_used_when_the_disk_refuses_new_ones(
    tmp_path: Path, refusals: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may name another repository."""
    run = tmp_path / "run"
    make_hub(run, hub_strategy="all_checkpoints").finish(None, max_wait_s=0.0)
    started: list[str | None] = []
    monkeypatch.setattr(
        "launcher.hub.client.UploaderProcess.ensure_running",
        lambda self: started.append(self._spool.read_settings().repo_id),
    )
    write_settings, left = Spool.write_settings, [2]

    def full(self: Spool, settings: UploadSettings) -> None:
        if left[0]:
            left[0] -= 1
            raise OSError(errno.ENOSPC, "No space left on device")
        write_settings(self, settings)

    monkeypatch.setattr(Spool, "write_settings", full)
    sync = make_hub(run, hub_strategy="all_checkpoints", hub_model_id="org/other")
    sync.start()
    sync.checkpoint_committed(10, make_checkpoint(run, 10))
    assert started == []
    sync.poll()
    assert started == ["org/other"] and sync.status()["pending"] == ["checkpoint-10"]


def test_upload_that_was_damaged_between_two_starts_is_named(tmp_path: Path, refusals: list[int]) -> None:
    """Its files are the checkpoint's own: what is cut off there is cut off in the queue."""
    run = tmp_path / "run"
    sync = make_hub(run, hub_strategy="all_checkpoints")
    sync.start()
    sync.checkpoint_committed(10, make_checkpoint(run, 10))
    sync.finish(None, max_wait_s=0.0)
    (run / "checkpoint-10/model.safetensors").write_bytes(b"half")
    (run / "checkpoint-10").rename(run / "checkpoint-10.damaged")
    again = make_hub(run, hub_strategy="all_checkpoints")
    again.start()
    assert any("checkpoint-10 is not pushed: model.safetensors has 4 bytes" in line for line in again.poll())
