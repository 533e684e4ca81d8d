"""The commands of README and docs that read a run, on a real one; and the pages that train, as they are typed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launcher import cli
from tests.distributed.runs import Lab
from tests.documents import READING_VERBS, ROOT, Command, blocks, commands, write_files
from tests.unit.report.folders import make_sweep

_READING = [c for c in commands() if c.words[0] == "launcher" and c.verb in READING_VERBS]
_SENDS = [c for c in _READING if c.verb == "push" and "--dry-run" not in c.words]


@pytest.fixture(scope="module")
def folder(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run in outputs/run, the same under other names, and a sweep."""
    root = tmp_path_factory.mktemp("docs")
    run = root / "outputs/run"
    lab.run(run, "single", 1, "optim.name=torch.optim.AdamW", "hub.hub_model_id=ORG/NAME")
    for name in ("arithmetic", "other"):
        shutil.copytree(run, root / "outputs" / name)
    make_sweep(root / "outputs/sweep")
    return root


@pytest.mark.parametrize("command", [c for c in _READING if c not in _SENDS and "--merge" not in c.words], ids=str)
def test_command_runs_when_there_is_a_run(
    command: Command, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    words = [word.replace("checkpoint-500", "checkpoint-20") for word in command.words[1:]]
    if command.verb == "export":
        words[2] = str(tmp_path / words[2])
    assert cli.main(words) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert out and ("--json" not in words or json.loads(out))


@pytest.mark.slow
@pytest.mark.parametrize("page", ["first-run.md", "own.md"])
def test_page_runs_when_it_is_typed(page: str, tmp_path: Path) -> None:
    """Every line of it in bash; only the runs are shorter."""
    write_files(tmp_path, page)
    launcher = tmp_path / "bin/launcher"
    launcher.parent.mkdir()
    launcher.write_text(f"#!{sys.executable}\nimport sys\nfrom launcher.cli import main\nsys.exit(main())\n")
    launcher.chmod(0o755)
    env = {**os.environ, "PATH": f"{launcher.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}",
           "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}  # fmt: skip
    for block in blocks(ROOT / "docs" / page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            is_demo = line.strip() == "launcher train"
            short = " train.max_steps=4 eval.eval_steps=2 checkpoint.save_steps=2" if is_demo else ""
            done = subprocess.run(
                ["bash", "-c", line + short], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
            )
            assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
