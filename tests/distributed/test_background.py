"""Promises 1 and 4 with `eval.in_background`: the best is that of a run that evaluates itself, whatever happens."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.base import evaluations, files, json_lines, manifest
from launcher.base.paths import RunPaths
from tests.distributed.runs import Lab, different, kill, lines, log_text, losses, wait_until, write_rows
from tests.distributed.test_spikes import SPIKING, write_spiking_rows

BACKGROUND = "eval.in_background=true"


@pytest.fixture(scope="module")
def common(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Evaluated where it is saved; the first one is the best, and retention would take it for the oldest."""
    rows = tmp_path_factory.mktemp("rows") / "eval.jsonl"
    write_rows(rows, 5)
    return (
        f"data.eval_files=[{rows}]", "eval.eval_strategy=steps", "eval.eval_steps=5", "checkpoint.save_steps=5",
        "checkpoint.save_total_limit=1", "checkpoint.load_best_model_at_end=true", "checkpoint.greater_is_better=true",
        "eval.per_device_eval_batch_size=2",
    )  # fmt: skip


@pytest.fixture(scope="module")
def plain(lab: Lab, tmp_path_factory: pytest.TempPathFactory, common: tuple[str, ...]) -> RunPaths:
    return lab.run(tmp_path_factory.mktemp("plain") / "run", "ddp", 2, *common)


def planned(folder: Path, *plan: str | float) -> tuple[str, ...]:
    """Settings of `judging.Planned`, which notes its calls in a file of this folder."""
    target = "eval.metric._target_=tests.distributed.judging.Planned"
    return target, f"eval.metric.calls={folder / 'calls'}", f"eval.metric.plan=[{','.join(map(str, plan))}]"


def evaluated(run: RunPaths) -> dict[int, float]:
    return {step: line["eval_loss"] for step, line in lines(run, "eval_loss").items()}


def info(run: RunPaths) -> dict[str, Any]:
    value: dict[str, Any] = files.read_json(run.run_state)
    return value


def evaluators(run: RunPaths) -> list[int]:
    """Pids of the processes that evaluate this run's checkpoints."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"launcher.train.evaluate_checkpoint" in command and str(run.root).encode() in command:
            found.append(int(folder.name))
    return found


def check_same(run: RunPaths, plain: RunPaths, *, last: int = 20) -> None:
    """The best, its weights at the top, the evaluations, what is kept, and the training itself."""
    mine, expected = info(run), info(plain)
    assert mine["best_step"] == expected["best_step"] and mine["state"] == "finished"
    assert math.isclose(mine["best_metric"], expected["best_metric"], rel_tol=1e-9)
    assert [s for s, _ in run.checkpoint_dirs()] == [s for s, _ in plain.checkpoint_dirs()]
    assert all(manifest.verify(folder) == [] for _, folder in run.checkpoint_dirs())
    assert evaluated(run).keys() == evaluated(plain).keys()
    for step, loss in evaluated(plain).items():
        assert math.isclose(evaluated(run)[step], loss, rel_tol=1e-9)
    assert losses(run) == losses(plain)
    assert (run.root / "model.safetensors").read_bytes() == (plain.root / "model.safetensors").read_bytes()
    assert different(run.checkpoint_dir(last), plain.checkpoint_dir(last)) == []
    assert evaluators(run) == []


@pytest.mark.timeout(300)
def test_best_is_the_foregrounds_when_a_run_was_killed_and_stopped_while_it_waited(
    lab: Lab, tmp_path: Path, common: tuple[str, ...], plain: RunPaths
) -> None:
    """Killed while the first evaluations wait, stopped while the last ones do."""
    run = RunPaths(tmp_path / "run")
    pids = lab.start(run.root, "ddp", 2, *common, BACKGROUND)
    wait_until(lambda: (run.checkpoint_dir(10) / manifest.NAME).is_file(), "checkpoint-10")
    kill(pids)
    lab.zygote.wait()
    wait_until(lambda: evaluators(run) == [], "the end of the evaluator")
    assert evaluated(run).keys() < evaluated(plain).keys()

    lab.start(run.root, "ddp", 2, *common, BACKGROUND)
    wait_until(lambda: (run.checkpoint_dir(20) / manifest.NAME).is_file(), "checkpoint-20")
    run.stop_file.write_text("")
    assert lab.zygote.wait() == [0, 0], log_text(run.root)
    assert (info(run)["state"], info(run)["step"]) == ("interrupted", 20) and not run.stop_file.exists()

    lab.run(run.root, "ddp", 2, *common, BACKGROUND)
    check_same(run, plain)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("strategy", "count", "more"),
    [
        ("single", 1, ()),
        ("zero1", 2, ("model.dtype=bfloat16",)),
        ("zero3", 3, ()),
        ("ddp", 2, ("model/peft=lora", "model.peft.r=4", "model.peft.target_modules=all-linear")),
        ("zero2", 2, ("data.packing=true", "data.max_length=128", "model.gradient_checkpointing=true")),
        ("ddp", 2, ("model.dtype=bfloat16", "model.add_tokens=['<a>']")),
        ("single", 1, ("model.config.tie_word_embeddings=true", "train.fused_loss=false", "checkpoint=all")),
        ("ddp", 2, ("eval.eval_strategy=epoch", "checkpoint.save_strategy=epoch", "train.num_train_epochs=2",
                    "train.max_steps=-1")),
    ],
)  # fmt: skip
def test_best_is_the_foregrounds_when_nothing_disturbs(
    lab: Lab, tmp_path: Path, common: tuple[str, ...], strategy: str, count: int, more: tuple[str, ...]
) -> None:
    plain = lab.run(tmp_path / "plain", strategy, count, *common, *more)
    run = lab.run(tmp_path / "run", strategy, count, *common, *more, BACKGROUND)
    mine, expected = info(run), info(plain)
    rounding = 1e-2 if "model.dtype=bfloat16" in more else 1e-9
    assert mine["best_step"] == expected["best_step"]
    assert evaluated(run).keys() == evaluated(plain).keys()
    for step, loss in evaluated(plain).items():
        assert math.isclose(evaluated(run)[step], loss, rel_tol=rounding)
    last = mine["step"]
    assert different(run.checkpoint_dir(last), plain.checkpoint_dir(last)) == []
    assert [s for s, _ in run.checkpoint_dirs()] == [s for s, _ in plain.checkpoint_dirs()]
    weights = next(plain.root.glob("*model.safetensors")).name
    assert (run.root / weights).read_bytes() == (plain.root / weights).read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("plan", "failed"),
    [("kill", []), ("raise", []), ("stop", []), ("ok raise kill", [10]), ("kill raise", [5]), ("raise " * 9, "all")],
)
def test_training_goes_on_when_the_evaluator_fails(
    lab: Lab, tmp_path: Path, common: tuple[str, ...], plain: RunPaths, plan: str, failed: list[int] | str
) -> None:
    """What fails twice is named and no candidate; the training and its end are the same."""
    metric = planned(tmp_path, *plan.split())
    more = ("launch.hang_timeout_s=3",) if plan == "stop" else ()
    run = lab.run(tmp_path / "run", "ddp", 2, *common, BACKGROUND, *metric, *more)
    missed = [5, 10, 15, 20] if failed == "all" else failed
    assert sorted(evaluated(run)) == sorted({5, 10, 15, 20} - set(missed))
    text = log_text(run.root)
    for step in missed:
        assert f"WARNING checkpoint-{step} could not be evaluated" in text
    assert text.count("It is tried once more") == len(missed) or not missed
    mine = info(run)
    best = None if failed == "all" else 10 if failed == [5] else 5
    assert (mine["state"], mine["best_step"]) == ("finished", best)
    assert losses(run) == losses(plain) and different(run.checkpoint_dir(20), plain.checkpoint_dir(20)) == []
    weights = (run.checkpoint_dir(best or 20) / "model.safetensors").read_bytes()
    assert (run.root / "model.safetensors").read_bytes() == weights
    if failed == "all":
        assert "the last model is taken instead of the best" in text
        assert "RuntimeError: as planned (" in text and "judging.py:" in text
    assert evaluators(run) == []


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_nothing_is_deleted_unjudged_and_the_disk_does_not_fill_when_evaluations_are_slower_than_saves(
    lab: Lab, tmp_path: Path, common: tuple[str, ...]
) -> None:
    metric = planned(tmp_path, 1, 1, 1, 1, 7, 1, 1, 1, 1, 1)  # one wait is long enough to be told of
    more = ("eval.eval_steps=2", "checkpoint.save_steps=2")
    run = RunPaths(tmp_path / "run")
    lab.start(run.root, "single", 1, *common, BACKGROUND, *metric, *more)
    most = 0

    def is_over() -> bool:
        nonlocal most
        steps = [s for s, folder in run.checkpoint_dirs() if (folder / manifest.NAME).is_file()]
        most = max(most, len(steps))
        judged = set(evaluations.steps(run))
        newest = max(steps, default=0)
        assert set(range(2, newest + 1, 2)) <= judged | set(steps)
        return (run.root / "model.safetensors").is_file()

    wait_until(is_over, "the end")
    assert lab.zygote.wait() == [0], log_text(run.root)
    assert len(evaluated(run)) == 10 and info(run)["best_step"] == 2
    assert [s for s, _ in run.checkpoint_dirs()] == [2, 20]
    assert 3 <= most <= 4  # the best, two that wait, and one more while it takes the place of another
    assert "waiting for evaluations in the background" in log_text(run.root)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("moment", ["while it evaluates", "result", "waiting for room", "evaluator first"])
def test_best_is_the_foregrounds_when_a_run_was_killed(
    lab: Lab, tmp_path: Path, common: tuple[str, ...], plain: RunPaths, moment: str
) -> None:
    """And goes on with another number of processes."""
    run = RunPaths(tmp_path / "run")
    metric = planned(tmp_path, 1, 7, 1)  # the second wait is long enough to be told of
    conditions: dict[str, Callable[[], bool]] = {
        "while it evaluates": (tmp_path / "calls").is_file,
        "result": run.evaluation(5).is_file,
        "waiting for room": lambda: "waiting for evaluations" in log_text(run.root),
        "evaluator first": lambda: evaluators(run) != [],
    }
    pids = lab.start(run.root, "ddp", 2, *common, BACKGROUND, *metric)
    wait_until(conditions[moment], moment)
    kill([*(evaluators(run) if moment == "evaluator first" else []), *pids])
    lab.zygote.wait()
    lab.run(run.root, "ddp", 3, *common, BACKGROUND, *metric)
    assert info(run)["best_step"] == 5 and sorted(evaluated(run)) == [5, 10, 15, 20]
    for step, loss in evaluated(plain).items():
        assert math.isclose(evaluated(run)[step], loss, rel_tol=5e-2)  # dropout draws other numbers
    at = [line["step"] for line in json_lines.read(run.metrics) if "eval_loss" in line]
    assert len(at) == len(set(at)), at
    assert [s for s, _ in run.checkpoint_dirs()] == [5, 20]
    assert (run.root / "model.safetensors").read_bytes() == (run.checkpoint_dir(5) / "model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_best_is_the_foregrounds_when_the_run_went_back_after_a_spike(
    lab: Lab, tmp_path: Path, common: tuple[str, ...]
) -> None:
    """With the rows, the seed and the spike of test_spikes."""
    write_spiking_rows(tmp_path / "rows.jsonl")
    more = (
        *common, f"data.train_files=[{tmp_path / 'rows.jsonl'}]", *SPIKING, "train.on_spike=rollback",
        "eval.eval_steps=4", "checkpoint.save_total_limit=2",
    )  # fmt: skip
    plain = lab.run(tmp_path / "plain", "ddp", 2, *more)
    run = lab.run(tmp_path / "run", "ddp", 2, *more, BACKGROUND)
    assert lines(plain, "rolled_back_from"), log_text(plain.root)
    check_same(run, plain, last=16)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_mode_can_be_changed_in_between(lab: Lab, tmp_path: Path, common: tuple[str, ...], plain: RunPaths) -> None:
    """Switched on it goes on as one that always was; switched off, what nobody evaluated is named."""
    run, other = RunPaths(tmp_path / "run"), RunPaths(tmp_path / "other")
    for paths, mode in ((run, "eval.in_background=false"), (other, BACKGROUND)):
        pids = lab.start(paths.root, "ddp", 2, *common, mode, env={"FAULTS": '[{"kind": "sleep", "seconds": 0.3}]'})
        wait_until(lambda paths=paths: max(losses(paths), default=0) >= 7, "step 7")  # type: ignore[misc]
        os.kill(pids[0], signal.SIGTERM)
        assert lab.zygote.wait() == [0, 0], log_text(paths.root)
    lab.run(run.root, "ddp", 2, *common, BACKGROUND)
    check_same(run, plain)
    lab.run(other.root, "ddp", 2, *common)
    if 5 not in evaluated(other):
        assert "not evaluated, so no candidates for the best: checkpoint-5" in log_text(other.root)
    assert info(other)["best_step"] == (5 if 5 in evaluated(other) else 10)
