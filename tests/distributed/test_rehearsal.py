"""A user's own metric and optimizer are tried on little before the first step, and leave no trace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from launcher.base import files
from launcher.base.paths import RunPaths
from launcher.base.rank_reports import read_reports
from launcher.data import EvalContext
from tests.distributed.runs import Lab, different, lines, log_text, write_rows

_HERE = "tests.distributed.test_rehearsal"


class Generated:
    """Draws from every generator and generates: what a trial could disturb. Counts what it was given."""

    def __init__(self, told: str) -> None:
        self._told, self._num_calls = Path(told), 0

    def __call__(self, context: EvalContext) -> dict[str, float]:
        self._num_calls += 1
        own = context.rows[context.rank :: context.world_size]
        ids = torch.randint(3, 20, (1, 4), device=context.device)
        context.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=True)
        context.show(prompt="p", answer="a")
        if context.rank == 0:
            with self._told.open("a") as file:
                file.write(json.dumps([len(context.rows), self._num_calls]) + "\n")
        return {"rows": context.sum_over_processes([float(len(own))])[0]}


class Broken:
    def __call__(self, context: EvalContext) -> dict[str, float]:
        raise KeyError(context.rows[0]["no such column"])


class Shares:
    """Of this process's rows alone; and it leaves gradients behind."""

    def __call__(self, context: EvalContext) -> dict[str, Any]:
        with torch.enable_grad():
            ids = torch.ones(1, 4, dtype=torch.long, device=context.device)
            context.model(ids, labels=ids).loss.backward()
        return {"eval_share": np.array([float(context.rank)])}


class MainOnly:
    def __call__(self, context: EvalContext) -> dict[str, Any] | None:
        return {"share": torch.tensor([0.0])} if context.rank == 0 else None


class Taken:
    def __call__(self, context: EvalContext) -> dict[str, float]:
        return {"loss": 0.5}


class Nested:
    def __call__(self, context: EvalContext) -> dict[str, Any]:
        return {"rouge": {"1": 0.5}}


class Number:
    def __call__(self, context: EvalContext) -> float:
        return 0.5


class Mute:
    def __call__(self, context: EvalContext) -> dict[str, float]:
        return {}


class BrokenAdamW(torch.optim.AdamW):
    def step(self, closure: Any = None) -> Any:
        shapes = sorted({p.dim() for group in self.param_groups for p in group["params"] if p.grad is not None})
        raise ArithmeticError(f"of {shapes} dimensions")


def _evaluated(folder: Path, *more: str) -> tuple[str, ...]:
    rows = folder / "eval.jsonl"
    write_rows(rows, 29)
    return (
        f"data.eval_files=[{rows}]", "eval.eval_strategy=steps", "eval.eval_steps=10", "train.max_steps=10",
        "checkpoint.load_best_model_at_end=true", *more,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("strategy", "count"), [("single", 1), ("zero3", 3), pytest.param("ddp", 2, marks=pytest.mark.slow)]
)
def test_a_trial_changes_nothing_when_a_run_is_compared_with_one_without(
    lab: Lab, tmp_path: Path, strategy: str, count: int
) -> None:
    target = f"eval.metric={{_target_: {_HERE}.Generated, told: {tmp_path / 'told'}}}"
    more = _evaluated(tmp_path, target, "checkpoint.metric_for_best_model=rows")
    tried = lab.run(tmp_path / "tried", strategy, count, *more)
    resumed = lab.run(tmp_path / "tried", strategy, count, *more, "train.max_steps=12")
    told = [json.loads(line) for line in (tmp_path / "told").read_text().splitlines()]
    assert told == [[4 * count, 1], [29, 1], [29, 1]], "few rows, by an instance of its own, and at a first start only"
    plain = lab.run(tmp_path / "plain", strategy, count, *more, "eval.num_sanity_rows=0")
    lab.run(plain.root, strategy, count, *more, "eval.num_sanity_rows=0", "train.max_steps=12")
    for step in (10, 12):
        assert different(plain.checkpoint_dir(step), resumed.checkpoint_dir(step)) == []
    assert [line["eval_rows"] for line in lines(tried, "eval_loss").values()] == [29, 29]
    assert len(tried.samples.read_text().split()) == len(plain.samples.read_text().split()), "no sample of the trial"


@pytest.mark.parametrize("background", ["false", "true"])
def test_a_run_ends_before_its_first_step_when_its_metric_fails(lab: Lab, tmp_path: Path, background: str) -> None:
    more = _evaluated(tmp_path, f"eval.metric._target_={_HERE}.Broken", f"eval.in_background={background}")
    codes = lab.run_codes(tmp_path, "ddp", 2, *more)
    run = RunPaths(tmp_path)
    if background == "true":  # there it harms nothing
        assert codes == [0, 0] and max(lines(run)) == 10
        return
    assert 1 in codes and not lines(run)  # the rank that ends first takes the other down
    report = read_reports(run.logs_dir)[0]
    assert (report["kind"], report["is_users_code"]) == ("KeyError", True)
    assert "test_rehearsal.py" in report["where"] and "no such column" in report["message"]
    assert "first 4 rows of each process" in report["message"] and "eval.num_sanity_rows=64" in report["message"]
    assert files.read_json(run.run_state)["state"] == "failed"


@pytest.mark.parametrize(
    ("metric", "best", "told"),
    [
        ("Number", "loss", ["must give numbers by name", "gave 0.5"]),
        ("Mute", "accuracy", ["checkpoint.metric_for_best_model=accuracy", "(nothing)", "eval.num_sanity_rows=0"]),
        ("Mute", "loss", []),
        ("Taken", "loss", ["gave loss, which is what the evaluation itself gives"]),
        ("Nested", "loss", ["gave rouge={'1': 0.5}"]),
    ],
)
def test_what_a_metric_gives_is_checked_when_it_is_tried(
    lab: Lab, tmp_path: Path, metric: str, best: str, told: list[str]
) -> None:
    target = f"eval.metric._target_={_HERE}.{metric}"
    more = _evaluated(tmp_path, target, f"checkpoint.metric_for_best_model={best}")
    assert lab.run_codes(tmp_path, "single", 1, *more) == [2 if told else 0]
    assert all(words in log_text(tmp_path) for words in told)


def test_what_the_main_process_measures_holds_when_a_metric_gives_each_process_its_own(
    lab: Lab, tmp_path: Path
) -> None:
    more = _evaluated(tmp_path, "checkpoint.metric_for_best_model=share", "eval.eval_steps=4")
    each = lab.run(tmp_path / "each", "ddp", 2, *more, f"eval.metric._target_={_HERE}.Shares")
    main = lab.run(tmp_path / "main", "ddp", 2, *more, f"eval.metric._target_={_HERE}.MainOnly")
    assert different(each.checkpoint_dir(10), main.checkpoint_dir(10)) == [], "no gradient of the metric is trained on"
    assert {line["eval_share"] for run in (each, main) for line in lines(run, "eval_loss").values()} == {0.0}
    assert log_text(each.root).count("gave eval_share=0.0 on process 0 and 1.0 on process 1") == 1
    assert "WARNING" not in log_text(main.root)


@pytest.mark.parametrize(("strategy", "count", "dims"), [("single", 1, "[1, 2]"), ("zero2", 2, "[1]")])
def test_a_run_ends_before_its_first_step_when_its_optimizer_fails(
    lab: Lab, tmp_path: Path, strategy: str, count: int, dims: str
) -> None:
    codes = lab.run_codes(tmp_path, strategy, count, f"optim.name={_HERE}.BrokenAdamW")
    run = RunPaths(tmp_path)
    assert 1 in codes and not lines(run)  # the rank that ends first takes the other down
    report = read_reports(run.logs_dir)[0]
    assert (report["kind"], report["training_began"]) == ("ArithmeticError", False)
    assert report["message"] == f"of {dims} dimensions"
    assert "test_rehearsal.py" in report["where"]


class Prodigy(torch.optim.Optimizer):
    """As prodigyopt and D-Adaptation: the estimate of the distance is in the groups, and each process's own."""

    def __init__(self, params: Any, lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "d": 1.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in (p for p in group["params"] if p.grad is not None):
                parameter.sub_(parameter.grad, alpha=group["lr"] * group["d"])
                group["d"] += float(parameter.grad.norm())


@pytest.mark.parametrize(("strategy", "count"), [("single", 1), ("zero2", 2)])
def test_weights_are_equal_after_a_resume_when_the_optimizer_keeps_its_state_in_its_groups(
    lab: Lab, tmp_path: Path, strategy: str, count: int
) -> None:
    more = (f"optim.name={_HERE}.Prodigy", "train.max_steps=6", "checkpoint.save_steps=3")
    run = lab.run(tmp_path, strategy, count, *more)
    (tmp_path / "checkpoint-6").rename(tmp_path / "kept")
    run.run_state.unlink()
    lab.run(tmp_path, strategy, count, *more)
    assert different(tmp_path / "kept", run.checkpoint_dir(6)) == []
    assert "no checkpoint holds" not in log_text(tmp_path)
