"""What a start costs does not grow with what was done before: counted, since times vary with the machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.base import files, json_lines, manifest
from launcher.base.paths import RunPaths
from launcher.base.processes import Processes
from launcher.checkpoint import resume, retention
from launcher.saving import log_history
from launcher.saving.log_history import LogHistory
from launcher.sweep.runs import read_run
from launcher.train.metrics import MetricsFile

NUM_LINES = 20_000


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was given to the JSON parser."""
    given: list[Any] = []
    plain = files.parse_json

    def parse(data: bytes | str) -> Any:
        given.append(data)
        return plain(data)

    monkeypatch.setattr(json_lines, "parse_json", parse)
    monkeypatch.setattr(log_history, "parse_json", parse)
    return given


def _line(step: int) -> dict[str, Any]:
    return {"step": step, "epoch": step / 1000, "loss": 1.0 / (step + 1)}


def test_metrics_of_a_long_run_are_cut_without_parsing_them(tmp_path: Path, parsed: list[Any]) -> None:
    lines = [_line(step) for step in range(NUM_LINES)]
    lines.insert(NUM_LINES - 5, {"step": NUM_LINES - 40, "checkpoint": "x", "save_write_s": 1.5})  # told later
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "lo')
    metrics = MetricsFile(path)
    assert metrics.last("save_write_s") == 1.5 and len(parsed) == 1
    removed = metrics.trim(NUM_LINES - 11)
    assert [line["step"] for line in removed] == list(range(NUM_LINES - 10, NUM_LINES))
    assert len(parsed) < 20
    assert list(json_lines.read(path)) == [line for line in lines if line not in removed]
    before = path.stat()
    assert metrics.trim(NUM_LINES) == [] and path.stat().st_ino == before.st_ino  # nothing to do, nothing written


@pytest.mark.parametrize("text", ['{"a": 1}', '{"step": 1.5, "loss": 2}', '{"epoch": 1, "step": 2}', "[1]", "x", "{"])
def test_lines_of_another_form_are_kept_or_left_out_as_they_always_were(tmp_path: Path, text: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{text}\n{{"step": 2}}\n{{"step": 3, "x": 1}}\n')
    expected = [line for line in json_lines.read(path) if line.get("step", 0) <= 2]
    assert MetricsFile(path).trim(2) == [{"step": 3, "x": 1}]
    assert list(json_lines.read(path)) == expected


def test_history_of_earlier_starts_is_neither_parsed_nor_encoded_again(parsed: list[Any]) -> None:
    history = [_line(step) for step in range(NUM_LINES)] + [{"text": 'a,\n  "b": {}, "eval_loss"', "step": NUM_LINES}]
    history[3:3] = [{"step": 2, "eval_loss": 2.5}, {"step": 1, "eval_loss": None}]  # the second was told later
    for written in (3, len(history)):  # in two starts
        state = {"global_step": 7, "best": {"a": [1]}}
        text = LogHistory(history[:written]).written_with(state)
        found = LogHistory.read(text)
        assert json.loads(text) == {**state, "log_history": history[:written]}
        for line in history[written:]:
            found.append(line)
        assert json.loads(found.written_with(state)) == {**state, "log_history": history}
        assert found.evaluations == history[3:5]
    assert len(parsed) == 2, "only the two evaluations that had been written"


@pytest.mark.parametrize("indent", [None, 1, 2, 4])
def test_history_of_another_tool_is_read_in_full(indent: int | None) -> None:
    lines = [{"step": 1, "loss": 1.5}, {"eval_loss": 2.5, "step": 1}, {"eval_loss": 2.0}, {"train_runtime": 3.0}]
    found = LogHistory.read(json.dumps({"log_history": lines, "log_level": 1}, indent=indent))
    assert json.loads(found.written_with({"a": 1})) == {"a": 1, "log_history": lines}
    assert found.evaluations == [lines[1]]


@pytest.mark.parametrize(
    "end",
    [
        '{"step": 1}, {"eval_loss": 2.0, "step": 1}\n ]\n}\n',
        '{"eval_loss": 2.0, "step": 1}],"z":{}}',
        '{"step": 1}],"z":{}}',
    ],
)
def test_history_that_only_looks_like_ours_is_read_in_full(end: str) -> None:
    text = '{\n "a": 1,\n "log_history": [\n  ' + end
    lines = json.loads(text)["log_history"]
    found = LogHistory.read(text)
    assert json.loads(found.written_with({"a": 1})) == {"a": 1, "log_history": lines}
    assert found.evaluations == [line for line in lines if "eval_loss" in line]


@pytest.mark.parametrize("lines", [[], [{"step": 1}], [{"step": 1, "eval_loss": 1}, {"step": 2}]])
def test_history_of_few_lines(lines: list[dict[str, Any]]) -> None:
    found = LogHistory.read(LogHistory(lines).written_with({"a": 1}))
    assert json.loads(found.written_with({"a": 1})) == {"a": 1, "log_history": lines}


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "7", '{"log_history": 7}', '{"log_history": [1]}', '{"log_history": [null]}',
             '{\n "log_history": [\n  {"step": 1, "eval_loss": }\n ]\n}\n',
             '{\n "log_history": [\n  {"step": 1,\n  {"step": 2}\n ]\n}\n', "[" * 10**6],
)  # fmt: skip
def test_nonsense_in_the_place_of_a_history_has_one_kind_of_error(text: str) -> None:
    with pytest.raises(ValueError):
        LogHistory.read(text)


@pytest.fixture
def many(tmp_path: Path) -> RunPaths:
    for step in range(1, 501):
        folder = tmp_path / f"checkpoint-{step}"
        (folder / "state").mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        (folder / "state/state.json").write_text(json.dumps({"step": step, "settings": {}}))
        made = manifest.build(folder, step=step, world_size=1, zero_stage=0)
        (folder / manifest.NAME).write_bytes(made.to_json())
    return RunPaths(tmp_path)


def test_only_the_newest_checkpoint_is_read_when_there_are_many(many: RunPaths, parsed: list[Any]) -> None:
    parsed.clear()
    point, _ = resume.find("auto", many, Processes(), lambda folder: folder)
    assert point is not None and point.step == 500
    assert len(parsed) < 15  # its manifest and state
    parsed.clear()
    earlier, _ = resume.newest_before(400, many, Processes())
    assert earlier is not None and earlier.step == 399 and len(parsed) < 15
    parsed.clear()
    assert retention.our_steps(many) == list(range(1, 501)) == read_run(many.root, None).checkpoints
    assert len(parsed) <= 1  # run.json
