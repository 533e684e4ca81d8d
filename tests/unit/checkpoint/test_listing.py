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
    (_checkpoint(tmp_path, 10) / "trainer_state.json").write_text(trainer_state)
    (tmp_path / "run.json").write_text(run_json)
    rows = list_checkpoints(tmp_path)
    assert [(r["step"], r["metrics"], r["on_hub"]) for r in rows] == [(10, {}, False)]
    assert main([str(tmp_path)]) == 0
    assert "checkpoint-10" in capsys.readouterr().out
