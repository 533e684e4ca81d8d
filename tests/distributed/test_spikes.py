"""A loss spike is left out, or the run goes back to before it; a run that was killed does the same, bit for bit."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from launcher.base import files
from launcher.base.paths import RunPaths
from tests.distributed.runs import Lab, different, lines, log_text, losses, state, wait_until, write_rows

_LETTERS = "àéîõüßñçøåæœđħłŧžžșțğıİ€£¥§¶†‡•…‰⁂№™∂∑∏√∞∫≈≠≤≥◊"
SPIKING = (
    "data.max_length=128", "train.max_steps=16", "train.spike_window=5", "train.spike_threshold=1.5",
    "train.spike_rollback_steps=2", "checkpoint.save_steps=4", "seed=58",
)  # fmt: skip
_SPIKE = 11
"""The step that meets the row of garbage, with this seed."""
_SIZES = [
    ("single", 1), ("zero2", 2), pytest.param("ddp", 2, marks=pytest.mark.slow),
    pytest.param("zero3", 3, marks=pytest.mark.slow), pytest.param("zero3_offload", 2, marks=pytest.mark.slow),
]  # fmt: skip


def write_spiking_rows(path: Path) -> None:
    """127 chats like those of the other tests and a row of garbage: with 8 in a step, one of 16 steps meets it."""
    write_rows(path, 127)
    answer = "".join(random.Random(3).choices(_LETTERS, k=60))
    with path.open("a", encoding="utf-8") as file:
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
        file.write(json.dumps({"messages": messages}) + "\n")


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("spikes") / "rows.jsonl"
    write_spiking_rows(path)
    return path


@pytest.fixture
def skip(rows: Path) -> tuple[str, ...]:
    return (f"data.train_files=[{rows}]", *SPIKING, "train.on_spike=skip")


@pytest.fixture
def rollback(rows: Path) -> tuple[str, ...]:
    return (f"data.train_files=[{rows}]", *SPIKING, "train.on_spike=rollback")


def _check_same(run: RunPaths, expected: RunPaths) -> None:
    assert different(run.checkpoint_dir(16), expected.checkpoint_dir(16)) == []
    assert losses(run) == losses(expected)
    for key in ("spike_loss", "rolled_back_from"):
        assert lines(run, key) == lines(expected, key)
    progress, other = (state(r.checkpoint_dir(16))["progress"] for r in (run, expected))
    assert {k: v for k, v in progress.items() if k != "seconds_since_eval"} == {
        k: v for k, v in other.items() if k != "seconds_since_eval"
    }


def _rollbacks(run: RunPaths) -> list[list[int]]:
    return [entry["left_out"] for entry in files.read_json(run.run_state).get("rollbacks", [])]


@pytest.mark.parametrize(("strategy", "num_processes"), _SIZES)
def test_a_step_is_left_out_when_its_loss_spikes(
    lab: Lab, tmp_path: Path, skip: tuple[str, ...], rollback: tuple[str, ...], strategy: str, num_processes: int
) -> None:
    skipped = lab.run(tmp_path / "skip", strategy, num_processes, *skip)
    assert [step for step, loss in losses(skipped).items() if loss is None] == [_SPIKE]
    line = lines(skipped, "spike_loss")[_SPIKE]
    assert line["spike_loss"] > line["spike_limit"] > max(v for k, v in losses(skipped).items() if 8 < k != _SPIKE)
    assert "NaN" not in skipped.metrics.read_text()
    # Going back and leaving that one step out is the same, by another way: so both leave out what they say.
    back = lab.run(tmp_path / "back", strategy, num_processes, *rollback, "train.spike_rollback_steps=1")
    assert _rollbacks(back) == [[_SPIKE, _SPIKE]]
    assert lines(back, "rolled_back_from")[8]["left_out_steps"] == [_SPIKE, _SPIKE]
    assert different(skipped.checkpoint_dir(16), back.checkpoint_dir(16)) == []


_KILLED = ["supersede", "update_run", "went_back", "noted", "load"]


@pytest.mark.parametrize(
    ("strategy", "num_processes", "behind"),
    [
        ("single", 1, ["update_run"]), pytest.param("single", 1, _KILLED, marks=pytest.mark.slow),
        pytest.param("zero3", 3, _KILLED, marks=pytest.mark.slow),
        pytest.param("ddp", 2, _KILLED, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_a_rollback_is_the_same_when_it_is_killed(
    lab: Lab, tmp_path: Path, rollback: tuple[str, ...], strategy: str, num_processes: int, behind: list[str]
) -> None:
    expected = lab.run(tmp_path / "undisturbed", strategy, num_processes, *rollback)
    assert [step for step, loss in losses(expected).items() if loss is None] == [_SPIKE - 1, _SPIKE]
    assert _rollbacks(expected) == [[_SPIKE - 1, _SPIKE]]
    for where in behind:
        folder = tmp_path / where
        env = {"KILL_BEHIND": where, "KILLED": str(tmp_path / f"killed-{where}")}
        killed = (
            *rollback,
            "optim.name=tests.distributed.killed_rollback.KilledAdamW",
            "checkpoint.accept_changes=true",
        )
        assert any(lab.run_codes(folder, strategy, num_processes, *killed, env=env)), where
        assert Path(env["KILLED"]).exists(), log_text(folder)
        _check_same(lab.run(folder, strategy, num_processes, *killed, env=env), expected)


@pytest.mark.parametrize(("strategy", "num_processes"), [("ddp", 2), ("zero3", 2)])
@pytest.mark.parametrize("at", [6, 10, 12])
@pytest.mark.slow
def test_a_rollback_is_the_same_when_a_step_before_or_after_it_is_killed(
    lab: Lab, tmp_path: Path, rollback: tuple[str, ...], strategy: str, num_processes: int, at: int
) -> None:
    expected = lab.run(tmp_path / "undisturbed", strategy, num_processes, *rollback)
    fault = [{"kind": "kill", "rank": num_processes - 1, "step": at, "once": str(tmp_path / "killed")}]
    env = {"FAULTS": json.dumps(fault)}
    assert any(lab.run_codes(tmp_path / "killed-run", strategy, num_processes, *rollback, env=env))
    _check_same(lab.run(tmp_path / "killed-run", strategy, num_processes, *rollback, env=env), expected)


def test_a_rollback_is_the_same_when_a_stop_before_it_saved_another_checkpoint(
    lab: Lab, tmp_path: Path, rollback: tuple[str, ...]
) -> None:
    last = (*rollback, "checkpoint.save_total_limit=1")
    expected = lab.run(tmp_path / "undisturbed", "single", 1, *last)
    folder, asked = tmp_path / "stopped", tmp_path / "asked"
    lab.start(
        folder, "single", 1, *last, env={"FAULTS": json.dumps([{"kind": "wait", "step": 10, "file": str(asked)}])}
    )
    stopped = RunPaths(folder)
    wait_until(lambda: 9 in losses(stopped), "step 9")
    stopped.stop_file.touch()
    asked.touch()
    assert lab.zygote.wait() == [0]
    # Leaving out steps 10 and 11 needs a checkpoint of step 9 or before: the newest one is not it.
    assert [step for step, _ in stopped.checkpoint_dirs()] == [8, 10]
    _check_same(lab.run(folder, "single", 1, *last), expected)
    assert (folder / "checkpoint-10.superseded").is_dir()


def test_the_same_step_is_left_out_when_the_run_goes_on_with_other_processes(
    lab: Lab, tmp_path: Path, rollback: tuple[str, ...]
) -> None:
    expected = lab.run(tmp_path / "undisturbed", "single", 1, *rollback)
    env = {"FAULTS": json.dumps([{"kind": "kill", "step": 10, "rank": 0, "once": str(tmp_path / "killed")}])}
    folder = tmp_path / "killed-run"
    assert any(lab.run_codes(folder, "zero2", 2, *rollback, env=env))
    run = lab.run(folder, "zero3", 3, *rollback)
    assert _rollbacks(run) == _rollbacks(expected)
    found, others = losses(run), losses(expected)
    assert [s for s in found if found[s] is None] == [_SPIKE - 1, _SPIKE]
    assert all(found[s] == pytest.approx(others[s], rel=0.02) for s in found if found[s] is not None)


def test_a_run_ends_with_a_reason_when_there_are_too_many_spikes(
    lab: Lab, tmp_path: Path, skip: tuple[str, ...]
) -> None:
    # Losses that stay high are all spikes: nothing would be learned any more, and nobody would know.
    env = {"FAULTS": '[{"kind": "jump", "step": 10}]'}
    assert lab.run_codes(tmp_path, "single", 1, *skip, "train.max_spikes=2", env=env) == [1]
    assert "step 12: its loss" in log_text(tmp_path) and "train.max_spikes=4" in log_text(tmp_path)
    assert files.read_json(RunPaths(tmp_path).run_state)["state"] == "failed"
