"""`hf://…` beside what is in output_dir already. The download itself: tests/hub/test_fetch.py."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from launcher.base.errors import NoWholeCheckpointError, ResumeError
from launcher.base.paths import RunPaths
from launcher.checkpoint.resume import ResumePoint
from launcher.config.settings import RunConfig
from launcher.hub import fetch
from launcher.train import resume_point
from tests.faults.file_layer import OneProcess
from tests.unit.checkpoint.test_resume_rules import make


@pytest.fixture
def fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was asked for; the Hub holds a checkpoint of step 30."""
    asked: list[str] = []
    there = make(tmp_path / "hub", 30)

    def fake(uri: str, paths: RunPaths) -> Path:
        asked.append(uri)
        return Path(shutil.copytree(there, paths.checkpoint_dir(30)))

    monkeypatch.setattr(resume_point, "fetch_checkpoint", fake)
    monkeypatch.setattr(resume_point, "maybe_fetch_checkpoint", fake)
    return asked


def go(root: Path, choice: str = "hf://org/model", **hub: Any) -> tuple[ResumePoint | None, list[str]]:
    config = RunConfig(output_dir=str(root))
    config.checkpoint.resume_from_checkpoint = choice
    for key, value in hub.items():
        setattr(config.hub, key, value)
    return resume_point.find_resume_point(config, RunPaths(root), OneProcess())  # type: ignore[arg-type]


def test_the_hub_is_asked_when_only_a_folder_of_others_is_here(tmp_path: Path, fetched: list[str]) -> None:
    """Promise 3: it is ignored. The run began at step 0, although its checkpoint was named."""
    root = tmp_path / "run"
    (root / "checkpoint-5").mkdir(parents=True)
    point, notices = go(root)
    assert point is not None and point.step == 30 and fetched == ["hf://org/model"]
    assert "checkpoint-5 has no manifest.json of ours and is ignored" in notices[0]


def test_the_hub_is_asked_once_when_the_run_has_its_own(tmp_path: Path, fetched: list[str]) -> None:
    root = tmp_path / "run"
    assert go(root)[0] is not None
    make(root, 40)
    point, notices = go(root)
    assert point is not None and (point.step, notices) == (40, []) and len(fetched) == 1
    point, notices = go(root, "hf://org/model@step-10")  # which was taken for 40 without a word
    assert point is not None and point.step == 40 and len(fetched) == 1
    assert notices[0].startswith("hf://org/model@step-10 is not asked") and "output_dir=" in notices[0]


@pytest.mark.parametrize("hub", [{}, {"resume": True, "hub_model_id": "org/model"}])
def test_the_hub_is_asked_when_all_own_ones_turn_out_to_be_damaged(
    tmp_path: Path, fetched: list[str], hub: dict[str, Any]
) -> None:
    """It ended with an error that named a start at 0; the same command again fetched it."""
    root = tmp_path / "run"
    (make(root, 40) / "state/state.json").write_text("{}")
    point, notices = go(root, "auto" if hub else "hf://org/model", **hub)
    assert point is not None and point.step == 30 and fetched == ["hf://org/model"]
    assert "checkpoint-40 is damaged" in notices[0]


def test_nothing_is_begun_at_0_when_the_hub_has_none_either(
    tmp_path: Path, fetched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "run"
    (make(root, 40) / "state/state.json").write_text("{}")
    monkeypatch.setattr(resume_point, "maybe_fetch_checkpoint", lambda *_: None)
    with pytest.raises(NoWholeCheckpointError, match="resume_from_checkpoint=never"):
        go(root, "auto", resume=True, hub_model_id="org/model")


def test_a_folder_of_others_is_not_moved_when_it_has_the_name(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-30").mkdir()
    with pytest.raises(ResumeError, match="checkpoint-30 is there already and is not of this run: move it away"):
        fetch._refuse_taken(tmp_path / "checkpoint-30", "hf://org/model")
    fetch._refuse_taken(tmp_path / "checkpoint-40", "hf://org/model")
    fetch._refuse_taken(make(tmp_path, 50), "hf://org/model")
