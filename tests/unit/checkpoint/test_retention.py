"""Promise 4, for any history of saves: the best and the newest stay, and a limit is a limit."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launcher.base.paths import RunPaths
from launcher.checkpoint.retention import expired_steps, our_steps, sweep_leftovers
from launcher.config.settings import RunConfig
from launcher.hub import NoHub
from launcher.saving.save_schedule import SaveSchedule
from launcher.saving.saver import Saver
from launcher.saving.training_state import ProgressState


@pytest.mark.parametrize("limit", [1, 2, 3, 5, None])
def test_best_and_newest_are_never_deleted(limit: int | None) -> None:
    """Every set of at most five of seven steps, in any order, with any best step or none."""
    pool = (5, 9, 10, 100, 101, 1000, 20000)  # as texts they sort otherwise
    for count in range(6):
        for steps in itertools.combinations(pool, count):
            for best in (None, *pool):
                expired = expired_steps(reversed(steps), limit, best)
                kept = sorted({*steps} - {*expired})
                assert expired == sorted(expired) and {*expired} <= {*steps}
                if steps:
                    assert max(steps) in kept
                if best in steps:
                    assert best in kept
                if limit is None:
                    assert kept == list(steps)
                    continue
                needed = len({max(steps), best} & {*steps}) if steps else 0
                assert len(kept) == min(len(steps), max(limit, needed))
                others = [s for s in kept if s != best]
                assert others == sorted(s for s in steps if s != best)[len(steps) - (best in steps) - len(others) :]


def test_a_limit_of_one_keeps_two_when_best_and_newest_differ() -> None:
    assert expired_steps([10, 20, 30], 1, 10) == [20]
    assert expired_steps([10, 20, 30], 1, 30) == [10, 20]
    assert expired_steps([10, 20, 30], 1, None) == [10, 20]
    assert expired_steps([10, 20, 30], 1, 5) == [10, 20]  # a best one that is not there


def test_only_our_checkpoints_count(tmp_path: Path) -> None:
    for name in (
        "checkpoint-10",
        "checkpoint-9",
        "checkpoint-20.damaged",
        "checkpoint-x",
        "checkpoint-30",
        "checkpoint-8.superseded",
    ):
        (tmp_path / name).mkdir()
        if name != "checkpoint-30":
            (tmp_path / name / "manifest.json").write_text("{}")
    (tmp_path / "checkpoint-40").write_text("a file")
    assert our_steps(RunPaths(tmp_path)) == [9, 10]


def test_leftovers_are_swept_and_nothing_else(tmp_path: Path) -> None:
    kept = ["checkpoint-10", ".hub", "logs", ".gitignore", "run.json", "checkpoint-10.damaged", ".lock"]
    for name in (
        "checkpoint-10",
        ".hub",
        "logs",
        "checkpoint-10.damaged",
        ".tmp-checkpoint-20",
        ".tmp-deleted-checkpoint-5",
    ):
        (tmp_path / name / "state").mkdir(parents=True)
        (tmp_path / name / "state/file").write_text("x")
    for name in (".gitignore", "run.json", ".lock", ".run.json.tmp-123", ".model.safetensors.tmp", ".lock-host-7"):
        (tmp_path / name).write_text("x")
    sweep_leftovers(RunPaths(tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(kept)


def test_linked_checkpoints_are_not_counted(tmp_path: Path) -> None:
    for step in (1, 2):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "manifest.json").write_text("{}")
    (tmp_path / "checkpoint-1").rename(tmp_path / "moved")
    (tmp_path / "checkpoint-1").symlink_to("moved")
    assert our_steps(RunPaths(tmp_path)) == [2]
    assert [step for step, _ in RunPaths(tmp_path).checkpoint_dirs()] == [1, 2]


@pytest.mark.parametrize("name", ["checkpoint-07", "checkpoint-٣", "checkpoint-7\n", "checkpoint-+7", "checkpoint-7.0"])
def test_only_the_plain_name_is_a_checkpoint(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    assert list(RunPaths(tmp_path).checkpoint_dirs()) == []


def test_what_cannot_be_deleted_is_told_once(tmp_path: Path) -> None:
    told: list[str] = []
    config = RunConfig()
    state: Any = SimpleNamespace(progress=ProgressState(), step=40)
    checkpointer: Any = SimpleNamespace(undeleted=None, expire=lambda *_: None)
    main: Any = SimpleNamespace(is_main=True)
    outlet: Any = SimpleNamespace(say=told.append)
    hub: Any = NoHub()
    saver = Saver(
        config, RunPaths(tmp_path), main, state, checkpointer, main, lock=main, schedule=SaveSchedule(config, 64),
        outlet=outlet, hub=hub, alive=main, is_stopping=main, is_judged_later=main, total_steps=100, saved_step=0,
    )  # fmt: skip
    for checkpointer.undeleted in (None, "Permission denied: checkpoint-10", "Permission denied: checkpoint-10"):
        saver.retain()
    assert [line.partition(":")[0] for line in told] == ["WARNING an old checkpoint could not be deleted"]
