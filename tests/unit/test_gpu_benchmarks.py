"""What the benchmarks for a GPU machine do where something is missing, or fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks import throughput
from benchmarks.common import ROOT
from benchmarks.gpu import sweep
from benchmarks.gpu.places import in_memory
from benchmarks.gpu.throughput import CASES, beside_or_alone


@pytest.mark.parametrize(("given", "expected"), [("/a:/b", f"{ROOT}:/a:/b"), ("", str(ROOT)), (None, str(ROOT))])
def test_contender_finds_the_packages_that_its_benchmark_finds(
    given: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    if given is not None:
        monkeypatch.setenv("PYTHONPATH", given)
    assert throughput.environment()["PYTHONPATH"].split(os.pathsep) == expected.split(os.pathsep)


def test_ours_is_measured_alone_when_a_peer_fails() -> None:
    runs: list[list[str]] = []

    def run(sides: Mapping[str, int]) -> int:
        runs.append(list(sides))
        if len(sides) > 1:
            sys.exit("a contender ended:\nOutOfMemoryError")
        return sides["ours"]

    assert beside_or_alone(run, {"ours": 7, "trainer": 8}) == (7, "a contender ended:\nOutOfMemoryError")
    assert runs == [["ours", "trainer"], ["ours"]]
    with pytest.raises(SystemExit):
        beside_or_alone(lambda sides: sys.exit("ours, too"), {"ours": 7})


def test_cases_begin_with_one_of_each_model() -> None:
    first = [case.model for case in list(CASES.values())[:3]]
    assert sorted(first) == sorted({case.model for case in CASES.values()} - {"tiny"})


def test_part_of_the_sweeps_that_ran_out_of_time_keeps_the_other_and_both_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    written = tmp_path / "out/sweep.json"

    def slow() -> dict[str, Any]:
        subprocess.run(
            ["bash", "-c", "echo here >&2; sleep 60"], timeout=3.0, capture_output=True, text=True, check=True
        )
        return {}

    def second() -> dict[str, Any]:
        return {"before": json.loads(written.read_text())}

    sweep.write_parts({"sweep": slow, "plan": second})
    found = json.loads(written.read_text())
    assert "TimeoutExpired" in found["sweep"]["error"] and "here" in found["sweep"]["tail"]
    assert found["plan"]["before"] == {"sweep": found["sweep"]}


def test_memory_is_used_where_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHM_WORK", str(tmp_path / "shm"))
    assert in_memory(1) == str(tmp_path / "shm") and (tmp_path / "shm").is_dir()
    assert in_memory(2**60) is None
    (tmp_path / "file").touch()
    monkeypatch.setenv("SHM_WORK", str(tmp_path / "file/shm"))
    assert in_memory(1) is None
