"""`launcher checkpoints` reads files that may be damaged or of another tool's; it never ends in a traceback."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.base import manifest
from launcher.cli.checkpoints import list_checkpoints, main


def _checkpoint(root: Path, step: int) -> Path:
    folder = root / f"checkpoint-{step}"
    folder.mkdir()
    line = {"step": step, "eval_loss": 1.0 / step}
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": [line], "best_global_step": step}))
    (folder / "manifest.json").write_bytes(manifest.build(folder, step=step, world_size=1, zero_stage=0).to_json())
    return folder


def _rewrite(folder: Path, trainer_state: str) -> None:
    """Another trainer_state.json, with a manifest that fits."""
    (folder / "trainer_state.json").write_text(trainer_state)
    step = manifest.read(folder).step
    (folder / "manifest.json").write_bytes(manifest.build(folder, step=step, world_size=1, zero_stage=0).to_json())


def test_metrics_best_and_what_is_on_the_hub_are_listed(tmp_path: Path) -> None:
    for step in (10, 20):
        _checkpoint(tmp_path, step)
    (tmp_path / "run.json").write_text(json.dumps({"hub": {"pushed": ["checkpoint-10"]}}))
    rows = list_checkpoints(tmp_path)
    assert [(r["step"], r["metrics"], r["is_best"], r["on_hub"]) for r in rows] == [
        (10, {"eval_loss": 0.1}, False, True), (20, {"eval_loss": 0.05}, True, False),
    ]  # fmt: skip


@pytest.mark.parametrize("run_json", ["", "[]", '{"hub": null}', '{"hub": [1]}', '{"hub": {"pushed": null}}'])
@pytest.mark.parametrize("trainer_state", ["", "[1]", '{"log_history": {"a": 1}}', '{"log_history": [1, null]}'])
def test_odd_files_leave_only_their_own_columns_empty(
    tmp_path: Path, run_json: str, trainer_state: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _rewrite(_checkpoint(tmp_path, 10), trainer_state)
    (tmp_path / "run.json").write_text(run_json)
    rows = list_checkpoints(tmp_path)
    assert [(r["step"], r["metrics"], r["on_hub"]) for r in rows] == [(10, {}, False)]
    assert main([str(tmp_path)]) == 0
    assert "checkpoint-10" in capsys.readouterr().out


def test_json_is_read_by_every_parser_when_a_metric_is_no_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """JSON has no NaN: Python writes it all the same, and other parsers refuse the whole answer."""
    line = {"step": 10, "eval_loss": float("nan"), "eval_other": float("-inf"), "eval_rows": 2.0}
    _rewrite(_checkpoint(tmp_path, 10), json.dumps({"log_history": [line]}))
    assert main([str(tmp_path), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert row["metrics"] == {"eval_loss": None, "eval_other": None, "eval_rows": 2.0}


def test_runs_are_named_when_the_folder_of_runs_is_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in "abcdefg":
        (tmp_path / name).mkdir()
        _checkpoint(tmp_path / name, 10)
    assert main([str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert f"holds no checkpoint. It holds runs; name one: {tmp_path / 'a'}, " in told
    assert f"{tmp_path / 'e'}, …" in told and str(tmp_path / "f") not in told
    (tmp_path / "empty").mkdir()
    assert main([str(tmp_path / "empty")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'empty'} holds no checkpoint\n"


def test_what_is_missing_or_cut_off_is_not_listed_as_whole(tmp_path: Path) -> None:
    """It was the latest of those that are whole, and the best."""
    for step in (10, 20, 30):
        _checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-20/trainer_state.json").unlink()
    (tmp_path / "checkpoint-30/trainer_state.json").write_text("{")
    rows = list_checkpoints(tmp_path)
    assert [row["state"].partition(":")[0] for row in rows] == ["whole", "damaged", "damaged"]
    assert rows[0]["is_latest"] and rows[1]["state"].endswith("trainer_state.json is missing")
