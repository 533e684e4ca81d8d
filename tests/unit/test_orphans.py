"""A rank whose agent was killed while the rank's interpreter was still starting ends at once."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

_RANK = (
    "import time; time.sleep(0.5); from launcher.train import rank_setup; rank_setup.before_imports(); time.sleep(60)"
)


def test_rank_ends_when_its_agent_has_gone_before_it_could_ask_to_die_with_it() -> None:
    """An orphan that asks to die with its parent asks for the end of process 1."""
    shell = f"{sys.executable} -c '{_RANK}' >/dev/null 2>&1 & echo $!"
    env = {**os.environ, "LAUNCHER_SUPERVISED": "1"}
    pid = int(subprocess.run(["bash", "-c", shell], env=env, capture_output=True, text=True, check=True).stdout)
    deadline = time.monotonic() + 30
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
