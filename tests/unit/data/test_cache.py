"""The token cache: built once, rebuilt where it is damaged or half, whole whatever dies or races."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launcher.base import files
from launcher.data import Data
from launcher.data import cache as cache_module
from launcher.data.cache import TokenStore, build_store, is_whole, open_store
from launcher.data.file_hashes import FileHashes
from launcher.data.formats import Formatter
from launcher.data.readers import Meter
from launcher.data.sources import FileSource
from launcher.data.tokenizer import byte_tokenizer, tokenizer_key

Make = Callable[..., Data]
Write = Callable[..., str]
TEXTS = ["one", "two", "three"]


@pytest.fixture
def source(write_rows: Write) -> FileSource:
    return FileSource((Path(write_rows([{"text": text} for text in TEXTS])),))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "tokens" / "key"


def build(folder: Path, source: FileSource) -> TokenStore:
    build_store(folder, source, Formatter(byte_tokenizer(), 100, None), on_bad_row="stop")
    store = open_store(folder)
    assert store is not None
    return store


def contents(store: TokenStore) -> list[str]:
    bounds = zip(store.offsets[:-1], store.offsets[1:], strict=True)
    return [bytes(store.tokens[start : end - 1].tolist()).decode() for start, end in bounds]


class CountingSource(FileSource):
    """Counts how often it is read."""

    reads = 0

    def batches(self, meter: Meter) -> Any:
        type(self).reads += 1
        return super().batches(meter)


def test_store_holds_the_rows(folder: Path, source: FileSource) -> None:
    store = build(folder, source)
    assert contents(store) == TEXTS
    assert store.labelled.tolist() == [len(text) for text in TEXTS]
    assert store.numbers.tolist() == [0, 1, 2]
    assert store.tokens.dtype == np.uint16
    assert [path.name for path in folder.parent.iterdir() if path.name.startswith(".tmp")] == []


def test_store_is_not_built_again(folder: Path, source: FileSource) -> None:
    counting = CountingSource(source.paths)
    CountingSource.reads = 0
    build(folder, counting)
    build(folder, counting)
    assert CountingSource.reads == 1


@pytest.mark.parametrize("name", ["tokens.bin", "mask.bin", "offsets.bin", "labelled.bin", "numbers.bin", "meta.json"])
@pytest.mark.parametrize("damage", ["missing", "short", "flipped"])
def test_store_is_rebuilt_when_damaged(folder: Path, source: FileSource, name: str, damage: str) -> None:
    build(folder, source)
    path = folder / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "short":
        path.write_bytes(content[:-1] if name != "meta.json" else content[: len(content) // 2])
    else:
        middle = content.index(b'"sha256": "') + 12 if name == "meta.json" else len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    assert not is_whole(folder)
    assert contents(build(folder, source)) == TEXTS
    assert is_whole(folder)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('"files"', '"folders"'), ('"report"', '"reports"'), ('"num_kept"', '"num_keep"'), ('"uint16"', '"uint99"'),
        ('"uint16"', '"uint32"'), ('"bytes"', '"octets"'), ('"tokens.bin"', '"tokens.txt"'), ('"uint16"', "[]"),
    ],
)  # fmt: skip
def test_store_is_rebuilt_when_its_meta_says_something_else(
    folder: Path, source: FileSource, before: str, after: str
) -> None:
    build(folder, source)
    meta = (folder / "meta.json").read_text()
    assert before in meta
    (folder / "meta.json").write_text(meta.replace(before, after))
    assert contents(build(folder, source)) == TEXTS


@pytest.mark.parametrize("target", ["nowhere", "file", "folder"])
def test_store_is_rebuilt_when_a_link_stands_in_its_place(folder: Path, source: FileSource, target: str) -> None:
    (folder.parent / "other").mkdir(parents=True)
    (folder.parent / "file").touch()
    folder.symlink_to({"nowhere": "nowhere", "file": "file", "folder": "other"}[target])
    assert contents(build(folder, source)) == TEXTS
    assert (folder.parent / "other").is_dir() and (folder.parent / "file").is_file()


def test_store_is_rebuilt_when_its_format_is_older(folder: Path, source: FileSource) -> None:
    build(folder, source)
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | {"format_version": 0}))
    assert contents(build(folder, source)) == TEXTS


class Killed(BaseException):
    """Stands for a process that is gone: nothing of its own runs afterwards."""


def test_store_is_whole_or_absent_when_the_builder_dies_at_any_operation(
    folder: Path, source: FileSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise 1: a kill at any moment. A dead builder cleans nothing up, so its leftovers stay for the next one."""
    monkeypatch.setattr(cache_module, "remove_tree", lambda path: None)
    operations = 0

    def count(name: str, path: Path) -> None:
        nonlocal operations
        operations += 1

    monkeypatch.setattr(files, "on_operation", count)
    build(folder, source)
    assert operations > 5
    for kill_at in range(operations):
        shutil.rmtree(folder)
        left = iter(range(operations))

        def die(name: str, path: Path, left: Any = left, kill_at: int = kill_at) -> None:
            if next(left) == kill_at:
                raise Killed

        monkeypatch.setattr(files, "on_operation", die)
        with pytest.raises(Killed):
            build(folder, source)
        assert not folder.exists() or is_whole(folder)
        monkeypatch.setattr(files, "on_operation", None)
        assert contents(build(folder, source)) == TEXTS


def test_leftovers_of_a_dead_builder_are_removed(folder: Path, source: FileSource) -> None:
    left = folder.parent / f".tmp-key-{os.uname().nodename}-dead"
    left.mkdir(parents=True)
    other_host = folder.parent / ".tmp-key-elsewhere-dead"
    other_host.mkdir()
    build(folder, source)
    assert [path.name for path in folder.parent.iterdir()] == ["key"]


def test_store_when_another_host_is_faster(folder: Path, source: FileSource, monkeypatch: pytest.MonkeyPatch) -> None:
    """Locks do not reach over every shared file system: the first rename wins, the second copy goes."""
    build(folder, source)
    shutil.move(folder, folder.with_name("theirs"))
    rename = cache_module.rename

    def slower(temporary: Path, target: Path) -> None:
        shutil.move(folder.with_name("theirs"), target)
        rename(temporary, target)

    monkeypatch.setattr(cache_module, "rename", slower)
    assert contents(build(folder, source)) == TEXTS
    assert [path.name for path in folder.parent.iterdir() if path.name.startswith(".tmp")] == []


def test_store_when_several_builders_start_at_once(folder: Path, write_rows: Write) -> None:
    """Jobs of a sweep start together."""
    counting = CountingSource((Path(write_rows([{"text": text} for text in TEXTS * 300])),))
    CountingSource.reads = 0
    start = threading.Barrier(4)

    def build_at_start() -> list[str]:
        start.wait()
        return contents(build(folder, counting))

    with ThreadPoolExecutor(4) as pool:
        built = [future.result() for future in [pool.submit(build_at_start) for _ in range(4)]]
    assert built == [TEXTS * 300] * 4
    assert CountingSource.reads == 1
    assert is_whole(folder)


# ---------------------------------------------------------------------- keys


def test_cache_key_follows_content_and_settings(make_data: Make, write_rows: Write, tmp_path: Path) -> None:
    file = write_rows([{"text": "abc"}])

    def num_stores() -> int:
        return len([path for path in (tmp_path / "cache" / "tokens").iterdir() if path.is_dir()])

    make_data(train_files=[file])
    make_data(train_files=[file])
    make_data(train_files=[write_rows([{"text": "abc"}], "copy.jsonl")], packing=True)
    assert num_stores() == 1
    make_data(train_files=[file], max_length=50)
    write_rows([{"text": "abd"}])
    make_data(train_files=[file])
    template = byte_tokenizer()
    template.chat_template = "{{ messages }}"
    make_data(train_files=[file], tokenizer=template)
    assert num_stores() == 4


def test_tokenizer_key_does_not_follow_its_use(tokenizer: Any) -> None:
    """Padding leaves a trace in the tokenizer's own file."""
    before = tokenizer_key(tokenizer)
    tokenizer(["a", "bc"], padding=True, truncation=True, max_length=4)
    assert tokenizer_key(tokenizer) == before == tokenizer_key(byte_tokenizer())


def test_file_hash_is_remembered_until_the_file_changes(tmp_path: Path) -> None:
    path, hashes = tmp_path / "data.jsonl", FileHashes(tmp_path / "cache")
    path.write_text("abc")
    os.utime(path, (1, 1))
    first = hashes.sha256(path)
    known = json.loads((tmp_path / "cache" / "file-hashes.json").read_text())
    assert list(known) == [str(path)]
    path.write_text("abd")
    assert hashes.sha256(path) != first


def test_file_hash_is_not_remembered_when_the_file_is_fresh(tmp_path: Path) -> None:
    """It may change again within one tick of the file system's clock, with the same size."""
    path, hashes = tmp_path / "data.jsonl", FileHashes(tmp_path / "cache")
    path.write_text("abc")
    hashes.sha256(path)
    assert not (tmp_path / "cache" / "file-hashes.json").exists()


def test_file_hash_when_its_memory_is_broken(tmp_path: Path) -> None:
    path, hashes = tmp_path / "data.jsonl", FileHashes(tmp_path)
    path.write_text("abc")
    os.utime(path, (1, 1))
    (tmp_path / "file-hashes.json").write_text("[1")
    digest = hashes.sha256(path)
    assert hashes.sha256(path) == digest
