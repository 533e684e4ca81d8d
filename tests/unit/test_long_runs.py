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
from launcher.saving.training_state import _AFTER, _BEFORE, _BETWEEN, _encoded
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


def test_history_is_not_encoded_again_when_a_run_resumes() -> None:
    history = [_line(step) for step in range(3)] + [{"text": 'a,\n  "b"', "step": 4}]
    text = f"{{{_BEFORE}{_BETWEEN.join(map(json.dumps, history))}{_AFTER}"
    assert json.loads(text) == {"log_history": history}
    assert list(map(json.loads, _encoded(text, history))) == history
    other = json.dumps({"log_history": history}, indent=2)  # of another tool
    assert _encoded(other, history) == []
    assert _encoded('{"log_history": []}', []) == []


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
