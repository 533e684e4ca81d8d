"""`eval.eval_every_s`: agreed between the processes, and what is best by it is saved."""

from __future__ import annotations

import json
from pathlib import Path

from launcher.base import files
from tests.distributed.runs import Lab, lines, state, write_rows


def test_evaluation_by_the_clock_is_agreed_and_the_best_is_kept(lab: Lab, tmp_path: Path) -> None:
    write_rows(tmp_path / "eval.jsonl", 8)
    slow = [{"kind": "sleep", "rank": 1, "seconds": 3.5, "step": 4}]  # the others take 3 s on no machine
    more = (
        f"data.eval_files=[{tmp_path / 'eval.jsonl'}]", "eval.eval_strategy=steps", "eval.eval_steps=1000",
        "eval.eval_every_s=3", "checkpoint.save_steps=1000", "checkpoint.save_total_limit=null", "train.max_steps=10",
        "checkpoint.load_best_model_at_end=true", "optim.learning_rate=1e-3",
    )  # fmt: skip
    run = lab.run(tmp_path / "run", "zero2", 2, *more, env={"FAULTS": json.dumps(slow)})
    evaluated = lines(run, "eval_loss")
    first = min(evaluated)
    assert len(evaluated) >= 2 and max(evaluated) == 10 and 1 < first <= 4
    assert run.checkpoint_dir(first).is_dir(), "the best so far was not kept"
    assert state(run.checkpoint_dir(10))["progress"]["seconds_since_eval"] == 0.0
    assert files.read_json(run.run_state)["best_step"] in evaluated
