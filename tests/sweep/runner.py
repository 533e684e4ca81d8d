"""A sweep of stub jobs, run by a controller in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
MAIN = Path(__file__).with_name("controller_main.py")
COMMON = ["checkpoint.metric_for_best_model=loss", "eval.eval_strategy=steps"]


class SweepRunner:
    """Starts controllers on one sweep folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.started: list[subprocess.Popen[str]] = []

    def start(self, *overrides: str, **env: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(MAIN), *COMMON, f"output_dir={self.root}", *overrides]
        environment = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
        environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "LAUNCHER_REPORT": "0", **env}
        process = subprocess.Popen(
            command, cwd=self.root.parent, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self.started.append(process)
        return process

    def run(self, *overrides: str, timeout_s: float = 240, **env: str) -> tuple[int, str]:
        process = self.start(*overrides, **env)
        output, _ = process.communicate(timeout=timeout_s)
        return process.returncode, output

    def job(self, name: str) -> Path:
        return self.root / name

    def state(self, name: str) -> str:
        return str(json.loads((self.job(name) / "run.json").read_text())["state"])

    def ended(self) -> dict[str, list[str]]:
        """The result of every job that ran to its end, once per time it did."""
        return {p.parent.name: p.read_text().splitlines() for p in sorted(self.root.glob("*/ended.log"))}

    def records(self) -> dict[str, dict[str, Any]]:
        found = {p.parents[1].name: p for p in self.root.glob("*/logs/job.json")}
        return {name: json.loads(path.read_text()) for name, path in found.items()}


def wait_until(is_true: Callable[[], object], timeout_s: float = 120) -> None:
    end = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)
