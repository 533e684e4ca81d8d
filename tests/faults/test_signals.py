"""Promise 1 and the exit codes: every signal at every phase of a run. docs/security.md has the table.

Each phase is held for some seconds, by an audit hook in the process that is in it (`phases/sitecustomize.py`).
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from launcher.base.lock import holder
from launcher.base.paths import RunPaths
from tests.distributed.runs import Lab, different, settings, wait_until, write_rows
from tests.distributed.zygote import ROOT
from tests.faults.launches import Launch, launched
from tests.faults.own_agent import OwnAgent

_STEPS = 50
_HELD_S = 4.0
_SOON_S = 20.0
"""From a signal to the exit: what a busy machine needs for a step and a save, and much less than any time limit."""
_SLOW_STEPS = json.dumps([{"kind": "sleep", "seconds": 0.1}])


@dataclass(frozen=True)
class Phase:
    """An audit event that marks it, and what a request to stop in it leads to.

    event, match: as in `phases/sitecustomize.py`.
    is_begun: whether a step is made, so that a stop has something to save.
    is_end: whether the last step is saved: the run ends as finished.
    """

    event: str
    match: str
    is_begun: bool = True
    is_end: bool = False


PHASES = {
    "imports": Phase("import", r"^\('launcher\.model\.build'", is_begun=False),
    "tokenising": Phase("open", r"tokens\.bin", is_begun=False),
    "model build": Phase("open", r"modeling_llama\.cpython", is_begun=False),
    "first step": Phase("tests.step", r"\(1,"),
    "mid-training": Phase("tests.step", r"\(4,"),
    "evaluation": Phase("tests.evaluation", ""),
    "capture": Phase("os.mkdir", r"\.tmp-checkpoint-\d+'"),
    "write": Phase("open", r"'optimizer\.safetensors'|/optimizer\.safetensors'"),
    "commit": Phase("os.rename", r"\.tmp-checkpoint-\d+'.*/checkpoint-\d+'"),
    "retention": Phase("os.rename", r"/checkpoint-\d+'.*\.tmp-deleted"),
    "publication": Phase("os.rename", r"/run/\.model\.safetensors\.tmp-\w+'.*/run/model\.safetensors'", is_end=True),
}
_SLOW = pytest.mark.slow


def _overrides(folder: Path) -> list[str]:
    return [
        *settings(folder / "rows.jsonl", folder / "cache"), "strategy=ddp", "launch.num_processes=2",
        f"train.max_steps={_STEPS}", "checkpoint.save_steps=5", "checkpoint.save_total_limit=1",
        f"data.eval_files=[{folder / 'eval.jsonl'}]", "eval.eval_strategy=steps", "eval.eval_steps=4",
        "eval.metric={_target_: tests.faults.phases.measured.Measured}", "eval.num_sanity_rows=0",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last checkpoint of a run that nobody touched."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run = RunPaths(folder / "run")
    run.root.mkdir()
    _write_data(folder)
    codes = lab.zygote.run([*_overrides(folder), f"output_dir={run.root}"], 2, run.root / "test.log")
    assert codes == [0, 0], (run.root / "test.log").read_text()
    return run.checkpoint_dir(_STEPS)


def _write_data(folder: Path) -> None:
    write_rows(folder / "rows.jsonl")
    write_rows(folder / "eval.jsonl", 4)


def _held(phase: Phase, reached: Path) -> dict[str, str]:
    """The environment of a run that is held there."""
    wanted = {"event": phase.event, "match": phase.match, "seconds": _HELD_S, "reached": str(reached)}
    path = os.pathsep.join([str(Path(__file__).parent / "phases"), str(ROOT)])
    return {"PHASE": json.dumps(wanted), "PYTHONPATH": path, "FAULTS": _SLOW_STEPS}


def _wait_for(run: Launch, reached: Path) -> None:
    wait_until(lambda: reached.exists() or run.process.poll() is not None, "the phase", 180.0)
    assert run.process.poll() is None, f"ended with {run.process.returncode}\n{run.text()}"


def _survives(run: Launch) -> None:
    for number in (signal.SIGHUP, signal.SIGPIPE, signal.SIGSTOP, signal.SIGCONT):
        os.kill(run.process.pid, number)
        time.sleep(0.2)
    assert run.process.poll() is None, f"ended with {run.process.returncode}\n{run.text()}"


def _check_stopped(run: Launch, phase: Phase, code: int, took_s: float) -> None:
    text, state = run.text(), run.run_state()
    assert code == (0 if phase.is_end else 75), text
    assert took_s < _SOON_S and "Traceback" not in text and "rror" not in text, text
    if phase.is_end:
        assert (state["state"], state["exit_code"]) == ("finished", 0)
    else:
        assert (state["state"], state["reason"], state["exit_code"]) == ("interrupted", "signal", 75)
        assert run.paths.checkpoint_dir(state["step"]).is_dir() or not phase.is_begun
    assert not run.paths.stop_file.exists() and holder(run.paths.lock) is None


def _check_resumes(folder: Path, undisturbed: Path) -> None:
    with launched(_overrides(folder), folder / "run") as run:
        assert run.wait() == 0, run.text()
    assert run.run_state()["state"] == "finished" and not list(run.paths.root.glob(".tmp-*"))
    assert different(undisturbed, run.paths.checkpoint_dir(_STEPS)) == []


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [pytest.param(name, marks=_SLOW) for name in PHASES])
def test_run_stops_or_goes_on_and_ends_bit_identical_when_it_gets_a_signal(
    undisturbed: Path, tmp_path: Path, name: str
) -> None:
    phase = PHASES[name]
    _write_data(tmp_path)
    for number in (signal.SIGTERM, signal.SIGINT):
        reached = tmp_path / f"reached-{number}"
        with launched(_overrides(tmp_path), tmp_path / "run", _held(phase, reached)) as run:
            _wait_for(run, reached)
            if number == signal.SIGTERM:
                _survives(run)
            started = time.monotonic()
            os.kill(run.process.pid, number)
            code = run.wait(_HELD_S + 60)
            _check_stopped(run, phase, code, time.monotonic() - started)
        if name == "tokenising":
            assert not list((tmp_path / "cache").rglob("tokens.bin")) or number == signal.SIGINT
        if phase.is_end:
            break  # it is finished
    _check_resumes(tmp_path, undisturbed)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [n if n == "tokenising" else pytest.param(n, marks=_SLOW) for n in PHASES])
def test_run_under_ones_own_agent_stops_and_ends_bit_identical_when_it_gets_sigterm(
    undisturbed: Path, tmp_path: Path, name: str
) -> None:
    """The agent ends with its own traceback; run.json says how the run stands, and no rank calls it a crash."""
    phase, reached = PHASES[name], tmp_path / "reached"
    _write_data(tmp_path)
    with OwnAgent(_overrides(tmp_path), tmp_path / "run", 2, _held(phase, reached)) as run:
        _wait_for(run, reached)
        started = time.monotonic()
        os.kill(run.process.pid, signal.SIGTERM)
        run.wait(60)
        took_s, state = time.monotonic() - started, run.run_state()
    assert took_s < _SOON_S, run.text()
    assert "WARNING" not in run.text(), run.text()  # a save that failed, since its writer was signalled too
    assert not list(run.paths.root.glob("logs/error-rank-*")) and not re.search(r"launcher: rank \d", run.text())
    if name == "imports":  # the signal ends the ranks: there is nothing to tell
        assert not state
    elif phase.is_end:
        assert (state["state"], state["exit_code"]) == ("finished", 0)
    else:
        assert (state["state"], state["reason"], state["exit_code"]) == ("interrupted", "signal", 75), run.text()
        assert not phase.is_begun or run.paths.checkpoint_dir(state["step"]).is_dir()
        assert phase.is_begun or "stopped before the first step" in run.text()
        assert phase.is_begun or took_s < 5.0 + _HELD_S
    assert not run.paths.stop_file.exists()
    _check_resumes(tmp_path, undisturbed)
