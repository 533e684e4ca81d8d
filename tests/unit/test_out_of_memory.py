"""Which sizes come after memory that was too small, and who may use them; nothing is started."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from launcher.agent import out_of_memory
from launcher.agent.machine import Ended
from launcher.agent.out_of_memory import BatchSizes
from launcher.agent.outcome import Outcome
from launcher.base import device_memory
from launcher.base.paths import RunPaths
from launcher.base.rank_reports import Report, make_report, write_report
from launcher.config.compose import compose
from launcher.config.settings import RunConfig
from launcher.train import sizing


def config_of(folder: Path, *overrides: str) -> RunConfig:
    return compose([f"output_dir={folder}", "data=arithmetic", "strategy=ddp", *overrides])


def used_by(config: RunConfig, world_size: int, train: int, **fields: Any) -> dict[str, Any]:
    asked = out_of_memory.asked_for(config, world_size)
    sizes = BatchSizes(train, 8, gradient_checkpointing=False, can_recompute=True)
    used = {"batch_sizes": out_of_memory.in_use(sizes, asked), "started_at": 100.0, "attempt": "a"}
    return {**used, "world_size": world_size, **fields}


def report_of(error: BaseException, *, training_began: bool = True) -> Report:
    return make_report(error, rank=1, training_began=training_began, step=4)


class OutOfMemoryError(RuntimeError):
    """As torch's, by its name."""


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 100])
def test_sizes_are_halved_down_to_one_and_then_recomputed(size: int) -> None:
    sizes, seen = BatchSizes(size, 8, gradient_checkpointing=False, can_recompute=True), []
    while (smaller := sizes.smaller(in_training=True, in_evaluation=False)) is not None:
        assert smaller.train == -(-sizes.train // 2) and smaller.eval == 8
        sizes = smaller
        seen.append((sizes.train, sizes.gradient_checkpointing))
    assert seen[-1] == (1, True) and [s for s, is_last in seen if is_last] == [1]
    assert BatchSizes(1, 8, False, False).smaller(in_training=True, in_evaluation=False) is None
    assert BatchSizes(4, 1, False, True).smaller(in_training=False, in_evaluation=True) is None


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"), True),
        (RuntimeError("shapes do not match"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_error_is_known_as_a_lack_of_memory_when_training_had_begun(error: Exception, is_one: bool) -> None:
    assert out_of_memory.is_out_of_memory(report_of(error)) is is_one
    assert not out_of_memory.is_out_of_memory(report_of(error, training_began=False))


def test_killed_rank_lacked_memory_when_the_kernel_counted_a_kill() -> None:
    crash = Outcome("failed", "crash", 1, "rank 1 was killed")
    assert out_of_memory.where(crash, [Ended(0, "here", 1, killed={1: 9}, num_oom_kills=1)]) is not None
    for ended in (Ended(0, "here", 1, killed={1: 9}), Ended(0, "here", 1, killed={1: 15}, num_oom_kills=1)):
        assert out_of_memory.where(crash, [ended]) is None
    stopped = Outcome("interrupted", "signal", 75)
    assert out_of_memory.where(stopped, [Ended(0, "here", 1, killed={1: 9}, num_oom_kills=1)]) is None


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("memory.events", "low 0\nhigh 0\nmax 7\noom 3\noom_kill 2\noom_group_kill 0\n"),
        ("memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n"),
    ],
)
def test_kernel_counter_is_read_from_the_own_group(
    name: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).write_text(text)
    monkeypatch.setattr(device_memory, "own_cgroups", lambda _: [tmp_path])
    assert device_memory.oom_kills() == 2


def test_limits_hold_for_later_starts_that_ask_for_the_same(tmp_path: Path) -> None:
    config, paths = config_of(tmp_path), RunPaths(tmp_path)
    paths.run_state.write_text(json.dumps(used_by(config, 2, 8)))
    crash = Outcome("failed", "crash", 1, failure=report_of(OutOfMemoryError("CUDA out of memory")))
    assert out_of_memory.note(paths, "another", crash) is None
    noted = out_of_memory.note(paths, "a", crash)
    assert noted is not None
    assert noted[0].change_to(noted[1]) == "4 instead of 8 samples per forward and backward"

    def size(world_size: int, *overrides: str) -> int:
        return sizing.decide(config_of(tmp_path, *overrides), world_size, [None] * world_size).train

    assert size(2) == size(3) == 4  # without `auto` the devices decide nothing
    assert size(2, "train.per_device_train_batch_size=6") == 6
    assert size(2, "train.on_out_of_memory=stop") == 8
    assert size(2, "strategy=zero2") == 8
    # What the next start writes keeps them, and its own sizes are halved from there.
    limits = json.loads(paths.run_state.read_text())["out_of_memory"]
    paths.run_state.write_text(json.dumps(used_by(config, 2, 4, out_of_memory=limits)))
    assert out_of_memory.note(paths, "a", crash) is not None
    found = out_of_memory.limits(paths)
    assert found is not None and (found["train"], found["eval"], found["count"]) == (2, 8, 2)


def test_start_finds_the_report_of_a_start_that_nobody_watched(tmp_path: Path) -> None:
    config, paths = config_of(tmp_path), RunPaths(tmp_path)
    paths.logs_dir.mkdir()
    paths.run_state.write_text(json.dumps(used_by(config, 2, 8, started_at=time.time() + 60)))
    write_report(report_of(OutOfMemoryError("CUDA out of memory")), paths.logs_dir)
    assert out_of_memory.limits(paths) is None  # of an earlier start
    paths.run_state.write_text(json.dumps(used_by(config, 2, 8)))
    found = out_of_memory.limits(paths)
    assert found is not None and found["train"] == 4
    paths.run_state.write_text(json.dumps(used_by(config, 2, 4, out_of_memory=found)))
    assert out_of_memory.limits(paths) == found  # that report is done with


@pytest.mark.parametrize("odd", [[], "x", {"train": 0}, {"train": True, "eval": 8}, None])
def test_nonsense_in_run_json_limits_nothing(tmp_path: Path, odd: Any) -> None:
    config, paths = config_of(tmp_path), RunPaths(tmp_path)
    for run in (odd, {"out_of_memory": odd, "batch_sizes": odd}, {"out_of_memory": {"time": odd, "asked": odd}}):
        paths.run_state.write_text(json.dumps(run))
        assert sizing.decide(config, 2, [None, None]).train == 8
        assert out_of_memory.note(paths, "a", Outcome("failed", "crash", 1)) is None
