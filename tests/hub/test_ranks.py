"""Promises 1 and 5 with real ranks: one of them pushes, whatever their number, and stop and resume go on with it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.base import files, manifest
from launcher.base.paths import RunPaths
from launcher.hub import pushed_checkpoints
from tests.distributed.runs import Lab, log_text, wait_until
from tests.distributed.zygote import Zygote
from tests.hub.helpers import REPO
from tests.hub.server import HubServer
from tests.hub.test_starts import uploaders

PUSH = (
    "hub=push", f"hub.hub_model_id={REPO}", "hub.hub_strategy=all_checkpoints", "hub.max_wait_s=120",
    "train.max_steps=60", "checkpoint.save_steps=10", "scheduler.warmup_steps=1",
)  # fmt: skip
SLOW_STEPS = json.dumps([{"kind": "sleep", "seconds": 0.5}])


def commits(hub: HubServer) -> list[tuple[str, set[str]]]:
    """Title and changed paths of each commit after the repository was made, oldest first."""
    history = hub.repos[REPO].history()[::-1]
    changed = []
    for before, after in itertools.pairwise(history):
        paths = before.files.keys() | after.files.keys()
        changed.append((after.title, {p for p in paths if before.files.get(p) != after.files.get(p)}))
    return changed


def tops(paths: set[str]) -> set[str]:
    """The folders of paths in a repository; "" is its top, but for the model card."""
    card = {"README.md", "loss_curve.png", ".gitattributes"}
    return {path.rpartition("/")[0].partition("/")[0] for path in paths - card}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    zygote = Zygote(folder / "log")
    yield Lab(zygote, folder)
    zygote.close()


@pytest.mark.parametrize(
    ("num_processes", "strategy"),
    [
        pytest.param(1, "single", marks=pytest.mark.slow),
        pytest.param(2, "zero2", marks=pytest.mark.slow),
        pytest.param(3, "ddp", marks=pytest.mark.slow),
        (4, "ddp"),
    ],
)
def test_one_rank_pushes_and_goes_on_after_a_stop(
    lab: Lab, hub: HubServer, env: dict[str, str], num_processes: int, strategy: str
) -> None:
    output_dir = lab.folder / f"push-{num_processes}"
    paths = RunPaths(output_dir)
    # A run of some saves, before push is switched on.
    lab.run(output_dir, strategy, num_processes, *PUSH[-3:], "train.max_steps=10")
    assert not paths.hub_dir.exists()
    blocked = hub.fail("POST .*/commit/", hang=60.0, times=None)
    lab.start(
        output_dir, strategy, num_processes, *PUSH, "checkpoint.accept_changes=true", env={**env, "FAULTS": SLOW_STEPS}
    )
    wait_until(lambda: bool(blocked.hits), "the first commit")
    assert len(uploaders(output_dir)) == 1
    wait_until(lambda: (output_dir / "checkpoint-20").is_dir(), "checkpoint-20")
    assert len(uploaders(output_dir)) == 1
    paths.stop_file.touch()
    assert lab.zygote.wait() == [0] * num_processes, log_text(output_dir)
    run = files.read_json(paths.run_state)
    assert run["state"] == "interrupted" and "checkpoint-20" in run["hub"]["pending"]
    assert uploaders(output_dir) == []
    hub.heal()
    lab.run(output_dir, strategy, num_processes, *PUSH, env=env)
    run = files.read_json(paths.run_state)
    assert run["state"] == "finished" and run["hub"]["pending"] == run["hub"]["failed"] == []
    assert uploaders(output_dir) == []
    steps = [step for step, _ in paths.checkpoint_dirs()]
    assert {10, 20, 60} <= set(steps) and set(pushed_checkpoints(paths)) == set(steps)
    assert set(hub.repos[REPO].tags) == {f"step-{step}" for step in steps}
    assert all(changed for _, changed in commits(hub))
    for step, folder in paths.checkpoint_dirs():
        assert manifest.verify(folder) == []
        for path in (p for p in folder.rglob("*") if p.is_file()):
            data = hub.read(REPO, f"checkpoint-{step}/{path.relative_to(folder).as_posix()}")
            assert data == path.read_bytes()
            assert str(lab.folder).encode() not in data, f"{path} names a folder of this machine"
    assert hub.read(REPO, "model.safetensors") == (output_dir / "model.safetensors").read_bytes()
    assert env["HF_TOKEN"] not in log_text(output_dir)


@pytest.mark.slow
@pytest.mark.parametrize(("num_processes", "sharding"), [(1, "single"), (2, "zero2"), (3, "ddp"), (4, "zero3")])
def test_every_push_is_one_commit_with_the_files_of_its_strategy(
    lab: Lab, hub: HubServer, env: dict[str, str], num_processes: int, sharding: str
) -> None:
    """Each content once, and no commit that changes nothing: after the run, and after another start of it."""
    for strategy in ("end", "every_save", "checkpoint", "all_checkpoints"):
        paths = RunPaths(lab.folder / f"to-{strategy}-{num_processes}")
        hub.repos.clear()
        more = (
            *PUSH, f"hub.hub_strategy={strategy}", "train.max_steps=30", "checkpoint.save_total_limit=null",
            "checkpoint.load_best_model_at_end=false",
        )  # fmt: skip
        lab.run(paths.root, sharding, num_processes, *more, env=env)
        found = commits(hub)
        assert all(changed for _, changed in found), found
        pushed = {title.removeprefix("Push "): tops(changed) for title, changed in found if tops(changed)}
        for name, folders in pushed.items():  # what a commit holds
            is_checkpoint = name != "model"
            inner = {"checkpoint": "last-checkpoint", "all_checkpoints": name}.get(strategy)
            assert folders == ({"", inner} if is_checkpoint and inner else {""}), (strategy, found)
        names = [f"checkpoint-{step}" for step in (10, 20, 30)]
        passed_over = files.read_json(paths.run_state)["hub"]["passed_over"]
        if strategy == "end":
            assert list(pushed) == ["model"]
        elif strategy == "all_checkpoints":
            assert list(pushed) == names and not passed_over
        else:  # what a newer one replaces may be passed over
            assert [name for name in pushed if name != "model"] == [name for name in names if name not in passed_over]
        if strategy != "every_save":
            assert strategy == "end" or "model" not in pushed  # it is that of checkpoint-30, which is there
        assert hub.read(REPO, "model.safetensors") == (paths.root / "model.safetensors").read_bytes()
        lab.run(paths.root, sharding, num_processes, *more, env=env)
        assert commits(hub) == found, strategy
