"""Nothing outside of output_dir is read, written or deleted by a run, whatever lies in its folder when it starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.base import manifest
from launcher.base.paths import RunPaths
from launcher.checkpoint.retention import sweep_leftovers
from tests.decoy import Decoy
from tests.distributed.runs import Lab, log_text


def test_a_run_leaves_everything_outside_alone_when_links_lie_in_its_folder(lab: Lab, tmp_path: Path) -> None:
    run, outside = tmp_path / "run", Decoy(tmp_path / "outside")
    run.mkdir()
    for name, target in {
        ".tmp-checkpoint-7": "", ".tmp-checkpoint-10": "", ".tmp-checkpoint-20": "deep",
        ".tmp-deleted-checkpoint-1": "",
        ".config.json.tmp": "a", ".model.safetensors.tmp": "a", ".config.yaml.tmp": "a", ".run.json.tmp-1": "a",
        "config.yaml": "a", "run.json": "a", "config.json": "config.json", "model.safetensors": "model.safetensors",
        "trainer_state.json": "a",
    }.items():  # fmt: skip
        (run / name).symlink_to(outside.root / target)
    codes = lab.run_codes(run, "single", 1)
    assert codes == [0], log_text(run)
    assert json.loads((run / "run.json").read_text())["state"] == "finished"
    assert outside.disturbed() == []
    assert not any(
        (run / name).is_symlink() for name in ("run.json", "config.yaml", "config.json", "model.safetensors")
    )
    assert [manifest.verify(run / f"checkpoint-{step}") for step in (10, 20)] == [[], []]
    assert not list(run.glob(".tmp-*"))


def test_a_checkpoint_that_was_moved_and_linked_is_read_and_never_deleted(lab: Lab, tmp_path: Path) -> None:
    run, disk = tmp_path / "run", tmp_path / "other disk"
    disk.mkdir()
    lab.run(run, "single", 1, "train.max_steps=10")
    (run / "checkpoint-10").rename(disk / "checkpoint-10")
    (disk / "checkpoint-10/foreign.txt").write_text("mine")
    (run / "checkpoint-10").symlink_to(disk / "checkpoint-10")

    lab.run(run, "single", 1, "train.max_steps=40", "checkpoint.save_total_limit=1", "checkpoint.accept_changes=true")

    assert "checkpoint-10 is a link to" in log_text(run) and "continuing from" in log_text(run)
    assert (run / "checkpoint-10").is_symlink() and manifest.verify(disk / "checkpoint-10") == []
    assert (disk / "checkpoint-10/foreign.txt").read_text() == "mine"
    assert sorted(p.name for p in run.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-40"]


@pytest.mark.parametrize(("name", "target", "code"), [(".hub", "", 2), ("metrics.jsonl", "a", None)])
def test_a_start_is_refused_when_what_it_adds_to_is_a_link(
    lab: Lab, tmp_path: Path, name: str, target: str, code: int | None
) -> None:
    run, outside = tmp_path / "run", Decoy(tmp_path / "outside")
    run.mkdir()
    (run / name).symlink_to(outside.root / target)
    (found,) = lab.run_codes(run, "single", 1)
    assert found == code if code else found in (1, 2)
    assert name in log_text(run) and "is a link" in log_text(run)
    assert outside.disturbed() == []


@pytest.mark.parametrize(
    "name", [".tmp-checkpoint-7", ".tmp-deleted-checkpoint-7", ".config.json.tmp-ab12", ".lock-x-1"]
)
def test_only_the_link_goes_at_the_next_start(tmp_path: Path, name: str) -> None:
    run, outside = tmp_path / "run", Decoy(tmp_path / "outside")
    run.mkdir()
    (run / name).symlink_to(outside.root)
    sweep_leftovers(RunPaths(run))
    assert list(run.iterdir()) == []
    assert outside.disturbed() == []


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("state/state.json", "progress", {"step": "ten"}),
        ("state/state.json", "scheduler", {}),
        ("state/state.json", "optimizer", {"groups": [7]}),
        ("state/rng-00000.json", "torch", "###"),
        ("trainer_state.json", "log_history", 7),
    ],
)
def test_a_state_whose_hashes_fit_but_whose_values_do_not_is_an_error_by_name(
    lab: Lab, tmp_path: Path, name: str, key: str, value: object
) -> None:
    run = tmp_path / "run"
    lab.run(run, "single", 1, "train.max_steps=2", "checkpoint.save_steps=2")
    folder = run / "checkpoint-2"
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**content, key: value}))
    (folder / manifest.NAME).write_bytes(manifest.build(folder, step=2, world_size=1, zero_stage=0).to_json())
    codes = lab.run_codes(run, "single", 1, "train.max_steps=4", "checkpoint.accept_changes=true")
    assert codes == [1]
    reason = json.loads((run / "logs/error-rank-0.json").read_text())
    assert reason["kind"] == "DamagedCheckpointError" and "checkpoint-2 holds no state" in reason["message"], reason
