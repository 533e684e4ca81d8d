"""`launcher train … > run.log`, `>> run.log`, `| tee run.log`: agent and ranks write one file, and nothing is lost."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.runs import Lab
from tests.distributed.zygote import environment

_SLOW = pytest.mark.slow


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("how", "num_processes"),
    [("> {} 2>&1", 2), *(pytest.param(how, count, marks=_SLOW) for how, count in [
        (">> {} 2>&1", 2), ("2>&1 | tee {}", 2), ("> {} 2>&1", 1), ("> {} 2>&1", 4),
    ])],
)  # fmt: skip
def test_nothing_is_overwritten_when_output_goes_to_a_file(
    lab: Lab, tmp_path: Path, how: str, num_processes: int
) -> None:
    """Over a restart: a writer with a position of its own would overwrite what the other one wrote meanwhile."""
    log, once = tmp_path / "run.log", tmp_path / "once"
    log.write_text("of another run\n")
    fault = [{"kind": "kill", "rank": num_processes - 1, "step": 12, "once": str(once)}]
    strategy = "ddp" if num_processes > 1 else "single"
    more = (f"launch.num_processes={num_processes}", f"output_dir={tmp_path / 'run'}", "checkpoint.save_steps=4")
    command = [sys.executable, "-m", "launcher.cli", "train", *lab.overrides(tmp_path / "run", strategy, *more)]
    line = f"{{ echo before; {shlex.join(command)}; }} {how.format(log)}"
    env = {**environment(), "FAULTS": json.dumps(fault)}
    subprocess.run(["bash", "-c", line], env=env, cwd=tmp_path, timeout=240, check=False, stdin=subprocess.DEVNULL)
    text = log.read_text()
    assert "\0" not in text
    assert text.startswith("of another run\nbefore\n" if ">>" in how else "before\n"), text
    first, again, second = text.partition(" (1 of 3)\n")
    assert again and f"rank {num_processes - 1} on" in first, text
    line_of_step = re.compile(r"^step (\d+)/20  epoch .* tokens/s.*$", re.MULTILINE)
    steps = [[int(number) for number in line_of_step.findall(part)] for part in (first, second)]
    assert steps[0] == list(range(1, 12)), text
    assert steps[1] == list(range(steps[1][0], 21)) and steps[1][0] in (1, 5, 9), text
    assert "finished 20 steps" in second, text
