"""A request to stop in the first moments of `launcher train` is obeyed: 75, nothing lost, nothing left running."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher.base.errors import EXIT_STOPPED
from tests.slurm.cluster import wait_for


def _start(root: Path, *more: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "launcher.cli", "train", "strategy=single", "launch.num_processes=1", *more]
    with (root.parent / "out").open("wb") as out:
        return subprocess.Popen([*command, f"output_dir={root}"], stdout=out, stderr=out, cwd=root.parent)


def _catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal by now."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught, 16) >> (number - 1) & 1)


def _processes_of(root: Path) -> list[str]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if str(root).encode() in command:
            found.append(command.replace(b"\0", b" ").decode())
    return found


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run that was stopped before and would go on."""
    root = tmp_path / "run"
    root.mkdir()
    (root / "run.json").write_text(json.dumps({"state": "interrupted", "reason": "signal", "step": 7, "exit_code": 75}))
    return root


def _check_nothing_lost(root: Path) -> None:
    wait_for(lambda: not _processes_of(root), 60, lambda: f"the end of {_processes_of(root)}")
    run = json.loads((root / "run.json").read_text())
    assert (run["state"], run["reason"], run["step"]) == ("interrupted", "signal", 7)
    assert not (root / "STOP").exists()


@pytest.mark.parametrize("delay_ms", [0, 20, 50, 100, 200, 500, pytest.param(1500, marks=pytest.mark.slow)])
def test_stop_is_obeyed_when_it_comes_after(run_dir: Path, delay_ms: int) -> None:
    """Before Python has come to our first line the kernel ends it; there too nothing is lost."""
    process = _start(run_dir)
    time.sleep(delay_ms / 1000)
    is_ours = _catches(process.pid, signal.SIGTERM)
    process.terminate()
    code, text = process.wait(timeout=120), (run_dir.parent / "out").read_text()
    assert code == EXIT_STOPPED or (not is_ours and code == -signal.SIGTERM), text
    assert "Traceback" not in text
    _check_nothing_lost(run_dir)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda number: number.name)
@pytest.mark.parametrize("more", [(), ("-m", "seed=1,2")], ids=["run", "sweep"])
def test_stop_is_obeyed_from_the_first_line_of_ours_on(
    run_dir: Path, number: signal.Signals, more: tuple[str, ...]
) -> None:
    process = _start(run_dir, *more)
    wait_for(lambda: _catches(process.pid, signal.SIGUSR1), 60, "a handler", poll_s=0.001)
    os.kill(process.pid, number)
    assert process.wait(timeout=120) == EXIT_STOPPED
    assert (run_dir.parent / "out").read_text() == "launcher: stopped before the start; nothing was running\n"
    _check_nothing_lost(run_dir)
    assert [path.name for path in run_dir.iterdir()] == ["run.json"]
