"""Tokenising by several processes: the same bytes, named ends, no hang; one builder per cache."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.base.errors import ConfigError, DataError, StopAskedError
from launcher.base.lock import RunLock
from launcher.data import encoding, readers
from launcher.data.cache import build_store, is_whole, open_store
from launcher.data.formats import Formatter
from launcher.data.sources import FileSource, GeneratorSource
from launcher.data.tokenising_display import TokenisingDisplay
from launcher.data.tokenizer import byte_tokenizer

from .conftest import PLAIN_TEMPLATE, chat

Write = Callable[..., str]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers from the first second on, for batches of a few rows."""
    monkeypatch.setattr(encoding, "_ALONE_S", 0.0)
    monkeypatch.setattr(readers, "MAX_BATCH_ROWS", 7)


def rows(num: int) -> Iterator[Any]:
    draw = random.Random(3)
    for i in range(num):
        yield chat(*(f"{i} " * draw.randint(1, 9) for _ in range(2 * draw.randint(1, 3))))
        if i % 11 == 0:
            yield "{broken"
        if i % 13 == 0:
            yield chat("q" * 300, "never seen")


def formatter(template: str | None = None) -> Formatter:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template or tokenizer.chat_template
    return Formatter(tokenizer, 120, None)


def build(folder: Path, file: str, num_workers: int, **more: Any) -> dict[str, bytes]:
    build_store(folder, FileSource((Path(file),)), formatter(**more), on_bad_row="skip", num_workers=num_workers)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("template", [None, PLAIN_TEMPLATE])
def test_store_is_the_same_when_tokenised_by_any_number_of_processes(
    tmp_path: Path, write_rows: Write, template: str | None
) -> None:
    file = write_rows(rows(150))
    alone = build(tmp_path / "tokens" / "1", file, 1, template=template)
    for num_workers in (2, 3, 4):
        assert build(tmp_path / "tokens" / str(num_workers), file, num_workers, template=template) == alone
    store = open_store(tmp_path / "tokens" / "1")
    assert store is not None and store.report.num_bad == 14
    assert store.report.problems[1].startswith(f"{file}:15: invalid JSON")
    assert not multiprocessing.active_children()


def test_bad_rows_are_named_when_workers_find_them(tmp_path: Path, write_rows: Write) -> None:
    file = write_rows([*(chat("q", "a") for _ in range(40)), "{broken"])
    with pytest.raises(DataError, match=rf"{file}:41: invalid JSON"):
        build_store(tmp_path / "tokens" / "1", FileSource((Path(file),)), formatter(), on_bad_row="stop", num_workers=2)


def test_settings_that_do_not_fit_are_named_when_workers_find_them(tmp_path: Path, write_rows: Write) -> None:
    file = write_rows([*(chat("q", "a") for _ in range(40)), {"text": "no chat"}])
    with pytest.raises(ConfigError, match="completion_only_loss=true needs messages") as caught:
        build_store(
            tmp_path / "tokens" / "1", FileSource((Path(file),)), Formatter(byte_tokenizer(), 100, True),
            on_bad_row="stop", num_workers=2,
        )  # fmt: skip
    assert len(caught.value.problems) == 1


def kill_workers(number: int) -> int:
    children = multiprocessing.active_children()
    for child in children:
        assert child.pid is not None
        os.kill(child.pid, number)
    return len(children)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_worker_is_named(tmp_path: Path, write_rows: Write, number: signal.Signals) -> None:
    calls = 0

    def alive() -> None:
        nonlocal calls
        calls += kill_workers(number) if calls == 0 else 0

    with pytest.raises(DataError, match=rf"worker process \d+ was killed by {number.name}.*data.dataset_num_proc=1"):
        build_store(
            tmp_path / "tokens" / "1", FileSource((Path(write_rows(rows(400))),)), formatter(), on_bad_row="skip",
            num_workers=3, display=TokenisingDisplay(alive=alive),
        )  # fmt: skip
    assert not multiprocessing.active_children()
    assert [path.name for path in (tmp_path / "tokens").iterdir()] == []


class Slow(Formatter):
    """Stands for a row of gigabytes: one call does not come back."""

    def encode(self, rows: Any) -> Any:
        if multiprocessing.parent_process() is not None:
            time.sleep(60)
        return super().encode(rows)


def test_a_request_to_stop_is_obeyed_when_workers_are_busy(tmp_path: Path, write_rows: Write) -> None:
    began = time.monotonic()

    def alive() -> None:
        if time.monotonic() > began + 0.5:
            raise StopAskedError("signal")

    with pytest.raises(StopAskedError):
        build_store(
            tmp_path / "tokens" / "1", FileSource((Path(write_rows(rows(100))),)), Slow(byte_tokenizer(), 100, None),
            on_bad_row="skip", num_workers=2, display=TokenisingDisplay(alive=alive),
        )  # fmt: skip
    assert time.monotonic() - began < 30, "until a call came back"
    assert not multiprocessing.active_children()


def large_rows(split: str) -> Iterator[dict[str, str]]:
    return ({"text": "x" * 2000} for _ in range(40))


def test_what_is_in_flight_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are streamed: no more batches are read than the workers need."""
    monkeypatch.setattr(readers, "MAX_BATCH_BYTES", 3000)
    num_read = 0

    def counted() -> Iterator[Any]:
        nonlocal num_read
        for batch in GeneratorSource({"_target_": f"{__name__}.large_rows", "_partial_": True}, "train").batches(
            readers.Meter()
        ):
            num_read += 1
            yield batch

    num_done = 0
    for _ in encoding.encode_in_order(counted(), formatter(), 2, lambda: None):
        num_done += 1
        assert num_read - num_done <= 8
    assert num_done == 20


# ---------------------------------------------------------------------- one builder


_BUILDER = """
import sys, time
from pathlib import Path
from launcher.data.cache import build_store
from launcher.data.sources import FileSource
from launcher.data.tokenising_display import TokenisingDisplay
from tests.unit.data.test_encoding import formatter
def alive():
    print("alive", flush=True)
    time.sleep(float(sys.argv[3]))
build_store(Path(sys.argv[1]), FileSource((Path(sys.argv[2]),)), formatter(), on_bad_row="skip",
            display=TokenisingDisplay(is_shown=True, alive=alive))
"""


def start_builder(folder: Path, file: str, pause_s: float) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", _BUILDER, str(folder), file, str(pause_s)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_others_wait_and_take_over_when_the_builder_dies(tmp_path: Path, write_rows: Write) -> None:
    """Two agents with one cache: the second one says that it waits, and builds once the first is killed."""
    folder, file = tmp_path / "tokens" / "1", write_rows(rows(40))
    first = start_builder(folder, file, 100.0)
    assert first.stdout is not None and first.stdout.readline() == "alive\n"
    second = start_builder(folder, file, 0.0)
    assert second.stdout is not None and second.stdout.readline() == "alive\n"
    assert second.poll() is None and not folder.exists()
    first.kill()
    first.communicate()
    _, told = second.communicate(timeout=240)
    assert second.returncode == 0, told
    assert (
        f"waiting for host {os.uname().nodename}, pid {first.pid}, which is tokenising it into the same cache" in told
    )
    assert "tokenised" in told
    assert is_whole(folder)
    assert [path.name for path in folder.parent.iterdir()] == ["1"]


def test_one_builds_when_the_lock_is_of_another_machine(
    tmp_path: Path, write_rows: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its heartbeat tells whether it lives; here it has stood still for the time that makes it stale."""
    folder, file = tmp_path / "tokens" / "1", write_rows(rows(10))
    folder.parent.mkdir()
    lock = RunLock(folder.with_name("1.builder"))
    lock.acquire([os.getpid()])
    lock._stop.set()
    path = folder.with_name("1.builder")
    path.write_text(json.dumps({**json.loads(path.read_text()), "boot_id": "elsewhere", "host": "node7"}))
    monkeypatch.setattr("launcher.base.lock_file.STALE_S", 0.5)
    build(folder, file, 1)
    assert is_whole(folder)
