"""The file layer: links, pipes and planted names are refused; nothing outside is read, written or deleted."""

from __future__ import annotations

import errno
import json
import os
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.base import files, json_lines
from launcher.base.block_io import RangeWriter
from launcher.base.errors import UserError
from launcher.base.full_disk import rewrite_json
from launcher.base.paths import RunPaths
from launcher.train.metrics import MetricsFile


@pytest.fixture
def run(tmp_path: Path) -> Path:
    made = tmp_path / "run"
    (made / "checkpoint-1" / "state").mkdir(parents=True)
    (made / "checkpoint-1" / "state" / "state.json").write_text("{}")
    return made


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    made = tmp_path / "elsewhere"
    (made / "deep" / "er").mkdir(parents=True)
    for name in ("a", "deep/b", "deep/er/c"):
        (made / name).write_text("precious")
    return made


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# --------------------------------------------------------------------------- deleting


@pytest.mark.parametrize("name", ["elsewhere", "elsewhere/deep", "elsewhere/a", "nowhere"])
def test_only_the_link_goes_when_a_link_is_deleted(run: Path, elsewhere: Path, name: str) -> None:
    before = contents(elsewhere)
    (run / ".tmp-checkpoint-7").symlink_to(run.parent / name)
    files.remove_tree(run / ".tmp-checkpoint-7")
    assert not files.is_taken(run / ".tmp-checkpoint-7")
    assert contents(elsewhere) == before


def test_links_inside_are_deleted_and_not_walked(run: Path, elsewhere: Path) -> None:
    before = contents(elsewhere)
    tree = run / ".tmp-checkpoint-7"
    (tree / "state").mkdir(parents=True)
    (tree / "model.safetensors").symlink_to(elsewhere / "a")
    (tree / "state" / "more").symlink_to(elsewhere / "deep")
    (tree / "own").write_text("x")
    os.mkfifo(tree / "state" / "pipe")
    files.remove_tree(tree)
    assert not files.is_taken(tree)
    assert contents(elsewhere) == before


def test_nothing_is_deleted_when_a_folder_above_is_a_link(run: Path, elsewhere: Path) -> None:
    before = contents(elsewhere)
    (run / "imported").symlink_to(elsewhere)
    with pytest.raises(OSError, match="imported is a link"):
        files.remove_tree(run / "imported" / "deep", within=run)
    assert contents(elsewhere) == before


def test_nothing_outside_is_deleted_when_a_folder_becomes_a_link_meanwhile(
    run: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each operation in turn, the folder that is being deleted is moved away and a link put in its place."""
    before = contents(elsewhere)
    for at in range(8):
        tree = run / f".tmp-checkpoint-{at}"
        (tree / "deep" / "er").mkdir(parents=True)
        for name in ("a", "deep/b", "deep/er/c"):
            (tree / name).write_text("ours")
        count = 0

        def swap(name: str, path: Path, at: int = at, tree: Path = tree) -> None:
            nonlocal count
            count += 1
            if count == at:
                tree.rename(tree.with_name(f"moved-{at}"))
                tree.symlink_to(elsewhere)

        monkeypatch.setattr(files, "on_operation", swap)
        files.remove_tree(tree)
        assert contents(elsewhere) == before


def test_trees_that_no_run_makes_are_refused_when_deleted(run: Path) -> None:
    folder = run / ".tmp-checkpoint-7"
    (folder / "/".join("x" * 100)).mkdir(parents=True)
    with pytest.raises(OSError, match="folders in each other"):
        files.remove_tree(folder)
    with pytest.raises(OSError, match="folders in each other"):
        files.list_files(folder)


# --------------------------------------------------------------------------- writing

WRITES: dict[str, Callable[[Path, Path], Any]] = {
    "write_file": lambda path, root: files.write_file(path, b"new", within=root),
    "replace_file": lambda path, root: files.replace_file(path, b"new", within=root),
    "write_json": lambda path, root: files.write_json(path, [], within=root),
    "append": lambda path, root: files.open_append(path, within=root).close(),
    "copy": lambda path, root: files.copy_file(root / "checkpoint-1" / "state" / "state.json", path, within=root),
    "exclusive": lambda path, root: os.close(files.create_exclusive(path, within=root)),
    "ranges": lambda path, root: RangeWriter(path, 10, within=root).close(),
}


@pytest.mark.parametrize("kind", ["link", "hard link", "pipe", "folder link"])
@pytest.mark.parametrize("write", WRITES)
def test_nothing_outside_is_written_when_a_name_was_planted(run: Path, elsewhere: Path, write: str, kind: str) -> None:
    before = contents(elsewhere)
    path = run / "planted"
    if kind == "link":
        path.symlink_to(elsewhere / "a")
    elif kind == "hard link":
        path.hardlink_to(elsewhere / "a")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(elsewhere)
        path = path / "new"
    try:
        WRITES[write](path, run)
    except OSError as error:
        assert str(error)
    else:
        assert write in ("write_file", "replace_file", "write_json", "copy", "append") and path.is_file()
    assert contents(elsewhere) == before


def test_a_replacement_cannot_be_foreseen(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(files, "on_operation", lambda name, path: seen.append(path.name) if name == "write" else None)
    files.replace_file(run / "run.json", b"1")
    files.replace_file(run / "run.json", b"2")
    assert len(set(seen)) == 2 and (run / "run.json").read_bytes() == b"2"
    assert [p.name for p in run.iterdir() if p.name.startswith(".")] == []


def test_file_modes_are_kept_when_asked_for(run: Path) -> None:
    files.write_json(run / "private.json", {}, mode=0o600)
    assert (run / "private.json").stat().st_mode & 0o777 == 0o600


def test_no_descriptor_is_left_when_a_file_cannot_be_made_long_enough(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "ftruncate", full)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        with pytest.raises(OSError, match="No space"):
            RangeWriter(run / "model.safetensors", 10)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


# --------------------------------------------------------------------------- reading


@pytest.mark.parametrize("kind", ["link", "folder link", "pipe", "socket", "folder", "dots"])
def test_odd_files_are_named_and_not_opened(run: Path, elsewhere: Path, kind: str) -> None:
    path = run / "planted"
    if kind == "link":
        path.symlink_to(elsewhere / "a")
    elif kind == "folder link":
        path.symlink_to(elsewhere)
        path = path / "a"
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        made = socket.socket(socket.AF_UNIX)
        made.bind(str(path))
        made.close()
    elif kind == "folder":
        path.mkdir()
    else:
        path = run / "checkpoint-1" / ".." / ".." / "elsewhere" / "a"
    with pytest.raises(OSError, match=r"planted|elsewhere"):
        files.open_read(path, within=run)
    assert files.read_json_or(path, {"missing": True}, within=run) == {"missing": True}
    assert list(json_lines.read(path, within=run)) == []


def test_the_folder_itself_may_be_reached_through_links(run: Path) -> None:
    (run.parent / "scratch").symlink_to(run)
    (run.parent / "linked").symlink_to(run / "checkpoint-1")
    for root, name in ((run.parent / "scratch", "checkpoint-1/state"), (run.parent / "linked", "state")):
        assert files.read_json(root / name / "state.json", within=root) == {}


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, "[" * 101 + "]" * 101, '{"a":' * 500 + "1" + "}" * 500, '"\\ud800"', "", "{", "1" * 5000, "\0"],
)
def test_json_that_no_program_writes_is_a_value_error(run: Path, text: str) -> None:
    (run / "x.json").write_text(text)
    with pytest.raises(ValueError):
        files.read_json(run / "x.json")
    assert files.read_json_or(run / "x.json", {}) == {}
    (run / "x.jsonl").write_text(f'{text}\n{{"step": 1}}\n')
    assert list(json_lines.read(run / "x.jsonl"))[-1:] == [{"step": 1}]


def test_json_is_read_up_to_its_bounds(run: Path) -> None:
    for text, value in (('"\\ud83d\\ude00"', "\U0001f600"), ("[" * 100 + "]" * 100, ...), ("NaN", ...)):
        (run / "x.json").write_text(text)
        assert value in (files.read_json(run / "x.json"), ...)
    with pytest.raises(OSError, match="longer than 2 bytes"):
        files.read_json(run / "x.json", max_bytes=2)


@pytest.mark.parametrize("name", ["logs", "run.json", "metrics.jsonl", "config.yaml", "logs/samples.jsonl"])
def test_a_start_is_refused_when_something_else_stands_in_the_place_of_a_runs_own(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine") if name == "logs" else path.mkdir()
    wanted = "a folder" if name == "logs" else "a file"
    with pytest.raises(UserError, match=re.escape(f"{path} is there, and a run has {wanted} of that name")):
        RunPaths(tmp_path).refuse_links()
    path.unlink() if name == "logs" else path.rmdir()
    RunPaths(tmp_path).refuse_links()


@pytest.mark.parametrize("block", [1, 3, 7, 64, 2**16])
def test_lines_are_the_same_backwards(run: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(json_lines, "_BACKWARDS_BYTES", block)
    path = run / "x.jsonl"
    for text in ("", "\n", '{"step": 1}', '{"step": 1}\n{"a": "\u00e9"}\nx\n\n{"step": 3, "a": 1}\n{"ste'):
        path.write_text(text)
        assert list(json_lines.read_backwards(path)) == list(json_lines.read(path))[::-1]
    assert list(json_lines.read_backwards(path, "step")) == [{"step": 3, "a": 1}, {"step": 1}]
    assert list(json_lines.read_backwards(run / "none.jsonl")) == []


@pytest.mark.parametrize("size", [0, 1, 999, 1000, 1001, 300_000])
def test_content_is_read_whole_or_refused_when_it_is_longer_than_allowed(tmp_path: Path, size: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * size)
    if size <= 1000:
        assert files.read_bytes(path, 1000) == b"x" * size
        return
    with pytest.raises(OSError, match="longer than 1,000 bytes"):
        files.read_bytes(path, 1000)


def test_content_is_read_whole_when_a_file_tells_no_size() -> None:
    path = Path("/proc/self/maps")
    assert path.stat().st_size == 0
    text = files.read_bytes(path, 2**24)
    assert len(text) > 1000 and text.endswith(b"\n")
    with pytest.raises(OSError, match="longer than 100 bytes"):
        files.read_bytes(path, 100)


# --------------------------------------------------------------------------- full disks


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bytes `os.write` may still write in all; a long write is cut off first, as a file system does it."""
    room, write = [10**9], os.write

    def limited(fd: int, data: bytes) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = write(fd, data[: room[0]])
        room[0] -= written
        return written

    monkeypatch.setattr(os, "write", limited)
    return room


def test_lines_are_added_whole_or_not_at_all_when_the_disk_is_full(tmp_path: Path, disk: list[int]) -> None:
    """What followed was glued to the half line, and both were lost to every reader."""
    path = tmp_path / "lines"
    json_lines.append(path, b'{"a": 1}\n')
    disk[0] = 5
    with pytest.raises(OSError, match="No space"):
        json_lines.append(path, b'{"a": 2}\n{"a": 3}\n')
    assert path.read_bytes() == b'{"a": 1}\n'
    disk[0] = 10**9
    json_lines.append(path, b'{"a": 4}\n', max_bytes=18)
    json_lines.append(path, b'{"a": 5}\n', max_bytes=18)
    assert path.read_bytes() == b'{"a": 1}\n{"a": 4}\n'


def test_a_line_of_its_own_is_begun_when_the_one_before_was_cut_off(tmp_path: Path) -> None:
    (tmp_path / "lines").write_bytes(b'{"a": 1}\n{"a"')
    json_lines.append(tmp_path / "lines", b'{"a": 2}\n')
    assert list(json_lines.read(tmp_path / "lines")) == [{"a": 1}, {"a": 2}]


def test_what_a_full_disk_refused_of_the_metrics_is_written_later(tmp_path: Path, disk: list[int]) -> None:
    """A line per logged step: those of an hour without room were missing from the curves for ever."""
    metrics, path = MetricsFile(tmp_path / "metrics.jsonl"), tmp_path / "metrics.jsonl"
    metrics.append({"step": 1, "loss": 1.0})
    disk[0] = 10
    for step in (2, 3, 4):
        metrics.append({"step": step, "loss": 1.0})
    assert [line["step"] for line in json_lines.read(path)] == [1]
    metrics.trim(3)
    disk[0] = 10**9
    metrics.write_refused()
    metrics.append({"step": 4, "loss": 2.0})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]


def test_how_a_run_ended_is_told_when_no_new_file_can_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """run.json went on saying `running`, so that a run that had stopped as asked was started again."""
    path = tmp_path / "run.json"
    files.write_json(path, {"state": "running", "text": "x" * 500})

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "write_file", full)
    rewrite_json(path, {"state": "interrupted"})
    assert json.loads(path.read_text()) == {"state": "interrupted"}
    rewrite_json(path, {"state": "interrupted", "text": "y" * 1000})
    assert files.read_json(path)["text"] == "y" * 1000
    with pytest.raises(OSError, match="No space"):
        rewrite_json(path, {"text": "z" * 10_000})
    assert files.read_json(path)["state"] == "interrupted"


def test_folder_is_left_to_its_file_system_when_that_knows_no_fsync_of_folders(tmp_path: Path) -> None:
    files.fsync_dir(Path("/proc/self"))
    with pytest.raises(OSError, match="No such file"):
        files.fsync_dir(tmp_path / "missing")
