"""Saves without a copy in host memory: the same bytes, a small buffer, nothing lost by a kill (promises 1 and 4)."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from launcher.base import device_memory, manifest
from launcher.base.block_io import BLOCK_BYTES
from launcher.base.paths import RunPaths
from launcher.checkpoint import engine, low_memory
from tests.distributed.runs import Lab, different, kill, log_text, tensors, wait_until
from tests.faults.writer_group import NUMEL, Group

_PIECE_BYTES = 16 * BLOCK_BYTES


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_memory, "PIECE_BYTES", _PIECE_BYTES)


def contents(folder: Path) -> dict[str, bytes]:
    paths = (p for p in folder.rglob("*") if p.is_file() and p.name != manifest.NAME)
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in paths}


@pytest.mark.parametrize(("world_size", "is_async"), [(1, True), (2, True), (3, True), (2, False)])
def test_checkpoint_has_the_same_bytes_when_it_was_written_in_pieces(
    tmp_path: Path, world_size: int, is_async: bool
) -> None:
    found = []
    for is_low in (False, True):
        group = Group(tmp_path / str(is_low), world_size, is_async=is_async, low_memory=is_low)
        group.paths.root.mkdir()
        for step in (1, 2):  # a second one over the same buffer
            group.tensor += step
            group.save(step)
            group.tensor += 1  # the optimizer's next step
            assert group.finish().error is None
            group.tensor -= 1
        assert manifest.verify(group.paths.checkpoint_dir(2)) == []
        own = NUMEL * 4 // world_size
        assert [member._buffer.size >= own for member in group.members] == [not is_low] * world_size
        assert not is_low or all(member._buffer.size <= _PIECE_BYTES for member in group.members)
        found.append([contents(group.paths.checkpoint_dir(step)) for step in (1, 2)])
        group.close()
    assert found[0] == found[1]


@pytest.mark.parametrize("is_async", [True, False])
def test_a_slow_save_is_no_hang_when_it_is_written_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_async: bool
) -> None:
    take, times = engine.snapshot.take, [time.monotonic()]

    def slow(*args: object) -> None:
        time.sleep(0.05)
        take(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(engine.snapshot, "take", slow)
    group = Group(tmp_path, 1, is_async=is_async, low_memory=True, alive=lambda: times.append(time.monotonic()))
    num_pieces = len(list(low_memory.pieces(group.members[0].plan, _PIECE_BYTES)))
    group.save(1)
    assert num_pieces > 3 and len(times) > num_pieces
    assert group.finish().error is None
    group.close()


def test_save_fails_cleanly_and_the_next_one_is_whole_when_the_writer_dies_between_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = Group(tmp_path, 2, low_memory=True)
    group.save(1)
    assert group.finish().error is None
    take, taken = engine.snapshot.take, []

    def killing(*args: object) -> None:
        taken.append(len(taken))
        if len(taken) == 3:
            pid = group.members[0].writer_pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
        take(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(engine.snapshot, "take", killing)
    group.save(2)
    assert "killed by signal 9" in str(group.finish().error)
    assert manifest.verify(group.paths.checkpoint_dir(1)) == [] and not group.paths.checkpoint_dir(2).exists()
    group.save(3)
    assert group.finish().error is None and manifest.verify(group.paths.checkpoint_dir(3)) == []
    group.close()


def test_copies_are_left_out_where_they_do_not_fit_on_a_host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told = [("a", 4 * 10**9, 10**10), ("a", 4 * 10**9, 10**10), ("b", 9 * 10**9, 95 * 10**8), ("b", 10, 95 * 10**8)]
    assert low_memory.shortage(told).keys() == {"b"}
    for free, is_low in ((10**12, False), (NUMEL, True)):
        monkeypatch.setattr(engine, "free_host_bytes", lambda free=free: free)
        group = Group(tmp_path, 1)
        (member,) = group.members
        member._low_memory = None
        monkeypatch.setattr(member._processes, "gather", lambda value: [value])
        member.reserve()
        assert member._low_memory is is_low and (member._buffer.size < NUMEL * 4) is is_low
        assert ["host memory is short" in text for text in member.notices] == [True] * is_low
        group.close()


@pytest.mark.parametrize(
    ("names", "stat"),
    [
        (("memory.max", "memory.current"), "anon 5\ninactive_file 300\n"),
        (("memory.limit_in_bytes", "memory.usage_in_bytes"), "inactive_file 1\ntotal_inactive_file 300\n"),
    ],
)
def test_free_memory_is_that_of_the_container(
    names: tuple[str, str], stat: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / names[0]).write_text("1000\n")
    (tmp_path / names[1]).write_text("900\n")
    (tmp_path / "memory.stat").write_text(stat)
    monkeypatch.setattr(device_memory, "own_cgroups", lambda _: [tmp_path])
    assert device_memory.free_host_bytes() == 400


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3"])
def test_run_without_copies_ends_like_one_with_them(lab: Lab, tmp_path: Path, strategy: str) -> None:
    runs = [
        lab.run(tmp_path / value, strategy, 2, f"checkpoint.low_memory={value}", "train.max_steps=12")
        for value in ("false", "true")
    ]
    for step in (10, 12):
        first, second = (tensors(run.checkpoint_dir(step)) for run in runs)
        assert first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)
    again = lab.run(tmp_path / "true", strategy, 2, "checkpoint.low_memory=true", "train.max_steps=14")
    assert manifest.verify(again.checkpoint_dir(14)) == []


_LARGE = (
    "model.config.hidden_size=512", "model.config.intermediate_size=2048", "model.config.num_hidden_layers=6",
    "train.max_steps=2",
)  # fmt: skip
"""About 300 MB of weights and moments; pieces of 64 MiB (in a rank, `_small_pieces` does not hold)."""


def _peak_bytes(pid: int) -> tuple[int, int]:
    """The most memory that a process held until it ended: all of it, and what it shares (with its writer: the copy)."""
    whole = shared = 0
    while (found := _status(pid)).keys() >= {"VmHWM", "RssShmem"}:
        whole, shared = max(whole, found["VmHWM"]), max(shared, found["RssShmem"])
        time.sleep(0.01)
    return whole, shared


def _status(pid: int) -> dict[str, int]:
    """Bytes by name; nothing of a process that has ended."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return {}
    fields = (line.split() for line in text.splitlines() if line.endswith(" kB"))
    return {name.rstrip(":"): int(number) * 1024 for name, number, _ in fields}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["single", "zero2"])
def test_a_rank_holds_no_copy_of_its_state_when_saves_are_written_in_pieces(
    lab: Lab, tmp_path: Path, strategy: str
) -> None:
    peaks = {}
    for value in ("false", "true"):
        (pid,) = lab.start(tmp_path / value, strategy, 1, f"checkpoint.low_memory={value}", *_LARGE)
        peaks[value] = _peak_bytes(pid)
        assert lab.zygote.wait() == [0], log_text(tmp_path / value)
    state = manifest.bytes_of(tmp_path / "true/checkpoint-2")
    assert state > 250e6
    (whole, shared), (low_whole, low_shared) = peaks["false"], peaks["true"]
    assert shared > 0.99 * state and low_shared < 1.2 * 64 * 2**20, peaks
    assert low_whole < whole, f"the copy was made elsewhere: {peaks}"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("strategy", "count"), [("single", 1), ("zero2", 2), ("zero3", 3)])
def test_run_ends_with_the_same_bits_when_ranks_are_killed_while_pieces_are_written(
    lab: Lab, tmp_path: Path, strategy: str, count: int
) -> None:
    more = ("checkpoint.low_memory=true", "checkpoint.save_steps=1", "train.max_steps=12")
    plain = lab.run(tmp_path / "plain", strategy, count, *more)
    chance, run = random.Random(count), tmp_path / "run"
    for target in (2, 5, 8):
        done = max((step for step, _ in RunPaths(run).checkpoint_dirs()), default=0)
        hang = {"kind": "hang", "step": target + 2 - done}  # the kill may come late on a busy machine
        pids = lab.start(run, strategy, count, *more, env={"FAULTS": json.dumps([hang])})
        wait_until(
            lambda n=target: any(run.glob(f".tmp-checkpoint-{n}*")) or (run / f"checkpoint-{n}").exists(), "a save"
        )
        time.sleep(chance.uniform(0.0, 0.03))
        kill([chance.choice(pids)])
        assert any(lab.zygote.wait())
        assert all(manifest.verify(folder) == [] for _, folder in RunPaths(run).checkpoint_dirs())
    again = lab.run(run, strategy, count, *more)
    assert different(plain.checkpoint_dir(12), again.checkpoint_dir(12)) == []
