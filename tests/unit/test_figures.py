"""The figures that the README quotes are those of their records."""

from __future__ import annotations

import importlib
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

_ROOT = Path(__file__).parents[2]


def _record(name: str) -> Any:
    return json.loads((_ROOT / "benchmarks" / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def readme() -> str:
    return " ".join((_ROOT / "README.md").read_text(encoding="utf-8").split())


def _range(values: Sequence[float], digits: int) -> str:
    """`median (lowest to highest, number)`, as the README writes it."""
    middle, low, high = (f"{f(values):.{digits}f}" for f in (statistics.median, min, max))
    return f"{middle} s ({low} to {high}, {len(values)})"


def test_seconds_of_a_resume_are_those_of_the_record(readme: str) -> None:
    stages = _record("results/save_stall.json")["stages"]
    ours, plain = ([stages[stage]["resume"][whose] for stage in "23"] for whose in ("ours", "plain"))
    assert f"first step: {_range(ours[0], 1)} and {_range(ours[1], 1)}" in readme
    assert f"verifies nothing, {_range(plain[0], 1)} and {_range(plain[1], 1)}" in readme
    first, bare = (statistics.median(values[0]) for values in (ours, plain))
    row = f"| **{first:.1f} s**, every byte verified | {bare:.1f} s, nothing verified |"
    assert f"from the resume command to the first step, ZeRO-2 {row}" in readme


@pytest.mark.parametrize(
    ("stage", "name"), [("2", "what a save costs the training, ZeRO-2"), ("3", "the same under ZeRO-3")]
)
def test_seconds_of_a_save_are_those_of_the_record(readme: str, stage: str, name: str) -> None:
    measured = _record("results/save_stall.json")["stages"][stage]
    found = {key: statistics.median(measured[key]) for key in ("ours", "plain", "trainer")}
    assert f"{name} | **{found['ours']:.2f} s** | {found['plain']:.2f} s | {found['trainer']:.2f} s |" in readme
    for key in found:
        assert _range(measured[key], 2) in readme


def test_seconds_beside_a_push_are_those_of_the_record(readme: str) -> None:
    measured = _record("results/hub_overhead.json")
    assert f"steps take {_range(measured['with'], 2)} instead of {_range(measured['without'], 2)}" in readme


def test_wall_time_under_kills_is_that_of_the_record(readme: str) -> None:
    record = _record("records/kills.json")
    rounds, seconds = record["rounds"], {}
    for way in ("killed", "undisturbed"):
        for kind in ("ours", "trainer"):
            seconds[way, kind] = f"{statistics.median(r[way][kind]['seconds'] for r in rounds):.0f} s"
    mean_s = round(statistics.median(r["mean_s_between_kills"] for r in rounds))
    ours, trainer = (f"({seconds['undisturbed', kind]})" for kind in ("ours", "trainer"))
    what = f"{record['num_steps']} steps with a SIGKILL every {mean_s} s (undisturbed)"
    assert (
        f"| {what} | **{seconds['killed', 'ours']}** {ours} | | {seconds['killed', 'trainer']} {trainer} | |" in readme
    )


def test_chats_per_second_are_those_of_the_record(readme: str) -> None:
    rates = _record("records/tokenising.json")["found"][0]["rows_per_second"]
    ours, trl, every_core = (round(statistics.median(rates[key])) for key in ("ours", "trl", "trl, every core"))
    assert f"chats tokenised per second | **{ours:,}** | | | {trl}; {every_core} with every core |" in readme


@pytest.mark.parametrize(
    ("dtype", "row"),
    [("float32", "tokens trained per second, fp32, in times of the peer's"), ("bfloat16", "the same in bf16")],
)
def test_tokens_per_second_are_those_of_the_record(readme: str, dtype: str, row: str) -> None:
    duels = {d["peer"]: d for d in _record("records/throughput.json")["duels"] if d["dtype"] == dtype}
    trainer, trl, packed = (
        f"**{statistics.median(duels[k]['ratios']):.2f}**" for k in ("trainer", "trl", "trl-packed")
    )
    assert f"| {row} | | | {trainer} | {trl} as it ships, {packed} packed |" in readme


@pytest.mark.parametrize(
    ("name", "page"),
    [
        ("throughput", "speed.md"),
        ("start", "speed.md"),
        ("safety", "speed.md"),
        ("kills", "speed.md"),
        ("step_overhead", "speed.md"),
        ("large", "scale.md"),
    ],
)
def test_tables_of_the_docs_are_those_of_their_records(name: str, page: str) -> None:
    found = _record(f"records/{name}.json")
    text = importlib.import_module(f"benchmarks.{name}").as_text(found)
    assert text in (_ROOT / "docs" / page).read_text(encoding="utf-8")
