"""Which devices this process may use. Imports no torch."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        names = [name.strip() for name in given.split(",")]
        valid = [name for name in names if name]
        return valid[: valid.index("-1")] if "-1" in valid else valid  # CUDA ignores what follows an invalid one
    if shutil.which("nvidia-smi"):
        try:
            answer = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return []
        return [str(i) for i, _ in enumerate(line for line in answer.stdout.splitlines() if line.startswith("GPU "))]
    return [str(i) for i, _ in enumerate(Path("/dev").glob("nvidia[0-9]*"))]


def num_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0))
