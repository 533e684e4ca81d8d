"""Promises 1 and 5 with real ranks: one of them pushes, whatever their number, and stop and resume go on with it."""

from __future__ import annotations

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
    for step, folder in paths.checkpoint_dirs():
        assert manifest.verify(folder) == []
        for path in (p for p in folder.rglob("*") if p.is_file()):
            data = hub.read(REPO, f"checkpoint-{step}/{path.relative_to(folder).as_posix()}")
            assert data == path.read_bytes()
            assert str(lab.folder).encode() not in data, f"{path} names a folder of this machine"
    assert hub.read(REPO, "model.safetensors") == (output_dir / "model.safetensors").read_bytes()
    assert env["HF_TOKEN"] not in log_text(output_dir)
