"""`accelerate launch -m launcher.train` as a user types it, without `launcher train` above it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from launcher.agent.command import free_port
from launcher.base.paths import RunPaths
from tests.distributed.zygote import ROOT, environment
from tests.faults.launches import Launch

_CONFIG = ROOT / "launcher/agent/accelerate.yaml"


class OwnAgent(Launch):
    """Ended like a `Launch`; its exit code is the agent's own."""

    def __init__(
        self, overrides: list[str], output_dir: Path, num_processes: int, env: dict[str, str] | None = None
    ) -> None:
        self.paths = RunPaths(output_dir)
        self._log = output_dir.with_name(f"{output_dir.name}.log")
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(_CONFIG), "--multi_gpu",
                    "--num_processes", str(num_processes), "--main_process_port", str(free_port()),
                    "-m", "launcher.train", *overrides, f"output_dir={output_dir}",
                ],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                env={**environment(), **(env or {})}, cwd=output_dir.parent,
            )  # fmt: skip

    def __enter__(self) -> OwnAgent:
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.kill_all()
