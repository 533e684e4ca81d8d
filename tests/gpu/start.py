"""Runs on the device: started as processes of their own, since CUDA does not survive a fork."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from launcher.base import files
from launcher.base.paths import RunPaths
from tests.distributed.runs import log_text, settings, write_rows

ROOT = Path(__file__).resolve().parent.parent.parent
_TIMEOUT_S = 150


def has_cuda() -> bool:
    """Asked of a process of its own: this one may still fork."""
    probe = "import torch, sys; sys.exit(0 if torch.cuda.is_available() else 1)"
    return subprocess.run([sys.executable, "-c", probe], check=False, capture_output=True).returncode == 0


class Runs:
    """Starts runs of one process on the first device, on the same small data, each in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._data = folder / "rows.jsonl"
        write_rows(self._data)

    def overrides(self, output_dir: Path, *more: str) -> list[str]:
        common = settings(self._data, self.folder / "cache")
        return [*common, f"output_dir={output_dir}", "optim=adamw", *more]

    def start(self, name: str, *more: str, command: str = "launcher.train") -> subprocess.Popen[bytes]:
        """A rank without an agent, or with `launcher.cli train` a run as users start it."""
        output_dir = self.folder / name
        output_dir.mkdir(exist_ok=True)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        with (output_dir / "test.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", *command.split(), *self.overrides(output_dir, *more)],
                cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def run(self, name: str, *more: str, command: str = "launcher.train", code: int = 0) -> RunPaths:
        """To its end; fails with its output where it does not exit with `code`."""
        process = self.start(name, *more, command=command)
        try:
            found = process.wait(_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            end(process)
            found = -9
        assert found == code, f"exit code {found}\n{log_text(self.folder / name)}"
        return RunPaths(self.folder / name)

    def run_killed(self, name: str, checkpoint: str, *more: str) -> RunPaths:
        """Killed as soon as a checkpoint is there."""
        process, paths = self.start(name, *more), RunPaths(self.folder / name)
        deadline = time.monotonic() + _TIMEOUT_S
        while not (paths.root / checkpoint).exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        end(process)
        assert (paths.root / checkpoint).exists(), log_text(paths.root)
        assert files.read_json(paths.run)["state"] == "running", "it was over before it could be killed"
        return paths


def end(process: subprocess.Popen[bytes]) -> None:
    """Kills a run with everything that it started."""
    for kill in (lambda: os.killpg(process.pid, signal.SIGKILL), process.kill):
        try:
            kill()
        except ProcessLookupError:
            continue
    process.wait()
