"""What may be read of a folder that comes from elsewhere."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launcher.base import files
from launcher.base.errors import UnsafeFileError
from launcher.base.inner_files import inner_file, is_inner_path, read_json_object


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "received"
    (made / "state").mkdir(parents=True)
    (made / "state" / "a.json").write_text("{}")
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "key").write_text("secret")
    return made


def test_files_of_the_folder_are_found(folder: Path) -> None:
    assert inner_file(folder, "state/a.json") == folder / "state" / "a.json"
    with pytest.raises(FileNotFoundError):
        inner_file(folder, "state/b.json")


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "/etc/passwd", "a//b", "a/./b", "a/../b", "a\nb", "a\0", "a/"])
def test_names_that_lead_out_are_refused(folder: Path, name: str) -> None:
    assert not is_inner_path(name)
    with pytest.raises(UnsafeFileError):
        inner_file(folder, name)


@pytest.mark.parametrize("target", ["../private/key", "state/a.json", "/etc/passwd", "nowhere"])
def test_links_are_refused_wherever_they_lead(folder: Path, target: str) -> None:
    (folder / "link").symlink_to(target)
    with pytest.raises(UnsafeFileError, match="is a link"):
        inner_file(folder, "link")


def test_links_are_refused_when_a_folder_is_one(folder: Path) -> None:
    (folder / "other").symlink_to("../private")
    with pytest.raises(UnsafeFileError, match="other is a link"):
        inner_file(folder, "other/key")


def test_pipes_do_not_hang(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    with pytest.raises(UnsafeFileError, match="no regular file"):
        inner_file(folder, "pipe")
    with pytest.raises(OSError, match="is a pipe"):
        files.read_bytes(folder / "pipe", 10)


def test_large_or_odd_json_is_refused(folder: Path) -> None:
    path = folder / "x.json"
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"nested|JSON"):
        read_json_object(path)
    path.write_text("[1]")
    with pytest.raises(ValueError, match="no JSON object"):
        read_json_object(path)
    with pytest.raises(OSError, match="longer than 2 bytes"):
        files.read_bytes(path, 2)


def test_snapshot_of_the_hub_cache_is_read_when_its_links_stay_inside(tmp_path: Path) -> None:
    repo = tmp_path / "hub" / "models--org--name"
    snapshot = repo / "snapshots" / "abc"
    for made in (snapshot / "sub", repo / "blobs", tmp_path / "hub" / "blobs" / "ab"):
        made.mkdir(parents=True)
    (repo / "blobs" / "one").write_text("1")
    shared = tmp_path / "hub" / "blobs" / "ab" / ("ab" * 32)
    shared.write_text("2")
    (repo / "blobs" / "two").symlink_to(f"../../blobs/ab/{'ab' * 32}")
    (snapshot / "one").symlink_to("../../blobs/one")
    (snapshot / "sub" / "two").symlink_to("../../../blobs/two")
    assert inner_file(snapshot, "one").read_text() == "1"
    assert inner_file(snapshot, "sub/two") == shared
    (tmp_path / "secret").write_text("secret")
    (repo / "blobs" / "three").symlink_to("../../../secret")
    for name, target in (("three", "../../blobs/three"), ("four", "../../../../secret"), ("five", "../../other")):
        (snapshot / name).symlink_to(target)
        with pytest.raises(UnsafeFileError):
            inner_file(snapshot, name)
