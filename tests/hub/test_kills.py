"""Promises 5 and 1: SIGKILL of either side at every state of the journal; each checkpoint arrives, once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.hub.items import checkpoint_item
from tests.hub.helpers import (
    REPO,
    UploaderUnderTest,
    make_checkpoint,
    make_config,
    prepare_spool,
    upload_all,
    wait_until,
)
from tests.hub.server import HubServer

FEW = [("claimed", 1), ("uploaded", 1), ("committed", 1), ("recorded", 1)]
MORE = [
    ("created", 1), ("committing", 1), ("tagged", 1), ("removed", 1), ("claimed", 2), ("uploaded", 2),
    ("committing", 2), ("committed", 2), ("tagged", 2), ("squashed", 1), ("recorded", 2), ("removed", 2),
]  # fmt: skip
UPLOADER_STATES = [*FEW, *(pytest.param(*state, marks=pytest.mark.slow) for state in MORE)]


@pytest.mark.parametrize(("state", "occurrence"), UPLOADER_STATES)
def test_everything_arrives_once_when_uploader_is_killed(
    hub: HubServer, env: dict[str, str], tmp_path: Path, state: str, occurrence: int
) -> None:
    run = tmp_path / "run"
    spool = prepare_spool(run, make_config(run, hub_strategy="all_checkpoints", save_total_limit=5))
    for step in (10, 20):
        spool.add(checkpoint_item(step, make_checkpoint(run, step)))
    with UploaderUnderTest(spool, env, crash_at=(state, occurrence)) as uploader:
        uploader.process.wait(timeout=120)
        assert uploader.process.returncode == -signal.SIGKILL
    upload_all(spool, env)
    repo = hub.repos[REPO]
    assert hub.count(r"POST .*/commit/") == 2
    assert repo.squashes <= 1
    assert set(repo.tags) == {"step-10", "step-20"}
    for step in (10, 20):
        for path in (run / f"checkpoint-{step}").rglob("*"):
            if path.is_file():
                name = path.relative_to(run).as_posix()
                assert hub.read(REPO, name) == path.read_bytes()
                assert hub.read(REPO, name, f"step-{step}") == path.read_bytes()
    assert set(spool.read_journal()["pushed"]) == {"checkpoint-10", "checkpoint-20"}
    spool.empty_trash()
    assert not any(spool.trash_dir.iterdir())


_TRAINER = """
import os, signal, sys
from pathlib import Path
from launcher.hub import build_hub, spool
from launcher.base.paths import RunPaths
from tests.hub.helpers import make_checkpoint, make_config
run, wanted = Path(sys.argv[1]), sys.argv[2]
hub = build_hub(make_config(run, hub_strategy="checkpoint"), RunPaths(run))
hub.start()
folder = make_checkpoint(run, 10)
seen = []
def crash(state):
    seen.append(state)
    if state == wanted:
        os.kill(os.getpid(), signal.SIGKILL)
spool.on_state = crash
if wanted == "before":
    os.kill(os.getpid(), signal.SIGKILL)
hub.checkpoint_committed(10, folder)
if wanted == "after":
    print(hub._uploader._process.pid, flush=True)
    sys.stdin.read()
"""

_NEXT = """
import sys
from pathlib import Path
from launcher.hub import build_hub
from launcher.base.paths import RunPaths
from tests.hub.helpers import make_config
run = Path(sys.argv[1])
hub = build_hub(make_config(run, hub_strategy="checkpoint"), RunPaths(run))
hub.start()
print(hub.finish(None))
"""


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=180)


@pytest.mark.parametrize(
    "state", ["before", "described", *(pytest.param(s, marks=pytest.mark.slow) for s in ("linked", "queued"))]
)
def test_next_start_sends_it_when_trainer_is_killed(
    hub: HubServer, trainer_env: dict[str, str], tmp_path: Path, state: str
) -> None:
    run = tmp_path / "run"
    killed = run_python(_TRAINER, str(run), state)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    following = run_python(_NEXT, str(run))
    assert following.returncode == 0, following.stderr
    assert "Push checkpoint-10" in [c.title for c in hub.repos[REPO].history()]
    assert not list((run / ".hub").glob("tmp-*"))


def test_uploader_ends_when_trainer_is_killed(hub: HubServer, trainer_env: dict[str, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    hub.fail(".*", hang=60.0, times=None)
    trainer = subprocess.Popen(
        [sys.executable, "-c", _TRAINER, str(run), "after"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert trainer.stdout is not None
        pid = int(trainer.stdout.readline())
        os.kill(pid, 0)
    finally:
        trainer.kill()
        trainer.communicate()

    def is_gone() -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
        except OSError:
            return True

    wait_until(is_gone, timeout_s=60, message=f"the uploader {pid} outlived its trainer")
