"""Runs on the device: started as processes of their own, since CUDA does not survive a fork."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from launcher.base.paths import RunPaths
from tests.distributed.runs import kill, log_text, settings, write_rows
from tests.distributed.zygote import Zygote

ROOT = Path(__file__).resolve().parent.parent.parent
_TIMEOUT_S = 150
GROUP_OF_ONE = {
    "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0", "TORCHELASTIC_RUN_ID": "gpu",
}  # fmt: skip
"""What an agent gives the rank of a process group of one, over nccl; without its id a rank takes the others for
leftovers."""


def has_cuda() -> bool:
    """Asked of a process of its own: this one may still fork."""
    probe = "import torch, sys; sys.exit(0 if torch.cuda.is_available() else 1)"
    return subprocess.run([sys.executable, "-c", probe], check=False, capture_output=True).returncode == 0


def zygote(log: Path) -> Zygote:
    """Its libraries must not open CUDA before it forks: torch then asks the driver's other library what is there."""
    site = os.environ.get("PYTHONPATH", "")
    return Zygote(
        log,
        {
            "PYTHONPATH": os.pathsep.join([str(ROOT), site]), "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
            "DS_ACCELERATOR": "cuda", "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0"),
        },
    )  # fmt: skip


class Runs:
    """Makes runs of one process on the first device, on the same small data, each in a folder of its own."""

    def __init__(self, zygote: Zygote, folder: Path) -> None:
        self._zygote, self.folder = zygote, folder
        self._data = folder / "rows.jsonl"
        write_rows(self._data)

    def overrides(self, output_dir: Path, *more: str) -> list[str]:
        """With the optimizer that users have."""
        left_out = ("optim.name=", "model") if "model=pretrained" in more else ("optim.name=",)
        common = [text for text in settings(self._data, self.folder / "cache") if not text.startswith(left_out)]
        return [*common, f"output_dir={output_dir}", *more]

    def _start(self, name: str, more: tuple[str, ...]) -> list[int]:
        output_dir = self.folder / name
        output_dir.mkdir(exist_ok=True)
        env = GROUP_OF_ONE if "strategy=ddp" in more else {}
        return self._zygote.start(self.overrides(output_dir, *more), 1, output_dir / "test.log", env)

    def run(self, name: str, *more: str) -> RunPaths:
        """To its end; fails with its output where it does not exit 0."""
        self._start(name, more)
        codes = self._zygote.wait()
        assert codes == [0], f"exit code {codes}\n{log_text(self.folder / name)}"
        return RunPaths(self.folder / name)

    def run_killed(self, name: str, checkpoint: str, *more: str) -> RunPaths:
        """Killed as soon as a checkpoint is there."""
        (pid,), paths = self._start(name, more), RunPaths(self.folder / name)
        deadline = time.monotonic() + _TIMEOUT_S
        while not (paths.root / checkpoint).exists() and time.monotonic() < deadline:
            if not Path(f"/proc/{pid}/fd/0").exists():  # over, or not ours any more
                break
            time.sleep(0.002)
        kill([pid])
        codes = self._zygote.wait()
        assert codes == [-signal.SIGKILL], f"exit code {codes}\n{log_text(paths.root)}"
        assert (paths.root / checkpoint).exists(), log_text(paths.root)
        return paths

    def launch(self, name: str, *more: str, env: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        """As users start it: agent, accelerate launch, rank."""
        output_dir = self.folder / name
        output_dir.mkdir(exist_ok=True)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        environment |= env or {}
        with (output_dir / "test.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "launcher.cli", "train", *self.overrides(output_dir, *more)],
                cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def launched(self, name: str, *more: str, code: int = 0, env: Mapping[str, str] | None = None) -> RunPaths:
        process = self.launch(name, *more, env=env)
        try:
            found = process.wait(_TIMEOUT_S)
        finally:
            end(process)
        assert found == code, f"exit code {found}\n{log_text(self.folder / name)}"
        return RunPaths(self.folder / name)


def end(process: subprocess.Popen[bytes]) -> None:
    """Kills a run with everything that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
