"""One run per output_dir: what a lock says, and who may take it."""

from __future__ import annotations

import itertools
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from launcher.base import lock as lock_module
from launcher.base import lock_file
from launcher.base.errors import RunLockedError, RunLockLostError, UserError
from launcher.base.lock import RunLock, holder, wait_until_free
from launcher.base.process import boot_id, host, machine_id, pid_namespace, start_ticks

ME = [os.getpid(), start_ticks(os.getpid())]
DEAD = [2**22 - 1, 1]
HERE = {"host": host(), "boot_id": boot_id(), "machine_id": machine_id(), "pid_namespace": pid_namespace()}
OTHER_HOST = {"host": "elsewhere", "boot_id": "b", "machine_id": "m", "pid_namespace": "pid:[4026531836]"}
_IN_2030 = 1_893_456_000
OTHER_CONTAINER = {**HERE, "pid_namespace": "pid:[1]"}


@pytest.fixture(autouse=True)
def _short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_file, "DYING_S", 0.3)
    monkeypatch.setattr(lock_file, "STALE_S", 0.15)
    monkeypatch.setattr(lock_module, "HEARTBEAT_S", 0.05)
    monkeypatch.setattr(lock_module, "_POLL_S", 0.02)


@pytest.fixture
def _long_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a wait would show, however busy the machine is."""
    monkeypatch.setattr(lock_file, "DYING_S", 60.0)
    monkeypatch.setattr(lock_file, "STALE_S", 60.0)


def write_lock(path: Path, **fields: Any) -> None:
    new = path.with_name("new")
    new.write_text(json.dumps({"beat": 1_000_000_000, "id": "0123abcd", "pid": 7, "pids": [[7, 7]], **fields}))
    new.replace(path)


def take(path: Path) -> RunLock:
    lock = RunLock(path)
    lock.acquire([os.getpid()])
    return lock


@pytest.mark.usefixtures("_long_times")
def test_a_live_holder_is_named_and_keeps_the_lock(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    first = take(path)
    began = time.monotonic()
    with pytest.raises(RunLockedError, match=f"host {host()}, pid {os.getpid()}") as caught:
        take(path)
    assert caught.value.exit_code == 2 and time.monotonic() - began < 20
    assert first.is_held() and holder(path) is not None
    first.release()
    assert list(tmp_path.iterdir()) == []
    take(path).release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("_long_times")
@pytest.mark.parametrize("pids", [[], [DEAD], [[os.getpid(), 1]]], ids=["none", "dead", "a pid given to another"])
def test_a_lock_without_living_processes_is_taken_at_once(pids: list[list[int]], tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    write_lock(path, **HERE, pids=pids)
    assert holder(path) is None
    began = time.monotonic()
    take(path).release()
    assert time.monotonic() - began < 20
    assert list(tmp_path.iterdir()) == []


def test_any_living_rank_holds_it_although_the_main_one_is_dead(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    write_lock(path, **HERE, pids=[DEAD, ME])
    assert holder(path) is not None
    with pytest.raises(RunLockedError):
        wait_until_free(path, print)


def test_dying_ranks_of_a_dead_launcher_are_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, told = tmp_path / ".lock", list[str]()

    def they_end(text: str) -> None:
        told.append(text)
        write_lock(path, **HERE, pids=[DEAD], parent=DEAD)

    write_lock(path, **HERE, pids=[ME], parent=DEAD)
    with monkeypatch.context() as patch:
        patch.setattr(lock_file, "DYING_S", 60.0)
        wait_until_free(path, they_end)
    assert len(told) == 1 and told[0].startswith(f"waiting up to 60 s for the end of a run on host {host()}")
    write_lock(path, **HERE, pids=[ME], parent=DEAD)
    with pytest.raises(RunLockedError):
        wait_until_free(path, print)


@pytest.mark.usefixtures("_long_times")
def test_a_lock_of_before_a_power_loss_is_taken_at_once(tmp_path: Path) -> None:
    if pid_namespace() != "pid:[4026531836]" or machine_id() is None:
        pytest.skip("in a container the machine cannot be told: the heartbeat decides")
    path = tmp_path / ".lock"
    write_lock(path, **{**HERE, "boot_id": "another"}, pids=[ME])
    began = time.monotonic()
    take(path).release()
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    "fields",
    [
        OTHER_HOST,
        OTHER_CONTAINER,
        {**HERE, "boot_id": "another", "machine_id": "another"},
        {**OTHER_CONTAINER, "boot_id": "another"},
        {**HERE, "boot_id": None},
        {"host": host()},
    ],
    ids=["another host", "another container", "a namesake", "a container of a namesake", "no boot id", "older version"],
)
def test_only_the_movement_of_its_heartbeat_decides_when_processes_cannot_be_seen(
    fields: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / ".lock"
    write_lock(path, **fields, pids=[ME])  # a living pid here is nobody's there
    os.utime(path, (_IN_2030, _IN_2030))
    began = time.monotonic()
    lock = RunLock(path)
    lock.acquire([os.getpid()], print)
    assert time.monotonic() - began >= 0.15
    assert f"is locked by a run on host {fields['host']}, pid 7" in capsys.readouterr().out
    lock.release()

    ended = threading.Event()

    def beat() -> None:  # again and again: on a busy machine the first may come before anybody looks
        for number in itertools.count(1_000_000_001):
            if ended.wait(0.05):
                return
            write_lock(path, **fields, pids=[DEAD], beat=number)
            os.utime(path, (1e9, 1e9))

    write_lock(path, **fields, pids=[DEAD])
    os.utime(path, (1e9, 1e9))
    monkeypatch.setattr(lock_file, "STALE_S", 30.0)  # there, it may come late as well
    beating = threading.Thread(target=beat)
    beating.start()
    try:
        with pytest.raises(RunLockedError, match=f"in use by a run on host {fields['host']}, pid 7"):
            take(path)
    finally:
        ended.set()
        beating.join()


@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 300, b"{", b"null", b"5", b"[]", b"[" * 100_000, b'{"pids": 5}', b'{"pids": [5, [], [1], ["a", 2]]}',
     b'{"host": 7, "pid": "x", "boot_id": [], "parent": 5, "id": {}}', b'{"id": "../../x", "pids": [[1e400, 2]]}',
     b'{"pids": [[' + b"9" * 400 + b', 1]], "pid": -1}', b"\xff\xfe", b'{"host": "\\u001b[2Jevil\\n\\u202e"}'],
)  # fmt: skip
def test_a_lock_of_odd_content_is_honoured_until_it_stands_still(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run" / ".lock"
    path.parent.mkdir()
    path.write_bytes(content)
    assert holder(path) is not None
    began = time.monotonic()
    lock = RunLock(path)
    lock.acquire([os.getpid()], print)
    assert time.monotonic() - began >= 0.15
    assert capsys.readouterr().out.strip().isprintable()
    lock.release()
    assert list(tmp_path.iterdir()) == [path.parent] and list(path.parent.iterdir()) == []


@pytest.mark.parametrize("kind", ["folder", "link", "link to nothing", "FIFO", "socket"])
def test_something_else_in_its_place_is_named_with_the_cure_and_left(kind: str, tmp_path: Path) -> None:
    path, target = tmp_path / ".lock", tmp_path / "target"
    match kind:
        case "folder":
            path.mkdir()
        case "link":
            write_lock(target, **HERE, pids=[DEAD])
            path.symlink_to(target)
        case "link to nothing":
            path.symlink_to(target)
        case "FIFO":
            os.mkfifo(path)
        case "socket":
            import socket

            bound = socket.socket(socket.AF_UNIX)
            bound.bind(str(path))
            bound.close()
    before = sorted(tmp_path.iterdir())
    for start in (lambda: take(path), lambda: wait_until_free(path, print)):
        with pytest.raises(UserError, match=rf"\.lock is a {kind.split()[0]}.*rm (-r )?{path}$"):
            start()
    assert holder(path) is None
    assert sorted(tmp_path.iterdir()) == before


def test_a_holder_that_stood_still_notices_that_it_has_lost_the_lock(tmp_path: Path) -> None:
    path, losses = tmp_path / ".lock", list[RunLockLostError]()
    lock = take(path)
    lock.on_lost = losses.append
    assert lock.is_held()
    write_lock(tmp_path / "new", **OTHER_HOST)
    (tmp_path / "new").rename(path)
    assert not lock.is_held()
    deadline = time.monotonic() + 60
    while not losses:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert "taken over by a run on host elsewhere, pid 7" in str(losses[0])
    lock.release()
    assert json.loads(path.read_text())["host"] == "elsewhere"  # neither removed nor written into
    assert json.loads(path.read_text())["beat"] == 1_000_000_000


def test_a_lock_that_was_removed_is_lost(tmp_path: Path) -> None:
    lock = take(tmp_path / ".lock")
    (tmp_path / ".lock").unlink()
    assert not lock.is_held()
    assert "its lock is gone" in str(lock.loss())
    lock.release()


def test_its_heartbeat_moves(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    lock = take(path)
    first = lock_file.read(path)
    deadline = time.monotonic() + 60
    while lock_file.read(path) == first or json.loads(path.read_text())["beat"] < 1_000_000_002:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    lock.release()


def test_who_takes_a_lock_over_and_dies_on_the_way_hinders_nobody(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    write_lock(path, **HERE, pids=[DEAD])
    write_lock(tmp_path / ".lock-0123abcd", **HERE, pids=[DEAD], id="4567")
    write_lock(tmp_path / ".lock-0123abcd-4567", **OTHER_HOST, id="89ab")
    take(path).release()
    assert list(tmp_path.iterdir()) == []


def test_who_takes_a_lock_over_without_end_is_named(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    write_lock(path, **HERE, pids=[DEAD])
    write_lock(tmp_path / ".lock-0123abcd", **HERE, pids=[ME], pid=os.getpid(), id="4567")
    with pytest.raises(RunLockedError, match=f"pid {os.getpid()}"):
        take(path)
