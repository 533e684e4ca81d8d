"""The writer process is killed, cannot start, or meets an error, under the real `Checkpointer`: promises 1, 3 and 4."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from launcher.base import block_io, manifest
from launcher.base.errors import CheckpointWriteError
from launcher.base.paths import RunPaths
from launcher.checkpoint.engine import Phase
from launcher.checkpoint.writer import Writer
from tests.faults.writer_group import NUMEL, Group


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Group]:
    made = Group(tmp_path, 2)
    yield made
    made.close()


def _no_memory(fd: int, offset: int, size: int) -> None:
    raise OSError(12, "Cannot allocate memory")


def _whole(paths: RunPaths) -> list[int]:
    return [step for step, folder in paths.checkpoint_dirs() if manifest.verify(folder) == []]


def _only(paths: RunPaths) -> list[str]:
    return sorted(p.name for p in paths.root.iterdir())


def _wait_discarded(group: Group) -> None:
    deadline = time.monotonic() + 30
    while any(p.name.startswith(".tmp") for p in group.paths.root.iterdir()):
        assert time.monotonic() < deadline, _only(group.paths)
        for member in group.members:
            member.status()
        time.sleep(0.005)


def _wait_for_the_ends_of_writers(group: Group) -> None:
    deadline = time.monotonic() + 30
    while any(member._writer.is_alive for member in group.members):
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("victim", [0, 1])
def test_save_fails_cleanly_and_the_next_one_is_whole_when_a_writer_is_killed(group: Group, victim: int) -> None:
    group.save(1)
    assert group.finish().error is None
    pid = group.members[victim].writer_pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)  # so that it cannot have written before it dies
    group.save(2)
    os.kill(pid, signal.SIGKILL)
    result = group.finish()
    assert result.error is not None and "killed by signal 9" in result.error
    assert _whole(group.paths) == [1]
    _wait_discarded(group)

    group.save(3)
    assert group.finish().error is None
    assert _whole(group.paths) == [1, 3]
    assert group.members[victim].writer_pid != pid


def test_nothing_is_discarded_while_another_process_still_writes(group: Group) -> None:
    """Else its writer puts the files back after the deletion, and the disk fills up with half saves."""
    group.save(1)
    assert group.finish().error is None
    slow, victim = group.members[1].writer_pid, group.members[0].writer_pid
    assert slow is not None and victim is not None
    os.kill(slow, signal.SIGSTOP)
    os.kill(victim, signal.SIGSTOP)
    group.save(2)
    os.kill(victim, signal.SIGKILL)
    for _ in range(20):
        assert group.tick() is None, "the save was given up while a process was still writing"
        time.sleep(0.01)
    os.kill(slow, signal.SIGCONT)
    assert group.finish().error is not None
    _wait_discarded(group)
    time.sleep(0.3)
    assert _only(group.paths) == ["checkpoint-1"]


@pytest.fixture
def apart(tmp_path: Path) -> Iterator[Group]:
    """Of two machines, where no writer goes ahead."""
    made = Group(tmp_path, 2, is_one_machine=False)
    yield made
    made.close()


@pytest.mark.parametrize("victim, before", [(0, Phase.WRITING), (1, Phase.WRITING), (0, Phase.HASHING)])
def test_save_fails_cleanly_when_a_writer_is_killed_while_it_hashes_or_commits(
    apart: Group, victim: int, before: Phase
) -> None:
    group = apart
    group.save(1)
    assert group.finish().error is None
    pid = group.members[victim].writer_pid
    assert pid is not None
    group.save(2)
    while group.members[0].phase is not before:
        group.tick()
    while group.members[0].phase is before:
        if all(m.status() == (0, 0, 0) for m in group.members):
            os.kill(pid, signal.SIGSTOP)
        group.tick()
    os.kill(pid, signal.SIGKILL)
    assert group.finish().error is not None
    _wait_discarded(group)
    group.save(2)
    assert group.finish().error is None
    assert _whole(group.paths) == [1, 2]


def test_save_fails_without_an_exception_when_no_writer_can_start(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    group.save(1)
    assert group.finish().error is None
    for member in group.members:
        assert member.writer_pid is not None
        os.kill(member.writer_pid, signal.SIGKILL)
    with monkeypatch.context() as patch:
        patch.setattr("sys.executable", "/bin/false")
        _wait_for_the_ends_of_writers(group)
        group.save(2)
        assert group.finish().error is not None
        _wait_for_the_ends_of_writers(group)  # of those that were to discard what was left
    group.save(3)
    assert group.finish().error is None
    assert 3 in _whole(group.paths)


def test_save_fails_without_an_exception_when_there_is_no_memory_for_the_buffer(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", _no_memory)
        group.save(1)
        result = group.finish()
        assert result.error is not None and "Cannot allocate memory" in result.error
    group.save(2)
    assert group.finish().error is None
    assert _whole(group.paths) == [2]


def test_lack_of_memory_is_told_at_the_start_rather_than_at_the_first_save(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", _no_memory)
        with pytest.raises(CheckpointWriteError, match=r"bytes cannot be had.*checkpoint=off"):
            group.members[0].reserve()
    for member in group.members:
        member.reserve()
    buffers = [member._buffer.fd for member in group.members]
    group.save(1)
    assert group.finish().error is None
    assert [member._buffer.fd for member in group.members] == buffers, "the first save took other memory"


@pytest.mark.parametrize("is_async", [True, False])
def test_save_fails_cleanly_when_output_dir_has_vanished(tmp_path: Path, is_async: bool) -> None:
    group = Group(tmp_path / "run", 1, is_async=is_async)
    (tmp_path / "run").mkdir()
    group.save(1)
    assert group.finish().error is None
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    group.save(2)
    result = group.finish()
    assert result.error is not None and "run" in result.error
    assert not (tmp_path / "run").exists()
    group.close()


def test_other_bytes_than_the_snapshot_never_reach_the_disk(group: Group) -> None:
    """The state goes on changing while the writer works."""
    pids = [m.writer_pid for m in group.members]
    group.save(1)
    pids = [m.writer_pid for m in group.members]
    for pid in pids:
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
    group.tensor.fill_(-1.0)
    for pid in pids:
        assert pid is not None
        os.kill(pid, signal.SIGCONT)
    assert group.finish().error is None
    from safetensors.torch import load_file

    saved = load_file(group.paths.checkpoint_dir(1) / "model.safetensors")["w"]
    assert torch.equal(saved, torch.arange(NUMEL, dtype=torch.float32))


def test_a_starved_writer_is_started_anew_with_a_share_of_busy_cores(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SCHED_IDLE on a core that never rests would put every commit off to the next save."""
    group.save(1)
    assert group.finish().error is None
    pids = [m.writer_pid for m in group.members]
    assert [os.sched_getscheduler(pid) for pid in pids if pid is not None] == [os.SCHED_IDLE, os.SCHED_IDLE]
    starved, other = pids[1], pids[0]
    assert starved is not None
    core = {min(os.sched_getaffinity(0))}
    os.sched_setaffinity(starved, core)
    busy = subprocess.Popen(
        [sys.executable, "-c", "while True: pass"], preexec_fn=lambda: os.sched_setaffinity(0, core)
    )
    try:
        group.save_of(group.members[0], 2, {})
        much = {"state/rng-1.json": " " * 50_000_000}
        group.save_of(group.members[1], 2, much)
        started = time.monotonic()
        while time.monotonic() - started < 8:
            group.tick()
            time.sleep(0.01)
    finally:
        busy.kill()
        busy.wait()
    if group.members[0].phase is not Phase.IDLE:
        assert group.finish().error is None
    group.save(3)
    assert group.finish().error is None
    assert _whole(group.paths) == [1, 2, 3]
    first = group.members[0].writer_pid
    assert first is not None
    # On a machine that is busy with something else the other one may be starved as well; else it is still the same.
    assert (first == other) == (os.sched_getscheduler(first) == os.SCHED_IDLE)
    pid = group.members[1].writer_pid
    assert pid is not None and pid != starved
    assert (os.sched_getscheduler(pid), os.getpriority(os.PRIO_PROCESS, pid)) == (os.SCHED_OTHER, 19)


def test_a_checkpoint_holds_the_state_before_the_optimizer_step_that_follows_its_save(group: Group) -> None:
    """Also where no core was free to copy it until then."""
    before, gate = group.tensor.clone(), threading.Event()
    for member in group.members:
        member._sender._host_copies._pool.submit(gate.wait)
    timer = threading.Timer(0.2, gate.set)
    timer.start()
    group.save(1)
    group.tensor += 1
    assert group.finish().error is None
    timer.join()
    with safe_open(group.paths.checkpoint_dir(1) / "model.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("w"), before)


def test_whole_blocks_are_written_past_the_page_cache_and_the_edges_are_right(tmp_path: Path) -> None:
    """Two writers share the block at the border; nothing else of the file may be touched."""
    calls: list[tuple[int, int, int]] = []
    content = os.urandom(3 * 2**20)
    border = 1_500_001
    path = tmp_path / "file"
    for low, high in ((7, border), (border, len(content) - 5)):
        buffer = mmap.mmap(-1, high - low + block_io.BLOCK_BYTES)
        shift = low % block_io.BLOCK_BYTES
        buffer[shift : shift + high - low] = content[low:high]
        file = block_io.RangeWriter(path, len(content))
        with pytest.MonkeyPatch.context() as patch:
            real = os.pwrite

            def note(fd: int, data: memoryview, offset: int, real: Any = real) -> int:
                calls.append((fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT, len(data), offset))
                return int(real(fd, data, offset))

            patch.setattr(os, "pwrite", note)
            file.write(memoryview(buffer)[shift : shift + high - low], low)
        file.sync()
        file.close()
    assert path.read_bytes() == bytes(7) + content[7:-5] + bytes(5)
    if not any(direct for direct, *_ in calls):
        pytest.fail(f"nothing was written with O_DIRECT: {calls}")
    assert all(size % 4096 == 0 and offset % 4096 == 0 for direct, size, offset in calls if direct)


def test_a_save_fails_when_a_shared_block_lost_what_one_of_two_writers_wrote(tmp_path: Path) -> None:
    """A file system that writes whole pages back may undo another machine's part of one."""
    border, size = 10_000, 20_000
    content = os.urandom(size)
    writers = []
    for low, high in ((0, border), (border, size)):
        writers.append(Writer(memoryview(content)[low:high]))
        ranges = [["file", low, 0, high - low]]
        command = {
            "cmd": "write", "step": 1, "dir": str(tmp_path), "files": {"file": size}, "heads": {}, "ranges": ranges,
            "texts": {}, "statics": False,
        }  # fmt: skip
        assert [answer["event"] for answer in writers[-1].execute(command)] == ["written"]
    assert (tmp_path / "file").read_bytes() == content
    block = border // block_io.BLOCK_BYTES * block_io.BLOCK_BYTES
    with (tmp_path / "file").open("r+b") as file:
        file.seek(block)
        file.write(content[block:border] + bytes(block + block_io.BLOCK_BYTES - border))
    command = {"cmd": "hash", "step": 1, "dir": str(tmp_path), "files": ["file"]}
    answers = [answer for writer in writers for answer in writer.execute(command)]
    assert [answer["event"] for answer in answers] == ["hashed", "failed"]
    assert "not what was written" in answers[1]["error"]


@pytest.mark.parametrize(
    ("offset", "length", "expected"),
    [
        (0, 8192, []), (0, 8193, [(8192, 1)]), (1, 8191, [(1, 4095)]), (4000, 200, [(4000, 96), (4096, 104)]),
        (100, 50, [(100, 50)]), (4046, 50, [(4046, 50)]), (4096, 50, [(4096, 50)]), (5, 0, []),
    ],
)  # fmt: skip
def test_edges_are_the_parts_in_blocks_that_others_may_write(
    offset: int, length: int, expected: list[tuple[int, int]]
) -> None:
    data = memoryview(bytes(length))
    assert [(start, len(part)) for part, start in block_io.edges(data, offset)] == expected


def test_everything_is_written_when_the_file_system_refuses_direct_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwrite

    def refuse(fd: int, data: memoryview, offset: int) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return int(real(fd, data, offset))

    monkeypatch.setattr(os, "pwrite", refuse)
    content = os.urandom(2**20)
    file = block_io.RangeWriter(tmp_path / "file", len(content))
    file.write(memoryview(content)[:600_000], 0)
    file.write(memoryview(content)[600_000:], 600_000)
    file.sync()
    file.close()
    assert (tmp_path / "file").read_bytes() == content


def test_one_that_cannot_be_deleted_is_told_and_the_others_go(group: Group) -> None:
    folders = [group.paths.checkpoint_dir(step) for step in (1, 2, 3)]
    for step in (1, 2, 3):
        group.save(step)
        assert group.finish().error is None
    (group.paths.root / ".tmp-deleted-checkpoint-1/in/the/way").mkdir(parents=True)
    group.members[0].expire(folders[:2])
    group.members[0].settle()
    assert _whole(group.paths) == [1, 3]
    assert "Directory not empty" in str(group.members[0].undeleted)


_ON_OVERLAYFS = """
mount -t tmpfs none upper && mkdir upper/new upper/work
mount -t overlay overlay -o lowerdir=lower,upperdir=upper/new,workdir=upper/work run
exec "$0" -c '
import sys
from pathlib import Path
from launcher.checkpoint.writer import Writer
names = [str(Path("run/checkpoint-1").absolute())]
print(Writer(memoryview(b"")).execute({"cmd": "retain", "step": -1, "expired": names, "durable": []}))
assert not list(Path("run").iterdir())
'
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="mount namespaces need root")
def test_a_checkpoint_of_a_layer_below_is_deleted_on_overlayfs(tmp_path: Path) -> None:
    """A container's file system cannot rename a folder that came with its image."""
    for name in ("upper", "run", "lower/checkpoint-1/state"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("config.json", "manifest.json", "state/state.json"):
        (tmp_path / "lower/checkpoint-1" / name).write_text("{}")
    done = subprocess.run(
        ["unshare", "--mount", "bash", "-ec", _ON_OVERLAYFS, sys.executable], cwd=tmp_path, capture_output=True,
        text=True, timeout=60, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert done.returncode == 0 and "retained" in done.stdout, done.stdout + done.stderr
