"""Writers of one machine finish a save by themselves; what the processes agree on later fits what they did."""

from __future__ import annotations

import base64
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.base import files, manifest
from launcher.checkpoint.engine import Checkpointer, Phase
from launcher.checkpoint.notes import FOLDER, Notes
from launcher.checkpoint.writer import Writer
from tests.faults.writer_group import Group

SIZES = pytest.mark.parametrize("world_size", [1, 2, 3])


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[[int], Group]]:
    made: list[Group] = []

    def group(world_size: int) -> Group:
        made.append(Group(tmp_path, world_size))
        return made[-1]

    yield group
    for one in made:
        one.close()


def _until(is_so: Callable[[], bool], seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.005)


def _answers_up_to_the_commit(member: Checkpointer) -> list[dict[str, Any]]:
    """What its writer says, which the member has not heard of."""
    said: list[dict[str, Any]] = []

    def has_committed() -> bool:
        said.extend(member._writer.poll(0.1))
        return any(answer["event"] == "committed" for answer in said)

    _until(has_committed)
    return said


def _names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


@SIZES
def test_a_save_is_whole_on_disk_before_the_step_that_follows_has_ended(
    make: Callable[[int], Group], world_size: int
) -> None:
    group = make(world_size)
    for step in (1, 2):
        for member in group.members:
            group_texts = {"state/state.json": "{}", "trainer_state.json": "{}"} if member is group.members[0] else {}
            member.save(step, group_texts, group.paths.checkpoint_dir(step))  # and no finish_snapshot
        folder = group.paths.checkpoint_dir(step)
        _until(folder.exists)
        assert manifest.verify(folder) == [] and not (folder / FOLDER).exists()
        assert group.finish().error is None
        assert all(member.phase is Phase.IDLE for member in group.members)
        group.tensor += 1
    assert _names(group.paths.root) == ["checkpoint-1", "checkpoint-2"]


def test_one_tick_is_enough_to_end_it(make: Callable[[int], Group]) -> None:
    group = make(2)
    group.save(1)
    for answer in _answers_up_to_the_commit(group.members[0]):
        group.members[0]._take(answer)
    result = group.tick()
    assert result is not None and result.error is None and result.num_bytes > 0
    assert group.members[1].phase is Phase.IDLE


@pytest.mark.parametrize("victim", [0, 1])
def test_a_writer_that_dies_behind_the_commit_costs_no_checkpoint(make: Callable[[int], Group], victim: int) -> None:
    group = make(2)
    group.save(1)
    _until(group.paths.checkpoint_dir(1).exists)
    pid = group.members[victim].writer_pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    time.sleep(0.2)
    result = group.finish()
    assert result.error is None and result.num_bytes > 0
    group.save(2)
    assert group.finish().error is None
    assert _names(group.paths.root) == ["checkpoint-1", "checkpoint-2"]


def test_the_main_writer_that_dies_before_its_answer_costs_no_checkpoint(
    make: Callable[[int], Group],
) -> None:
    group = make(2)
    main = group.members[0]
    group.save(1)
    for answer in _answers_up_to_the_commit(main):
        if answer["event"] != "committed":
            main._take(answer)
    assert main.writer_pid is not None
    os.kill(main.writer_pid, signal.SIGKILL)
    time.sleep(0.2)
    result = group.finish()
    assert result.error is None and result.num_bytes > 0
    assert _names(group.paths.root) == ["checkpoint-1"]


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_nothing_goes_ahead_without_the_part_of_a_writer_that_died(make: Callable[[int], Group], victim: int) -> None:
    group = make(3)
    group.save(1)
    assert group.finish().error is None
    pid = group.members[victim].writer_pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    group.save(2)
    time.sleep(0.3)
    os.kill(pid, signal.SIGKILL)
    assert group.finish().error is not None
    _until(lambda: [m.status() for m in group.members] != [] and _names(group.paths.root) == ["checkpoint-1"])
    time.sleep(0.6)  # longer than a writer waits between two looks
    assert _names(group.paths.root) == ["checkpoint-1"]
    group.save(2)
    assert group.finish().error is None
    assert _names(group.paths.root) == ["checkpoint-1", "checkpoint-2"]


def test_what_is_told_late_of_a_save_does_not_count_for_the_next_of_the_same_step(make: Callable[[int], Group]) -> None:
    """A run that went back to before a spike while a save was under way comes to its step again."""
    group = make(1)
    (member,) = group.members
    group.save(20)
    _until(group.paths.checkpoint_dir(20).exists)
    while member.phase is not Phase.HASHING:  # the commit is told, and not heard of
        member.advance(0, 0, 0)
    member.advance(0, 0, 1)
    time.sleep(0.3)  # so that its answers lie there
    files.remove_tree(group.paths.checkpoint_dir(20))
    group.tensor += 1
    group.save(20)
    assert group.finish().error is None
    assert manifest.verify(group.paths.checkpoint_dir(20)) == []


@pytest.mark.parametrize("has_said", [False, True], ids=["silent", "something else"])
def test_an_older_checkpoint_that_may_go_does_not_hide_a_death(make: Callable[[int], Group], has_said: bool) -> None:
    group = make(1)
    (member,) = group.members
    group.save(1)
    assert group.finish().error is None
    assert member.writer_pid is not None
    if has_said:
        member.expire([group.paths.root / "checkpoint-0"])
        time.sleep(0.3)  # the answer lies there
    os.kill(member.writer_pid, signal.SIGSTOP)
    group.save(2)
    os.kill(member.writer_pid, signal.SIGKILL)
    time.sleep(0.2)
    member.expire([group.paths.root / "checkpoint-0"])
    assert group.finish(10.0).error is not None
    member.settle()


@pytest.mark.parametrize("error", [OSError(24, "Too many open files"), MemoryError()])
def test_a_save_that_cannot_be_sent_has_failed(make: Callable[[int], Group], error: Exception) -> None:
    group = make(2)
    group.save(1)
    assert group.finish().error is None
    send = group.members[1]._writer.send

    def refuse(command: dict[str, Any]) -> None:
        if command["cmd"] == "write":
            raise error
        send(command)

    group.members[1]._writer.send = refuse  # type: ignore[method-assign]
    group.save(2)
    assert group.finish(10.0).error is not None
    group.members[1]._writer.send = send  # type: ignore[method-assign]
    group.save(2)
    assert group.finish().error is None


# --------------------------------------------------------------------------- one writer's side, command by command


def _command(root: Path, step: int, rank: int, world_size: int, identity: str = "1") -> dict[str, Any]:
    folder, path = root / f".tmp-checkpoint-{step}", f"model-{rank}.safetensors"
    commit = {
        "cmd": "commit", "step": step, "dir": str(folder), "target": str(root / f"checkpoint-{step}"),
        "world_size": world_size, "zero_stage": 0, "files": [path],
    }  # fmt: skip
    return {
        "cmd": "write", "step": step, "dir": str(folder), "files": {path: 4},
        "heads": {path: base64.b64encode(b"head").decode()}, "ranges": [], "texts": {}, "statics": False,
        "ahead": {"identity": identity, "rank": rank, "world_size": world_size, "files": [path],
                  "commit": commit if rank == 0 else None},
    }  # fmt: skip


def _answers(writer: Writer, times: int = 3) -> list[dict[str, Any]]:
    return [answer for _ in range(times) if writer.look_s is not None for answer in writer.go_ahead()]


def test_a_save_that_was_given_up_is_taken_back_if_it_got_its_name(tmp_path: Path) -> None:
    writer, command = Writer(memoryview(b"")), _command(tmp_path, 5, 0, 1)
    writer.execute(command)
    assert [a["event"] for a in _answers(writer)] == ["committed"]
    assert _names(tmp_path) == ["checkpoint-5"]
    given_up = {"cmd": "discard", "step": 5, "dir": command["dir"], "target": str(tmp_path / "checkpoint-5")}
    assert writer.execute(given_up)[0]["event"] == "discarded"
    assert _names(tmp_path) == []


def test_what_a_writer_committed_before_does_not_count_for_the_same_step_again(tmp_path: Path) -> None:
    """A run that went back to before a spike saves a step a second time."""
    writer, command = Writer(memoryview(b"")), _command(tmp_path, 5, 0, 1)
    writer.execute(command)
    _answers(writer)
    files.remove_tree(tmp_path / "checkpoint-5")
    del command["ahead"]
    writer.execute(command)
    hashed = writer.execute({"cmd": "hash", "step": 5, "dir": command["dir"], "files": list(command["files"])})
    commit = {**_command(tmp_path, 5, 0, 1)["ahead"]["commit"], "hashed": hashed[0]["entries"]}
    assert writer.execute(commit)[0]["event"] == "committed"
    assert manifest.verify(tmp_path / "checkpoint-5") == []


def test_the_commands_find_done_what_was_done_ahead(tmp_path: Path) -> None:
    writers = [Writer(memoryview(b"")), Writer(memoryview(b""))]
    commands = [_command(tmp_path, 5, rank, 2) for rank in range(2)]
    for writer, command in zip(writers, commands, strict=True):
        writer.execute(command)
    _answers(writers[1])
    ahead = _answers(writers[0])
    assert [a["event"] for a in ahead] == ["committed"] and ahead[0]["ahead"]
    assert writers[1].look_s is None, "it looks for what nobody will write"
    entries = []
    for writer, command in zip(writers, commands, strict=True):
        told = {"cmd": "hash", "step": 5, "dir": command["dir"], "files": list(command["files"])}
        answer = writer.execute(told)[0]
        assert answer["event"] == "hashed"
        entries += answer["entries"]
    answer = writers[0].execute({**commands[0]["ahead"]["commit"], "hashed": entries})[0]
    assert answer["event"] == "committed" and answer["bytes"] == ahead[0]["bytes"]


def test_a_block_that_lost_bytes_fails_the_command_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer, command = Writer(memoryview(b"")), _command(tmp_path, 5, 0, 1)
    writer.execute(command)
    (path,) = (Path(command["dir"]) / name for name in command["files"])
    path.write_bytes(b"HEAD")
    assert _answers(writer) == [] and writer.look_s is None
    told = {"cmd": "hash", "step": 5, "dir": command["dir"], "files": list(command["files"])}
    answer = writer.execute(told)[0]
    assert answer["event"] == "failed" and "not what was written" in answer["error"]


def test_notes_of_another_attempt_do_not_count(tmp_path: Path) -> None:
    writer, command = Writer(memoryview(b"")), _command(tmp_path, 5, 0, 2)
    writer.execute(command)
    Notes(Path(command["dir"]), "0", 1, 2).leave("written")
    assert _answers(writer) == [] and writer.look_s is not None
    assert _names(tmp_path) == [".tmp-checkpoint-5"]


def test_a_save_that_was_discarded_does_not_come_back(tmp_path: Path) -> None:
    writers = [Writer(memoryview(b"")), Writer(memoryview(b""))]
    commands = [_command(tmp_path, 5, rank, 2) for rank in range(2)]
    for writer, command in zip(writers, commands, strict=True):
        writer.execute(command)
    writers[0].execute({"cmd": "discard", "step": 5, "dir": commands[0]["dir"], "target": str(tmp_path / "no")})
    assert _answers(writers[1]) == [] and writers[1].look_s is None
    assert _names(tmp_path) == []


def test_nothing_of_the_notes_gets_into_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS renames what is deleted while somebody has it open."""
    writers = [Writer(memoryview(b"")), Writer(memoryview(b""))]
    commands = [_command(tmp_path, 5, rank, 2) for rank in range(2)]
    for writer, command in zip(writers, commands, strict=True):
        writer.execute(command)
    _answers(writers[1])
    unlink, hidden = os.unlink, ".nfs0001"

    def rename_instead(name: str, *, dir_fd: int | None = None) -> None:
        if name.startswith("hashed-1-1"):
            os.rename(name, hidden, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
        elif name != hidden:
            unlink(name, dir_fd=dir_fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", rename_instead)
        assert _answers(writers[0]) == []
    assert not (tmp_path / "checkpoint-5").exists()
    entries = []
    for writer, command in zip(writers, commands, strict=True):
        told = {"cmd": "hash", "step": 5, "dir": command["dir"], "files": list(command["files"])}
        entries += writer.execute(told)[0]["entries"]
    assert writers[0].execute({**commands[0]["ahead"]["commit"], "hashed": entries})[0]["event"] == "committed"
    folder = tmp_path / "checkpoint-5"
    assert manifest.verify(folder) == [] and not [p for p in manifest.read(folder).paths if FOLDER in p]


def test_an_error_ahead_is_told_by_the_command(tmp_path: Path) -> None:
    writer, command = Writer(memoryview(b"")), _command(tmp_path, 5, 0, 1)
    writer.execute(command)
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-5" / "mine").write_text("somebody's")
    assert _answers(writer) == [] and writer.look_s is None
    hashed = writer.execute({"cmd": "hash", "step": 5, "dir": command["dir"], "files": list(command["files"])})
    answer = writer.execute({**command["ahead"]["commit"], "hashed": hashed[0]["entries"]})[0]
    assert answer["event"] == "failed" and "not of this run" in answer["error"]
    assert (tmp_path / "checkpoint-5" / "mine").read_text() == "somebody's"
