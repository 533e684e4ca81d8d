"""A project made by `launcher init` runs as its README says."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.cli import init

_SHORT = " train.max_steps=4 eval.eval_steps=2 checkpoint.save_steps=2"


def command(line: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        shlex.split(line), cwd=cwd, env={**os.environ, "PATH": path, **env}, capture_output=True, text=True, timeout=300
    )


def test_make_train_runs_the_project(tmp_path: Path) -> None:
    init.create(tmp_path / "my")
    done = command(f"make train 'ARGS={_SHORT}'", tmp_path / "my")
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "my" / "outputs" / "mine"
    assert json.loads((run / "run.json").read_text())["state"] == "finished"
    evaluations = [
        line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "eval_loss" in line
    ]
    assert [line["step"] for line in evaluations] == [2, 4] and all("eval_contains" in line for line in evaluations)


@pytest.mark.slow
def test_every_command_of_the_readme_runs(tmp_path: Path) -> None:
    init.create(tmp_path / "my")
    text = (tmp_path / "my" / "README.md").read_text()
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.S) for line in block.splitlines()]
    assert len(lines) == 6
    for line in lines:
        written = line.partition("#")[0].strip()
        is_training = "train" in written
        short = f"{written} 'ARGS={_SHORT}'" if written.startswith("make") else written + _SHORT
        done = command(short if is_training else written, tmp_path / "my")
        assert done.returncode == 0, (line, done.stdout, done.stderr)
    assert {p.name for p in (tmp_path / "my" / "outputs").iterdir()} == {"mine", "sign", "squares", "sweep"}


@pytest.mark.slow
def test_wheel_trains_when_installed_in_an_empty_environment(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    command(f"{sys.executable} -m hatchling build -t wheel -d {tmp_path}", root).check_returncode()
    (wheel,) = tmp_path.glob("*.whl")
    command(f"{sys.executable} -m venv {tmp_path}/venv", tmp_path).check_returncode()
    pip = f"{tmp_path}/venv/bin/pip install -q --disable-pip-version-check -c {root}/constraints.txt {wheel}"
    subprocess.run(shlex.split(pip), check=True, timeout=550, cwd=tmp_path)
    path = {"PATH": f"{tmp_path}/venv/bin:/usr/bin:/bin", "PYTHONPATH": ""}
    command("launcher init my", tmp_path, **path).check_returncode()
    done = command(f"make train 'ARGS={_SHORT}'", tmp_path / "my", **path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert command("launcher verify outputs/mine", tmp_path / "my", **path).returncode == 0
