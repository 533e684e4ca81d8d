"""The expected goodput of docs/scale.md is that of a simulation, event by event, and its table that of the record."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.goodput import Saves, as_text, best_interval, expected, simulated

_ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("mtbf_s", [300.0, 3600.0])
@pytest.mark.parametrize("saves", [Saves(60, 0.5, 40), Saves(60, 0.5, 0), Saves(200, 30, 0), Saves(100, 0, 100)])
def test_expected_goodput_is_the_simulated_one(saves: Saves, mtbf_s: float) -> None:
    found = simulated(saves, mtbf_s, 20.0, 30_000)
    assert found == pytest.approx(expected(saves, mtbf_s, 20.0), rel=0.01)


def test_goodput_without_failures_is_what_the_stalls_leave() -> None:
    assert expected(Saves(90, 10, 0), 1e12, 100) == pytest.approx(0.9)
    assert simulated(Saves(90, 10, 50), 1e12, 100, 100) == pytest.approx(0.9, rel=0.02)


def test_best_interval_is_that_of_young_where_failures_are_rare() -> None:
    assert best_interval(10.0, 0.0, 1e6, 100.0).interval_s == pytest.approx((2 * 10.0 * 1e6) ** 0.5, rel=0.02)


def test_table_of_the_docs_is_that_of_the_record() -> None:
    record = json.loads((_ROOT / "benchmarks" / "records" / "goodput.json").read_text())
    assert as_text(record) in (_ROOT / "docs" / "scale.md").read_text()
