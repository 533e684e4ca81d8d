"""Promise 6 through a real launch: a secret of the environment is in no argument list and in no file afterwards."""

from __future__ import annotations

import json
import stat
import threading
from pathlib import Path

import pytest

from tests.distributed.runs import Lab, log_text, write_rows
from tests.faults.launches import launched

_PASSWORD, _URL_PASSWORD = "correct-horse-7", "hunter2hunter2"
_VALUES = (_PASSWORD.encode(), _URL_PASSWORD.encode())


def _watch_command_lines(found: set[str], stop: threading.Event) -> None:
    while not stop.wait(0.05):
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                text = path.read_bytes()
            except OSError:
                continue
            if any(value in text for value in _VALUES):
                found.add(text.decode(errors="replace"))


@pytest.mark.timeout(300)
def test_secret_is_nowhere_when_an_error_of_the_users_holds_it(lab: Lab, tmp_path: Path) -> None:
    message = f"cannot connect to postgresql://me:{_URL_PASSWORD}@db/rows ({_PASSWORD})"
    fault = json.dumps([{"kind": "raise", "step": 2, "rank": 1, "message": message}])
    more = ("launch.num_processes=2", "launch.max_restarts=0", "tracker=tensorboard")
    overrides = lab.overrides(tmp_path / "run", "ddp", *more)
    found: set[str] = set()
    stop = threading.Event()
    watcher = threading.Thread(target=_watch_command_lines, args=(found, stop))
    watcher.start()
    try:
        with launched(overrides, tmp_path / "run", {"FAULTS": fault, "PGPASSWORD": _PASSWORD}) as run:
            assert run.wait() == 1
            shown = run.text()
    finally:
        stop.set()
        watcher.join()
    assert found == set()
    assert "cannot connect to postgresql://me:***@db/rows (***)" in shown
    assert "cannot connect to postgresql://me:***@db/rows (***)" in run.run_state()["error"]
    written = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert any("tfevents" in p.name for p in written)
    assert [p for p in written if any(value in p.read_bytes() for value in _VALUES)] == []
    modes = {name: stat.S_IMODE((tmp_path / "run" / name).stat().st_mode) for name in ("config.yaml", "logs")}
    assert modes == {"config.yaml": 0o600, "logs": 0o700}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_secret_is_in_no_log_when_an_evaluation_in_the_background_tells_it(lab: Lab, tmp_path: Path) -> None:
    rows, root = tmp_path / "eval.jsonl", tmp_path / "run"
    write_rows(rows, 5)
    more = (
        f"data.eval_files=[{rows}]", "eval.eval_strategy=steps", "eval.eval_steps=10", "eval.in_background=true",
        "eval.metric._target_=tests.distributed.judging.Planned", f"eval.metric.calls={tmp_path / 'calls'}",
        "eval.metric.plan=[secret,secret]",
    )  # fmt: skip
    run = lab.run(root, "single", 1, *more, env={"PGPASSWORD": _PASSWORD})
    assert "RuntimeError: no access with ***" in run.evaluation_log.read_text()
    assert "RuntimeError: no access with ***" in log_text(root)
    assert [p for p in root.rglob("*") if p.is_file() and _PASSWORD.encode() in p.read_bytes()] == []
