"""report.html at the end of a run or sweep: written by a process of its own. Standard library only.

Who leads the run starts it once the run is over: `launcher train`, Slurm's script, and under one's own accelerate
launch the main process. It changes no exit code, and is waited for a few seconds only.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

SWITCH = "LAUNCHER_REPORT"
"""Environment: 0 for none at the end."""
_WAIT_S = 5.0
_PACKAGE_PARENT = Path(__file__).resolve().parents[2]


def write_end_report(root: Path) -> None:
    """Starts `launcher report` and waits for it a while; where the disk is slow it goes on alone."""
    if os.environ.get(SWITCH) == "0":
        return
    path = os.pathsep.join(filter(None, [str(_PACKAGE_PARENT), os.environ.get("PYTHONPATH", "")]))
    with contextlib.suppress(OSError):
        process = subprocess.Popen(
            [sys.executable, "-m", "launcher.cli", "report", "--quiet", str(root)], stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
            env={**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        try:
            if process.wait(_WAIT_S) != 0:
                print(f"launcher: no report was written; why, says: launcher report {root}", file=sys.stderr)
        except subprocess.TimeoutExpired:
            process.returncode = 0  # it is nobody's any more
