"""A template that prints the date trains on one day for as long as a run lasts."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any, cast

import pytest

from launcher.base.paths import RunPaths
from launcher.base.processes import Processes
from launcher.config.changes import changed_settings
from launcher.config.rules import contradictions
from launcher.config.settings import DataConfig, RunConfig, to_dict
from launcher.data import Data, build_data, stop_clock, with_template_date
from launcher.data.preview import preview
from launcher.data.tokenizer import byte_tokenizer
from launcher.sweep import jobs as sweep_jobs
from launcher.sweep.jobs import Job, SweepPaths, SweepTable
from launcher.sweep.runs import Metric
from launcher.train.run_settings import of_one_day
from tests.unit.data.conftest import PLAIN_TEMPLATE, chat

DATED = "{{ 'Today: ' + strftime_now('%d %b %Y %H:%M') + '\n' }}" + PLAIN_TEMPLATE


def dated() -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = DATED
    return tokenizer


def text_of(data: Data) -> str:
    return str(byte_tokenizer().decode(data.train.segments(0)[0][0]))


def test_the_date_set_is_printed_and_said_when_the_template_asks_for_it(
    make_data: Callable[..., Data], write_rows: Callable[..., str]
) -> None:
    files = [write_rows([chat("a", "b")])]
    first = make_data(tokenizer=dated(), train_files=files, chat_template_date="2025-01-31")
    again = make_data(tokenizer=dated(), train_files=files, chat_template_date="2025-01-31")
    other = make_data(tokenizer=dated(), train_files=files, chat_template_date="2025-02-01")
    assert text_of(first).startswith("Today: 31 Jan 2025 00:00\n")
    assert text_of(other).startswith("Today: 01 Feb 2025 00:00\n")
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert first.notices == ["the chat template prints the date: 2025-01-31 in this run (data.chat_template_date)"]


def test_today_is_printed_when_no_date_is_set(make_data: Callable[..., Data], write_rows: Callable[..., str]) -> None:
    before = date.today()  # midnight may come
    data = make_data(tokenizer=dated(), train_files=[write_rows([chat("a", "b")])])
    days = [day.strftime("Today: %d %b %Y ") for day in (before, date.today())]
    assert text_of(data).startswith(tuple(days))


def test_a_date_changes_nothing_when_the_template_prints_none(
    make_data: Callable[..., Data], write_rows: Callable[..., str], tmp_path: Path
) -> None:
    files = [write_rows([chat("a", "b")])]
    plain, set_ = make_data(train_files=files), make_data(train_files=files, chat_template_date="2025-01-31")
    assert plain.fingerprint == set_.fingerprint and plain.notices == []
    assert set_.notices == ["data.chat_template_date=2025-01-31 has no effect: the chat template prints no date"]
    assert len(list((tmp_path / "cache/tokens").iterdir())) == 1


def test_preview_shows_one_day(write_rows: Callable[..., str], tmp_path: Path) -> None:
    data = DataConfig(
        train_files=[write_rows([chat("a", "b")])], cache_dir=str(tmp_path / "c"), chat_template_date="2025-01-31"
    )
    (row,), _, built = preview(RunConfig(data=data), dated(), split="train", num_rows=1)
    assert row.text.startswith("Today: 31 Jan 2025") and "2025-01-31" in built.notices[-1]


def test_a_kept_day_holds_until_one_is_set() -> None:
    config = RunConfig(data=DataConfig())
    assert with_template_date(config, dated(), "2024-02-29").data.chat_template_date == "2024-02-29"
    own = RunConfig(data=DataConfig(chat_template_date="2025-01-31"))
    assert with_template_date(own, dated(), "2024-02-29").data.chat_template_date == "2025-01-31"
    assert with_template_date(config, byte_tokenizer(), "2024-02-29").data.chat_template_date is None


def test_prompts_print_the_day_and_the_saved_template_is_the_models_own(tmp_path: Path) -> None:
    tokenizer = dated()
    stop_clock(tokenizer, "2025-01-31")
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    assert prompt.startswith("Today: 31 Jan 2025")
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "chat_template.jinja").read_text() == DATED
    assert "2025" not in (tmp_path / "tokenizer_config.json").read_text()


@pytest.mark.parametrize("day", ["31.1.2025", "2025-1-31", "2025-02-30", "20250131", "today", "2025-01-31T00:00"])
def test_what_is_no_day_is_refused(day: str) -> None:
    problems = contradictions(RunConfig(data=DataConfig(train_files=[__file__], chat_template_date=day)))
    assert any(f"data.chat_template_date must be a day as YYYY-MM-DD (got {day})" in problem for problem in problems)


def test_a_finished_run_has_not_changed_when_its_day_was_not_set() -> None:
    before = to_dict(RunConfig(data=DataConfig(chat_template_date="2025-01-31")))
    assert changed_settings(before, RunConfig()) == []
    other = RunConfig(data=DataConfig(chat_template_date="2025-02-01"))
    assert changed_settings(before, other) == ["data.chat_template_date: '2025-01-31' in the run, '2025-02-01' now"]


_MODULE = importlib.import_module("launcher.data.template_date")


class _Midnight(date):
    """A clock that is a day further whenever it is asked."""

    num_asked = 0

    @classmethod
    def today(cls) -> date:
        cls.num_asked += 1
        return date(2025, 1, 30 + cls.num_asked) if cls.num_asked < 2 else date(2025, 2, cls.num_asked)


class _Rank:
    """One of several processes, after the main one has said what it found."""

    def __init__(self, said: list[Any]) -> None:
        self.said = said

    def on_main(self, action: Callable[[], Any]) -> Any:
        if not self.said:
            self.said.append(action())
        return self.said[0]


def test_all_processes_have_the_main_ones_day_when_a_run_starts_over_midnight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_rows: Callable[..., str]
) -> None:
    monkeypatch.setattr(_MODULE, "date", _Midnight)
    monkeypatch.setattr(_Midnight, "num_asked", 0)
    said: list[Any] = []
    found = []
    for rank in range(3):
        data = DataConfig(train_files=[write_rows([chat("a", "b")])], cache_dir=str(tmp_path / f"cache{rank}"))
        tokenizer, processes = dated(), cast("Processes", _Rank(said))
        config = of_one_day(RunConfig(data=data), tokenizer, None, RunPaths(tmp_path), processes)
        built = build_data(config, tokenizer, is_builder=True, wait=lambda: None)
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
        found.append((built.fingerprint, text_of(built)[:18], prompt[:18], config.data.chat_template_date))
    assert found == [(found[0][0], "Today: 31 Jan 2025", "Today: 31 Jan 2025", "2025-01-31")] * 3
    assert _Midnight.num_asked == 1


def test_all_jobs_have_the_day_of_the_sweep_when_some_start_after_midnight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    days = []
    for name, asked in (("lr=1", 0), ("lr=2", 1), ("lr=3", 2)):
        monkeypatch.setattr(_Midnight, "num_asked", asked)
        for module in (_MODULE, sweep_jobs):
            monkeypatch.setattr(module, "date", _Midnight)
        table = SweepTable(SweepPaths(tmp_path))  # the sweep is started once more, with another job
        table.add([Job(name, tmp_path / name, {}, (), ())])
        table.write(Metric("loss", False))
        (tmp_path / name).mkdir()
        config = of_one_day(RunConfig(), dated(), None, RunPaths(tmp_path / name), Processes())
        days.append(config.data.chat_template_date)
    assert days == ["2025-01-31"] * 3
    own = RunConfig(data=DataConfig(chat_template_date="2024-02-29"))
    config = of_one_day(own, dated(), None, RunPaths(tmp_path / "lr=1"), Processes())
    assert config.data.chat_template_date == "2024-02-29"
    (tmp_path / "sweep.json").write_text('{"jobs": {"lr=4": 0}, "info": {"first_day": "yesterday"}}')
    (tmp_path / "lr=4").mkdir()
    config = of_one_day(RunConfig(), dated(), None, RunPaths(tmp_path / "lr=4"), Processes())
    assert config.data.chat_template_date != "yesterday"
