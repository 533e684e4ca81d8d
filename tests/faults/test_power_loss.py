"""Promises 1, 3, 4 and 5 when the power fails: of what was not fsynced, anything may be gone."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.runs import Lab
from tests.distributed.zygote import Zygote
from tests.faults.power_cut import PowerCuts, Recording
from tests.faults.syscalls import preloaded
from tests.hub.helpers import REPO, hub_environment
from tests.hub.server import Fault, HubServer


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in memory where possible: thousands of disks are written and read there."""
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="launcher-power-", dir=base) as name:
        yield Path(name)


@pytest.fixture
def recorded(tmp_path: Path) -> Iterator[tuple[Lab, Recording]]:
    """Ranks, writers and uploaders whose every change below a folder is recorded."""
    recording = Recording(tmp_path / "root", tmp_path / "record")
    recording.root.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in preloaded(recording.root, recording.log).items():
            patch.setenv(name, value)
        zygote = Zygote(tmp_path / "zygote.log")
    (tmp_path / "lab").mkdir()
    yield Lab(zygote, tmp_path / "lab"), recording
    zygote.close()


def record_run(lab: Lab, recording: Recording, hub: HubServer, strategy: str, count: int, *more: str) -> None:
    """A run to its end with saves, retention, publication and pushes; damage; and a start that goes on after it.

    The Hub takes nothing before the second start, so that checkpoints go while their uploads wait.
    """
    folder = recording.root / "run"
    overrides = [
        "checkpoint.save_steps=2", "checkpoint.save_total_limit=2", "train.logging_steps=2", "hub.push_to_hub=true",
        f"hub.hub_model_id={REPO}", "hub.hub_strategy=all_checkpoints", *more,
    ]  # fmt: skip
    env = hub_environment(hub.url, recording.log.parent / "hf-home", xet=False)
    log = recording.log.with_name("output")  # outside, and output_dir itself is made by the product

    def start(*last: str) -> None:
        codes = lab.zygote.run(lab.overrides(folder, strategy, *overrides, *last), count, log, env)
        assert codes == [0] * count, log.read_text()[-5000:]

    hub.faults.append(Fault("POST .*/commit/", status=503, times=None))
    start("train.max_steps=6", "hub.max_wait_s=2")
    hub.faults.clear()
    queue = folder / ".hub"
    assert {path.name.partition("-")[2] for path in queue.glob("[qa]*e/*")} >= {"checkpoint-2", "checkpoint-4"}
    recording.damage(folder / "checkpoint-6/model.safetensors")
    start("train.max_steps=8", "checkpoint.accept_changes=true")
    assert "checkpoint-6 is damaged" in log.read_text()


def check(recording: Recording, memory: Path, num_random: int, shares: tuple[float, float]) -> None:
    cuts = PowerCuts(recording, memory, num_random, shares)
    cuts.run()
    print(f"{cuts.num_cuts} cuts, {cuts.num_disks} disks, {cuts.num_checked} different ones checked")
    assert cuts.num_checked > 100
    assert not cuts.problems, f"{len(cuts.problems)}:\n" + "\n".join(cuts.problems[:20])


@pytest.mark.timeout(300)
def test_the_newest_checkpoint_is_found_when_the_power_is_cut(
    recorded: tuple[Lab, Recording], tmp_path: Path, memory: Path
) -> None:
    with HubServer(tmp_path / "server") as hub:
        record_run(*recorded, hub, "zero2", 2)
    check(recorded[1], memory, num_random=1, shares=(0.02, 0.3))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("strategy", "count", "more"),
    [
        ("single", 1, ["checkpoint.async_save=false"]),
        ("ddp", 2, []),
        ("zero3", 3, []),
        ("zero1", 4, ["checkpoint.async_save=false"]),
    ],
)
def test_the_newest_checkpoint_is_found_when_the_power_is_cut_after_any_operation(
    recorded: tuple[Lab, Recording], tmp_path: Path, memory: Path, strategy: str, count: int, more: list[str]
) -> None:
    with HubServer(tmp_path / "server") as hub:
        record_run(*recorded, hub, strategy, count, *more)
    check(recorded[1], memory, num_random=12, shares=(1.0, 1.0))
