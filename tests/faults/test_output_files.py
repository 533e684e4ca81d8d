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
    more = (
        f"launch.num_processes={num_processes}", f"output_dir={tmp_path / 'run'}", "checkpoint.save_steps=4",
        "train.per_device_train_batch_size=auto",
    )  # fmt: skip
    command = [sys.executable, "-m", "launcher.cli", "train", *lab.overrides(tmp_path / "run", strategy, *more)]
    line = f"{{ echo before; {shlex.join(command)}; }} {how.format(log)}"
    env = {**environment(), "FAULTS": json.dumps(fault)}
    subprocess.run(["bash", "-c", line], env=env, cwd=tmp_path, timeout=240, check=False, stdin=subprocess.DEVNULL)
    text = log.read_text()
    assert "\0" not in text
    assert text.startswith("of another run\nbefore\n" if ">>" in how else "before\n"), text
    first, again, second = text.partition(" (1 of 3)\n")
    assert again and f"rank {num_processes - 1} on" in first, text
    decision = f"launcher: strategy={strategy}, {8 // num_processes} samples per forward and backward: needs"
    assert first.count(decision) == second.count(decision) == 1, f"what was decided is told once in a start\n{text}"
    line_of_step = re.compile(r"^step (\d+)/20  epoch .* tokens/s.*$", re.MULTILINE)
    steps = [[int(number) for number in line_of_step.findall(part)] for part in (first, second)]
    assert steps[0] in (list(range(1, 12)), list(range(1, 13))), (
        f"rank 0 may end the step that the other died in\n{text}"
    )
    assert steps[1] == list(range(steps[1][0], 21)) and steps[1][0] in (1, 5, 9), text
    assert "finished 20 steps" in second, text


def test_no_file_becomes_the_output_when_the_outputs_are_closed(tmp_path: Path) -> None:
    """`launcher train … >&- 2>&-`: the next file to be opened would have got the number of the output."""
    code = (
        "import os; from launcher.base.output import open_standard_files\n"
        "open_standard_files(); open_standard_files()\n"
        f"with open({str(tmp_path / 'file')!r}, 'w') as file:\n"
        "    print('lost'); os.write(1, b'lost'); os.write(2, b'lost')\n"
        "    file.write(str(file.fileno()))\n"
    )
    for closed in ("<&- >&- 2>&-", ">&-", "2>&-", "<&-"):
        line = f"exec {shlex.join([sys.executable, '-c', code])} {closed}"
        done = subprocess.run(["bash", "-c", line], env=environment(), timeout=60, check=False)
        assert done.returncode == 0
        assert int((tmp_path / "file").read_text()) > 2


@_SLOW
def test_a_run_ends_well_when_the_outputs_are_closed(lab: Lab, tmp_path: Path) -> None:
    overrides = lab.overrides(tmp_path / "run", "ddp", "launch.num_processes=2", "train.max_steps=4")
    command = shlex.join([sys.executable, "-m", "launcher.cli", "train", *overrides])
    line = f"exec {command} <&- >&- 2>&-"
    done = subprocess.run(["bash", "-c", line], env=environment(), cwd=tmp_path, timeout=240, check=False)
    assert done.returncode == 0
    assert json.loads((tmp_path / "run/run.json").read_text())["state"] == "finished"


@pytest.mark.parametrize("is_buffered", [True, False])
@pytest.mark.parametrize(
    "arguments", [["--help"], ["train", "--help"], ["status", "."], ["checkpoints", ".", "--json"]]
)
def test_output_that_cannot_be_written_is_told_when_its_disk_is_full(
    tmp_path: Path, arguments: list[str], is_buffered: bool
) -> None:
    """Also where the interpreter would write it at its very end only, and argparse drops the error."""
    env = {**environment(), "PYTHONUNBUFFERED": "" if is_buffered else "1"}
    command = [sys.executable, "-m", "launcher.cli", *arguments]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, env=env, cwd=tmp_path, check=False
        )
    assert done.returncode == 1
    assert done.stderr == (
        "launcher: the output cannot be written: No space left on device. Make room there, or send it elsewhere\n"
    )


@pytest.mark.parametrize("unbuffered", [{}, {"PYTHONUNBUFFERED": "1"}])
def test_exit_code_is_the_same_when_an_error_cannot_be_shown(tmp_path: Path, unbuffered: dict[str, str]) -> None:
    env = {key: value for key, value in environment().items() if key != "PYTHONUNBUFFERED"} | unbuffered
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "launcher.cli", "checkpoints", str(tmp_path / "none")]
        assert subprocess.run(command, stderr=full, env=env, check=False).returncode == 2
