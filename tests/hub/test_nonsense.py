"""Promises 3 and 5: whatever stands in a run's spool, config or metrics, pushing ends well or with an error by name.

Seeded: a case is named by its number. Nothing outside of the run is read, written or deleted.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import yaml

from launcher.base import files
from launcher.base.errors import LauncherError
from launcher.base.paths import RunPaths
from launcher.config.settings import RunConfig
from launcher.hub import card, pending_uploads, pushed_checkpoints
from launcher.hub.client import SpoolHub, UploaderProcess
from launcher.hub.items import model_item
from launcher.hub.layout import wanted_files
from launcher.hub.push import describe, plan_push
from launcher.hub.spool import Spool
from tests.decoy import Decoy
from tests.faults.mutations import Mutator
from tests.hub.helpers import REPO, make_checkpoint, make_config, prepare_spool, write_model

_SHARE_OF_PLANTED = 0.1


def make_run(run: Path) -> RunConfig:
    """Something of everything that an uploader and a trainer leave."""
    config = make_config(run, hub_strategy="all_checkpoints", tags=["a"], license="mit", language=["en"])
    spool = prepare_spool(run, config)
    for step in (10, 20):
        spool.add(plan_push(make_checkpoint(run, step, num_bytes=100, best=10), {}).items[0])
    write_model(run, 1, num_bytes=100)
    spool.add(model_item(run, None))
    pushed = {"checkpoint-5": {"step": 5, "commit": "a" * 40, "bytes": 7, "time": 1.0, "url": None}}
    entry = {"target": REPO, "repo_id": REPO, "pushed": pushed, "commit_times": [1.0], "passed_over": ["checkpoint-1"]}
    made = {"metadata": {"tags": ["a"]}, "text": "x", "notices": ["y"]}
    spool.write_journal({**spool.read_journal(), **entry, "card": made, "tags_due": {"move": ["10"], "delete": []}})
    spool.write_status({"state": "waiting", "pid": 7, "item": "checkpoint-10", "tried_at": 1.0, "last_error": "x"})
    spool.record(passed_over=["checkpoint-1"], dropped=["checkpoint-2"])
    spool.tell("news")
    (run / "README.md").write_text("---\nlicense: mit\ntags: [x]\n---\n# Mine\n")
    return config


def mutate(run: Path, mutator: Mutator) -> str:
    name = mutator.random.choice([n for n in files.list_files(run) if not n.endswith((".safetensors", ".lock"))])
    path = run / name
    if mutator.random.random() < _SHARE_OF_PLANTED:
        return f"{name} {mutator.plant(path)}"
    data = path.read_bytes()
    path.unlink()  # it may have other names
    if name.endswith(".json"):
        path.write_bytes(mutator.json(data))
    elif name.endswith(".jsonl"):
        path.write_bytes(mutator.json_lines(data))
    elif name.endswith(".yaml") and mutator.random.random() < 0.7:
        path.write_text(yaml.dump(mutator.tree(yaml.safe_load(data))))
    else:
        path.write_bytes(mutator.bytes(data))
    return name


def use(run: Path, config: RunConfig) -> None:
    """Everything that reads a spool, without a network."""
    for overrides in ({}, {"repo_id": "me/mine"}):
        with contextlib.suppress(LauncherError):
            plan = plan_push(run, overrides)
            describe(plan)
            wanted_files(plan.items, plan.settings.strategy)
            if overrides:
                continue
            journal = Spool(run / ".hub").read_journal()
            card.build_card(plan.settings, REPO, plan.items, [10, 20], None, journal["card"])
    with contextlib.suppress(LauncherError):
        plan_push(run / "checkpoint-10", {})
    pending_uploads(RunPaths(run))
    pushed_checkpoints(RunPaths(run))
    hub = SpoolHub(config, RunPaths(run))
    hub.start()
    hub.poll()
    hub.status()
    hub.finish(run, max_wait_s=0.0)
    spool = Spool(run / ".hub")
    with contextlib.suppress(LauncherError):
        spool.refuse_links()
        for item in spool.claim(limit=9):
            if not any(item.problems()):
                wanted_files([item], "all_checkpoints")
        spool.empty_trash()


def run_cases(tmp_path: Path, seed: str, count: int) -> None:
    template, decoy = tmp_path / "template", Decoy(tmp_path / "decoy")
    make_run(template)
    for number in range(count):
        run = tmp_path / "run"
        shutil.copytree(template, run)
        config = make_config(run, hub_strategy="all_checkpoints")
        what = mutate(run, Mutator(f"{seed}-{number}", decoy.root / "a"))
        try:
            use(run, config)
        except Exception:
            pytest.fail(f"case {seed}-{number}, {what}:\n{traceback.format_exc()}")
        assert not decoy.disturbed(), f"case {seed}-{number}, {what}"
        files.remove_tree(run)


@pytest.fixture(autouse=True)
def _no_uploader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(UploaderProcess, "ensure_running", lambda self: None)


def test_pushing_ends_well_or_by_name_when_a_file_is_nonsense(tmp_path: Path) -> None:
    run_cases(tmp_path, "short", 60)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(5))
def test_pushing_ends_well_or_by_name_when_a_file_is_nonsense_many_times(tmp_path: Path, part: int) -> None:
    run_cases(tmp_path, f"long {part}", 300)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(2))
def test_the_hub_may_answer_nonsense(tmp_path: Path, part: int) -> None:
    """One odd answer among those of a download or of an upload: both end well or by name, and touch nothing else."""
    command = [sys.executable, "-m", "tests.hub.nonsense_answers", f"long {part}", "0", "50", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout) == []
