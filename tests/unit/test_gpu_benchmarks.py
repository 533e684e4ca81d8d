"""What the benchmarks for a GPU machine do where something is missing, or fails."""

from __future__ import annotations

import os

import pytest

from benchmarks import throughput
from benchmarks.common import ROOT


@pytest.mark.parametrize(("given", "expected"), [("/a:/b", f"{ROOT}:/a:/b"), ("", str(ROOT)), (None, str(ROOT))])
def test_contender_finds_the_packages_that_its_benchmark_finds(
    given: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    if given is not None:
        monkeypatch.setenv("PYTHONPATH", given)
    assert throughput.environment()["PYTHONPATH"].split(os.pathsep) == expected.split(os.pathsep)
