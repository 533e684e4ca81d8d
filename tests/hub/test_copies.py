"""Promises 4 and 5 where no hard links can be made: what is copied for its upload does not go, and not much is held."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.base import files, manifest
from launcher.base.paths import RunPaths
from launcher.hub import pushed_checkpoints
from launcher.hub.client import SpoolHub
from tests.distributed.runs import Lab, kill, log_text, wait_until
from tests.distributed.zygote import Zygote
from tests.hub.helpers import REPO, make_checkpoint, make_config
from tests.hub.server import HubServer


@pytest.fixture
def may_copy(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """No links, and copies that wait for this."""

    def no_links(*_: Any, **__: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    event, copy = threading.Event(), shutil.copyfileobj
    monkeypatch.setattr(os, "link", no_links)
    monkeypatch.setattr(shutil, "copyfileobj", lambda *a: event.wait(20) and copy(*a))
    monkeypatch.setattr("launcher.hub.client.UploaderProcess.ensure_running", lambda self: None)
    return event


def make_hub(run: Path, **hub: Any) -> SpoolHub:
    sync = SpoolHub(make_config(run, **hub), RunPaths(run))
    sync.start()
    return sync


def test_one_is_copied_and_one_waits_when_saves_come_faster(tmp_path: Path, may_copy: threading.Event) -> None:
    run = tmp_path / "run"
    sync = make_hub(run, hub_strategy="all_checkpoints")
    for step in (10, 20, 30, 40):
        sync.checkpoint_committed(step, make_checkpoint(run, step))
    assert list(sync.held_names) == ["checkpoint-10", "checkpoint-40"]
    notices = "\n".join(sync.poll())
    assert "checkpoint-20" in notices and "checkpoint-30" in notices and "hard links" in notices
    assert sync.status()["failed"] == ["checkpoint-20", "checkpoint-30"]
    may_copy.set()
    wait_until(lambda: not sync.held_names, "the copies", 30.0)
    assert sync.status()["pending"] == ["checkpoint-10", "checkpoint-40"]
    assert not list((run / ".hub").glob("tmp-*"))
    sync.finish(None, max_wait_s=0.0)


def test_newest_wins_when_it_is_enough(tmp_path: Path, may_copy: threading.Event) -> None:
    run = tmp_path / "run"
    sync = make_hub(run, hub_strategy="checkpoint")
    for step in (10, 20, 30):
        sync.checkpoint_committed(step, make_checkpoint(run, step))
    assert list(sync.held_names) == ["checkpoint-10", "checkpoint-30"]
    assert sync.status()["passed_over"] == ["checkpoint-20"] and sync.status()["failed"] == []
    may_copy.set()
    sync.finish(None, max_wait_s=0.0)


def test_copy_is_named_when_the_disk_refuses_it(
    tmp_path: Path, may_copy: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    run = tmp_path / "run"
    sync = make_hub(run, hub_strategy="all_checkpoints")
    sync.checkpoint_committed(10, make_checkpoint(run, 10))
    wait_until(lambda: not sync.held_names, "the copy", 30.0)
    notices = "\n".join(sync.finish(None, max_wait_s=0.0))
    assert "checkpoint-10 could not be copied" in notices and "No space left" in notices
    assert f"launcher push {run}/checkpoint-10" in notices and sync.status()["failed"] == ["checkpoint-10"]
    assert not list((run / ".hub").glob("tmp-*"))
    again = make_hub(run, hub_strategy="all_checkpoints")
    assert again.status()["pending"] == ["checkpoint-10"]
    again.finish(None, max_wait_s=0.0)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    folder: Path = tmp_path_factory.mktemp("copies")
    zygote = Zygote(folder / "log")
    yield Lab(zygote, folder)
    zygote.close()


@pytest.mark.slow
def test_upload_is_not_lost_when_a_run_without_links_is_killed_while_it_copies(
    lab: Lab, hub: HubServer, env: dict[str, str]
) -> None:
    """Retention would have deleted what was being copied, and the next start removes half a copy."""
    push = (
        "hub=push", f"hub.hub_model_id={REPO}", "hub.hub_strategy=all_checkpoints", "hub.max_wait_s=500",
        "train.max_steps=20", "checkpoint.save_steps=2", "checkpoint.save_total_limit=1", "scheduler.warmup_steps=1",
    )  # fmt: skip
    faults = json.dumps([{"kind": "no_links", "seconds": 0.5}, {"kind": "sleep", "seconds": 0.3}])
    paths = RunPaths(lab.folder / "run")
    pids = lab.start(paths.root, "ddp", 2, *push, env={**env, "FAULTS": faults})

    def newest() -> int:
        return max((step for step, _ in paths.checkpoint_dirs()), default=0)

    wait_until(lambda: newest() >= 6, "step 6")
    kill(pids)
    lab.zygote.wait()
    left = {step: folder for step, folder in paths.checkpoint_dirs()}
    assert 2 in left and len(left) <= 4, left  # one that is copied, one that waits, the newest, one save
    assert all(manifest.verify(folder) == [] for folder in left.values())
    lab.run(paths.root, "ddp", 2, *push, env={**env, "FAULTS": faults})
    state = files.read_json(paths.run_state)
    pushed, named = set(pushed_checkpoints(paths)), {int(name.split("-")[1]) for name in state["hub"]["failed"]}
    assert {2, 20} <= pushed and pushed | named >= set(range(2, 21, 2)), (pushed, named, log_text(paths.root))
    assert [step for step, _ in paths.checkpoint_dirs()] == [20], "what was held goes at the end"
