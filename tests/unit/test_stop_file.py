"""What lies at the place of STOP: a file is a request, anything else is not, and nothing is removed through it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launcher.base.stop_requests import REASONS, StopRequests, read_stop, remove_stop


@pytest.mark.parametrize(("text", "reason"), [("", "stop_file"), ("preempted\n", "preempted"), ("what?", "stop_file")])
def test_file_gives_its_reason_and_is_removed(tmp_path: Path, text: str, reason: str) -> None:
    stop = tmp_path / "STOP"
    stop.write_text(text)
    assert read_stop(stop) == reason
    assert StopRequests(stop, is_main=False).votes(0.0, 0.0) == (0, 0)
    assert remove_stop(stop) and not stop.exists()


def test_nothing_there_is_no_request_and_nothing_odd(tmp_path: Path) -> None:
    assert read_stop(tmp_path / "STOP") is None and remove_stop(tmp_path / "STOP")


def test_folder_link_and_pipe_are_no_requests(tmp_path: Path) -> None:
    stop, other = tmp_path / "STOP", tmp_path / "other"
    other.write_text("preempted")
    stop.mkdir()
    assert read_stop(stop) is None and not remove_stop(stop) and stop.is_dir()
    stop.rmdir()
    stop.symlink_to(other)
    assert read_stop(stop) is None and remove_stop(stop)
    assert other.read_text() == "preempted" and not stop.is_symlink()
    os.mkfifo(stop)
    assert read_stop(stop) is None and remove_stop(stop)


def test_reason_of_the_main_process_is_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAUNCHER_SUPERVISED", "1")
    (tmp_path / "STOP").write_text("time_limit")
    assert StopRequests(tmp_path / "STOP", is_main=True).votes(0.0, 0.0) == (1 + REASONS.index("time_limit"), 1)
