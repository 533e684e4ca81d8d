"""Where to go on, and which changed settings are accepted. Damage is in tests/faults/test_damage.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.base import manifest
from launcher.base.errors import DamagedCheckpointError, ResumeError, ResumeMismatchError
from launcher.base.paths import RunPaths
from launcher.base.process import RESTARTED
from launcher.checkpoint.resume import ResumePoint, compare_settings, find, from_weights, origin_id
from launcher.config.compose import compose
from tests.faults.file_layer import OneProcess
from tests.unprivileged import without_privileges


def make(root: Path, step: int, /, **state: Any) -> Path:
    folder = root / f"checkpoint-{step}"
    (folder / "state").mkdir(parents=True)
    (folder / "state/state.json").write_text(json.dumps({"step": step} | state))
    (folder / "manifest.json").write_bytes(manifest.build(folder, step=step, world_size=1, zero_stage=0).to_json())
    return folder


def go(root: Path, choice: str = "auto") -> tuple[ResumePoint | None, list[str]]:
    return find(choice, RunPaths(root), OneProcess(), lambda folder: folder)  # type: ignore[arg-type]


def test_the_highest_number_is_taken_and_not_the_last_name(tmp_path: Path) -> None:
    for step in (9, 100, 20):
        make(tmp_path, step)
    point, notices = go(tmp_path)
    assert point is not None and (point.step, notices) == (100, [])


def test_an_empty_or_missing_folder_starts_at_0(tmp_path: Path) -> None:
    assert go(tmp_path) == (None, [])
    assert go(tmp_path / "missing") == (None, [])


def test_never_keeps_the_old_ones_under_another_name(tmp_path: Path) -> None:
    make(tmp_path, 10)
    make(tmp_path, 20)
    point, notices = go(tmp_path, "never")
    assert point is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-10.superseded", "checkpoint-20.superseded"]
    assert "checkpoint-10.superseded, checkpoint-20.superseded" in notices[0]


def test_never_is_obeyed_once_when_the_agent_restarts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "checkpoint-5.damaged").mkdir()  # the reason for `never`
    monkeypatch.setenv(RESTARTED, "1")
    assert go(tmp_path, "never")[0] is None  # it crashed before its first save
    make(tmp_path, 10)
    point, _ = go(tmp_path, "never")
    assert point is not None and point.step == 10


def test_a_path_supersedes_what_comes_after_it_and_is_obeyed_once(tmp_path: Path) -> None:
    root = tmp_path / "run"
    base = make(root, 10)
    make(root, 20)
    point, notices = go(root, str(base))
    assert point is not None and point.step == 10 and point.state["origin"] == origin_id(base)
    assert "checkpoint-20.superseded" in notices[0] and (root / "checkpoint-10").exists()
    make(root, 30, origin=str(base))
    point, _ = go(root, str(base))
    assert point is not None and point.step == 30


def test_a_newer_format_is_refused_and_nothing_is_moved(tmp_path: Path) -> None:
    make(tmp_path, 10)
    folder = make(tmp_path, 20)
    raw = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**raw, "format_version": 99}))
    with pytest.raises(DamagedCheckpointError, match="pip install --upgrade"):
        go(tmp_path)
    assert folder.exists()


@pytest.mark.parametrize("text", ["[" * 100_000, '{"step": Infinity}', "null", "{}", "7"])
def test_a_manifest_of_nonsense_is_moved_aside_and_the_next_one_is_used(tmp_path: Path, text: str) -> None:
    make(tmp_path, 10)
    (make(tmp_path, 20) / "manifest.json").write_text(text)
    point, notices = go(tmp_path)
    assert point is not None and point.step == 10
    assert "checkpoint-20 is damaged" in notices[0] and (tmp_path / "checkpoint-20.damaged").is_dir()


@pytest.mark.parametrize(
    "state", [{"step": "20"}, {"step": 19}, {"step": 20.0}, {"settings": []}, {"optimizer": None}, {"total_steps": {}}]
)
def test_a_state_of_nonsense_is_moved_aside_and_the_next_one_is_used(tmp_path: Path, state: dict[str, Any]) -> None:
    make(tmp_path, 10)
    make(tmp_path, 20, **state)
    point, notices = go(tmp_path)
    assert point is not None and point.step == 10
    assert "is not the state of this checkpoint" in notices[0]


@pytest.mark.parametrize("closed", [".", "manifest.json", "state/state.json"])
@pytest.mark.parametrize("choice", ["auto", "checkpoint-20"])
def test_one_that_may_not_be_read_is_not_called_damaged(tmp_path: Path, closed: str, choice: str) -> None:
    for step in (10, 20):
        make(tmp_path, step)
    path = tmp_path / "checkpoint-20" / closed
    path.chmod(0)
    choice = choice if choice == "auto" else str(tmp_path / choice)
    with without_privileges(), pytest.raises(ResumeError, match="checkpoint-20 cannot be read now: Permission denied"):
        go(tmp_path, choice)
    path.chmod(0o755)
    point, notices = go(tmp_path, choice)
    assert point is not None and (point.step, notices) == (20, [])


def test_a_state_that_the_manifest_does_not_name_is_not_used(tmp_path: Path) -> None:
    folder = make(tmp_path, 10)
    (folder / "state/state.json").unlink()
    (folder / "manifest.json").write_bytes(manifest.build(folder, step=10, world_size=1, zero_stage=0).to_json())
    (folder / "state/state.json").write_text(json.dumps({"step": 10}))
    with pytest.raises(ResumeError, match="holds only the model") as caught:
        go(tmp_path)
    assert f"model.model_name_or_path={folder} model.config=null in another output_dir" in str(caught.value)


def test_weights_are_trained_on_whatever_the_old_run_started_from(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    scratch = ["data=arithmetic", "model=scratch", "model.config={model_type: gpt2, n_embd: 32}"]
    for before in (scratch, ["data=arithmetic", "model.config.hidden_size=64"], ["model.model_name_or_path=org/other"]):
        model = compose([*before, *from_weights(tmp_path).split()]).model
        assert (model.model_name_or_path, model.config) == (str(tmp_path), {})
    (tmp_path / "adapter_config.json").write_text('{"r": 8}')
    before = ["model.model_name_or_path=org/base", "model/peft=lora", "model.peft.r=8"]
    assert compose([*before, *from_weights(tmp_path).split()]).model.adapter_name_or_path == str(tmp_path)


@pytest.mark.parametrize(("left", "is_offered"), [("optimizer.pt", True), ("global_step10/x", True), ("x.json", False)])
def test_a_folder_of_others_is_offered_where_it_can_be_imported(tmp_path: Path, left: str, is_offered: bool) -> None:
    (tmp_path / "checkpoint-10" / left).parent.mkdir(parents=True)
    (tmp_path / "checkpoint-10" / left).touch()
    point, (notice,) = go(tmp_path)
    assert point is None and "is ignored" in notice
    assert notice.endswith(f"checkpoint.resume_from_checkpoint={tmp_path / 'checkpoint-10'}") is is_offered


def test_a_link_to_a_checkpoint_is_read_and_said(tmp_path: Path) -> None:
    root = tmp_path / "run"
    make(root, 10)
    (root / "checkpoint-10").rename(tmp_path / "moved")
    (root / "checkpoint-10").symlink_to(tmp_path / "moved")
    point, notices = go(root)
    assert point is not None and point.step == 10 and "never deleted" in notices[0]


def test_only_the_link_is_renamed_when_what_it_leads_to_is_damaged(tmp_path: Path) -> None:
    root = tmp_path / "run"
    make(root, 5)
    (make(root, 10) / "state/state.json").write_text("x")
    (root / "checkpoint-10").rename(tmp_path / "moved")
    (root / "checkpoint-10").symlink_to(tmp_path / "moved")
    point, _ = go(root)
    assert point is not None and point.step == 5
    assert (root / "checkpoint-10.damaged").is_symlink() and (tmp_path / "moved/state").is_dir()


_SAVED = {"seed": 1, "strategy": "zero2", "num_processes": 2, "optim.learning_rate": 1e-3}


def test_equal_settings_are_silent() -> None:
    assert compare_settings(_SAVED, dict(_SAVED), accept=False) == []


def test_another_size_is_accepted_with_a_line() -> None:
    notices = compare_settings(_SAVED, {**_SAVED, "strategy": "zero3", "num_processes": 4}, accept=False)
    assert len(notices) == 1
    assert notices[0].startswith("equal up to rounding from here (num_processes: 2 in the checkpoint, 4 now")


def test_another_number_of_threads_is_said_and_unknown_on_a_gpu() -> None:
    saved = {**_SAVED, "num_threads": 8}
    for now, shown in (({"num_threads": 4}, "4"), ({}, "None")):
        (notice,) = compare_settings(saved, {**_SAVED, **now}, accept=False)
        assert notice == f"equal up to rounding from here (num_threads: 8 in the checkpoint, {shown} now)"


def test_all_differences_that_change_the_result_are_listed_with_the_cure() -> None:
    now = {**_SAVED, "seed": 2, "optim.learning_rate": 1e-4, "num_processes": 3}
    with pytest.raises(ResumeMismatchError) as caught:
        compare_settings(_SAVED, now, accept=False)
    text = str(caught.value)
    assert "seed: 1 in the checkpoint, 2 now" in text and "optim.learning_rate: 0.001 in the checkpoint, 0.0001" in text
    assert "num_processes" not in text and "checkpoint.accept_changes=true" in text
    assert caught.value.exit_code == 2
    notices = compare_settings(_SAVED, now, accept=True)
    assert len(notices) == 3 and sum(n.startswith("accepted: ") for n in notices) == 2


@pytest.mark.parametrize("harm", ["empty", "bytes", "origin", "missing", "manifest"])
def test_a_path_is_not_obeyed_again_when_the_newest_state_is_damaged(tmp_path: Path, harm: str) -> None:
    """Promises 1 and 3: all whole checkpoints of the run were put aside, and it began at that path again."""
    base, root = make(tmp_path / "other", 10), tmp_path / "run"
    make(root, 20, origin=origin_id(base))
    state = make(root, 30, origin=origin_id(base)) / "state/state.json"
    if harm == "missing":
        state.unlink()
    elif harm == "manifest":
        (root / "checkpoint-30/manifest.json").write_text("{}")
    else:
        text = {"empty": "", "bytes": "\0" * 50, "origin": state.read_text().replace(origin_id(base), "0" * 64)}
        state.write_text(text[harm])
    point, notices = go(root, str(base))
    assert point is not None and point.folder == root / "checkpoint-20"
    assert "checkpoint-30 is damaged" in notices[0]
    assert sorted(p.name for p in root.iterdir()) == ["checkpoint-20", "checkpoint-30.damaged"]
