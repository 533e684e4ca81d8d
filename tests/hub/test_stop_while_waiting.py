"""Promise 5 and a stop: a run that is finished and waits for the Hub ends as soon as somebody asks it to."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.base import files, lock_file
from launcher.base.paths import RunPaths
from launcher.hub import pending_uploads
from tests.distributed.runs import Lab, kill, log_text, settings, wait_until, write_rows
from tests.distributed.zygote import Zygote, environment
from tests.faults.launches import launched
from tests.hub.helpers import REPO
from tests.hub.server import HubServer
from tests.hub.test_starts import uploaders

_SOON_S = 30.0
"""What a busy machine needs for the ends of processes, and much less than the waits for the Hub."""
_PUSH = (
    "hub=push", f"hub.hub_model_id={REPO}", "hub.hub_strategy=all_checkpoints", "hub.max_wait_s=600",
    "train.max_steps=4", "checkpoint.save_steps=2", "scheduler.warmup_steps=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    folder: Path = tmp_path_factory.mktemp("waiting")
    zygote = Zygote(folder / "log")
    yield Lab(zygote, folder)
    zygote.close()


@pytest.mark.parametrize(
    "by", ["SIGTERM", *(pytest.param(by, marks=pytest.mark.slow) for by in ("SIGINT", "SIGHUP", "STOP"))]
)
def test_finished_run_ends_at_once_when_it_waits_for_the_hub(
    lab: Lab, hub: HubServer, env: dict[str, str], by: str
) -> None:
    paths = RunPaths(lab.folder / f"run-{by}")
    blocked = hub.fail("POST .*/commit/", hang=120.0, times=None)
    pids = lab.start(paths.root, "ddp", 2, *_PUSH, env=env)
    wait_until(lambda: files.read_json_or(paths.run_state, {}).get("state") == "finished", "the end of training")
    wait_until(lambda: bool(blocked.hits), "the first commit")
    started = time.monotonic()
    if by == "STOP":
        paths.stop_file.touch()
    else:
        kill(pids, signal.Signals[by])
    assert lab.zygote.wait() == [0, 0], log_text(paths.root)
    assert time.monotonic() - started < _SOON_S
    state = files.read_json(paths.run_state)
    assert (state["state"], state["exit_code"]) == ("finished", 0)
    assert state["hub"]["pending"] and f"launcher push {paths.root}" in log_text(paths.root)
    assert not paths.stop_file.exists() and uploaders(paths.root) == []


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [1, 3])
def test_finished_run_sends_everything_when_it_is_disturbed_while_it_waits_for_the_hub(
    hub: HubServer, env: dict[str, str], tmp_path: Path, num_processes: int
) -> None:
    """A closed terminal, `| head`, Ctrl-Z and back: all to the agent, the main process and the uploader."""
    write_rows(tmp_path / "rows.jsonl")
    blocked = hub.fail("POST .*/commit/", hang=8.0, times=2)
    overrides = [
        *settings(tmp_path / "rows.jsonl", tmp_path / "cache"), *_PUSH, f"launch.num_processes={num_processes}",
        f"strategy={'ddp' if num_processes > 1 else 'single'}",
    ]  # fmt: skip
    with launched(overrides, tmp_path / "run", env) as run:
        wait_until(lambda: run.run_state().get("state") == "finished" and bool(blocked.hits), "the wait", 120.0)
        mains = lock_file.read(run.paths.lock)
        assert mains is not None and uploaders(run.paths.root)
        for pid in (run.process.pid, mains.pids[0][0], *uploaders(run.paths.root)):
            for number in (signal.SIGHUP, signal.SIGPIPE, signal.SIGSTOP, signal.SIGCONT):
                with contextlib.suppress(ProcessLookupError):  # the uploader of the first SIGHUP; another one comes
                    os.kill(pid, number)
                time.sleep(0.1)
        assert run.wait(120) == 0, run.text()
    state = run.run_state()
    assert (state["state"], state["hub"]["pending"], state["hub"]["failed"]) == ("finished", [], []), run.text()
    assert set(hub.repos[REPO].tags) == {"step-2", "step-4"}
    assert hub.read(REPO, "model.safetensors") == (run.paths.root / "model.safetensors").read_bytes()


def _train_again(lab: Lab, paths: RunPaths, env: dict[str, str]) -> subprocess.Popen[str]:
    """`launcher train` on a finished run: it only sends what is left."""
    overrides = lab.overrides(paths.root, "single", *_PUSH)
    return subprocess.Popen(
        [sys.executable, "-m", "launcher.cli", "train", *overrides], env={**environment(), **env}, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


@pytest.mark.parametrize("by", [pytest.param("SIGTERM", marks=pytest.mark.slow), "STOP"])
def test_start_of_a_finished_run_ends_at_once_when_it_waits_for_the_hub(
    lab: Lab, hub: HubServer, env: dict[str, str], by: str
) -> None:
    paths = RunPaths(lab.folder / f"again-{by}")
    lab.run(paths.root, "single", 1, *_PUSH, "hub.max_wait_s=0", env=env)
    blocked = hub.fail("POST .*/commit/", hang=120.0, times=None)
    paths.stop_file.write_text("preempted")  # left by somebody who asked too late: it must stop nothing
    process = _train_again(lab, paths, env)
    try:
        wait_until(lambda: bool(blocked.hits), "a commit")
        assert not paths.stop_file.exists()
        started = time.monotonic()
        if by == "STOP":
            paths.stop_file.touch()
        else:
            os.kill(process.pid, signal.SIGTERM)
        text = process.communicate(timeout=60)[0]
    finally:
        process.kill()
    assert process.returncode == 0 and time.monotonic() - started < _SOON_S, text
    assert "not sent yet" in text and "launcher push" in text and "Traceback" not in text
    assert not paths.stop_file.exists() and uploaders(paths.root) == []


def test_what_is_pending_is_sent_by_the_agent_when_the_last_process_is_killed_while_it_waits(
    lab: Lab, hub: HubServer, env: dict[str, str]
) -> None:
    """Exit code 0 and not a word: nobody learnt that something had not arrived."""
    root = lab.folder / "killed-while-waiting"
    blocked = hub.fail("POST .*/commit/", hang=120.0, times=None)
    overrides = [o for o in lab.overrides(root, "ddp", *_PUSH) if not o.startswith("launch.num_processes")]
    with launched([*overrides, "launch.num_processes=3"], root, env) as run:
        wait_until(lambda: run.run_state().get("state") == "finished", "the end of training")
        wait_until(lambda: bool(blocked.hits), "the first commit")
        wait_until(lambda: len(run.ranks()) == 1, "the end of the others")
        hub.heal()
        kill(run.ranks())
        assert run.wait() == 0, run.text()
        assert "was ended before it had sent everything to the Hub" in run.text()
    assert set(hub.repos[REPO].tags) == {"step-2", "step-4"} and not pending_uploads(RunPaths(root))
    assert hub.read(REPO, "model.safetensors") == (root / "model.safetensors").read_bytes()
