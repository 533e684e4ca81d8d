"""A step: its gradients, then what the processes agree on beside the update."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from launcher.model import cpu_attention
from launcher.model.attention import _register
from launcher.train import loop
from launcher.train.step import StepSums, TrainStep
from tests.one_step import build_step, own_accelerator_state, train
from tests.unit.test_catch_up import LiveRun, run_at

__all__ = ["own_accelerator_state"]


def _everything(step: TrainStep) -> list[torch.Tensor]:
    state = copy.deepcopy(step.optimizer.state_dict()["state"])
    moments = [value for one in state.values() for value in one.values() if isinstance(value, torch.Tensor)]
    return [*(parameter.detach().clone() for parameter in step.model.parameters()), *moments]


def _is_same(before: list[torch.Tensor], step: TrainStep) -> bool:
    after = _everything(step)
    return len(before) == len(after) and all(map(torch.equal, before, after))


def test_nothing_changes_before_the_update() -> None:
    step = build_step("padded", "sdpa")
    train(step, 0)
    before, rate = _everything(step), step.schedule.learning_rate
    sums = step.run(1)
    assert sums.is_applied and _is_same(before, step) and step.schedule.learning_rate == rate
    step.update(sums)
    assert not _is_same(before, step) and step.schedule.learning_rate != rate
    assert all(parameter.grad is None for parameter in step.model.parameters())


@pytest.mark.parametrize("share_of_norm", [0.5, 1.0, 1.0000001, 2.0, 0.0])
def test_gradients_are_clipped_as_torch_does_and_only_where_they_are_larger(
    share_of_norm: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = build_step("padded", "sdpa", "train.max_grad_norm=0")
    norm = free.run(0).grad_norm
    limit = share_of_norm * norm
    torch.nn.utils.clip_grad_norm_(free.model.parameters(), limit or math.inf)
    passes: list[float] = []
    scale = torch.nn.utils.clip_grads_with_norm_
    monkeypatch.setattr(
        torch.nn.utils, "clip_grads_with_norm_", lambda *given: (passes.append(given[1]), scale(*given))
    )
    step = build_step("padded", "sdpa", f"train.max_grad_norm={limit!r}")
    assert step.run(0).grad_norm == norm, "of before clipping"
    found = zip(step.model.parameters(), free.model.parameters(), strict=True)
    assert all(torch.equal(a.grad, b.grad) for a, b in found)
    assert bool(passes) == (share_of_norm in (0.5, 1.0, 1.0000001)), "a norm is taken for a millionth larger than it is"


@pytest.mark.parametrize("kernel", ["sdpa", cpu_attention.NAME])
def test_a_row_of_padding_changes_nothing(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _register(cpu_attention.NAME, cpu_attention.attend)
    monkeypatch.setattr("launcher.data.rows._SMALLEST_ROUNDED", 1)
    monkeypatch.setattr("launcher.data.rows._ROUNDING", 1)
    plain, padded = build_step("flat", kernel), build_step("flat", kernel)
    padded._rows.is_rounded = True
    lengths: list[int] = []
    embeddings = padded.model.get_input_embeddings()
    embeddings.register_forward_hook(lambda module, given, _: lengths.append(given[0].shape[1]))
    sums, others = plain.run(0), padded.run(0)
    assert all(length % 8 == 0 for length in lengths) and len(lengths) == 4
    assert (sums.num_tokens, sums.num_labelled) == (others.num_tokens, others.num_labelled)
    assert sums.num_tokens < sum(lengths)
    assert math.isclose(sums.loss_sum, others.loss_sum, rel_tol=1e-6)
    for a, b in zip(plain.model.parameters(), padded.model.parameters(), strict=True):
        assert (a.grad - b.grad).abs().max() <= 1e-5 * a.grad.abs().max()


def test_a_step_trains_whatever_mode_it_finds_the_model_in() -> None:
    step = build_step("padded", "sdpa")
    step.model.eval()
    train(step, 0)
    assert all(module.training for module in step.model.modules())


@pytest.mark.parametrize("kind", ["spike", "left out"])
def test_update_only_counts_the_step_when_there_is_nothing_to_apply(kind: str) -> None:
    step = build_step("padded", "sdpa")
    train(step, 0)
    before, rate = _everything(step), step.schedule.learning_rate
    sums = step.leave_out() if kind == "left out" else step.run(1, 1e-9)
    assert not sums.is_applied and (sums.is_spike, math.isnan(sums.grad_norm)) == ((kind == "spike"),) * 2
    step.update(sums)
    assert _is_same(before, step) and step.schedule.learning_rate != rate
    train(step, 2)
    assert not _is_same(before, step)


@pytest.mark.parametrize("is_left_out", [False, True])
def test_processes_agree_while_they_update(is_left_out: bool) -> None:
    """Each has asked before it updates, and waits for the others after."""
    events: list[str] = []
    run = LiveRun(**{key: value for key, value in vars(run_at(19, [])).items() if key != "step"})

    def begin_sum(values: Sequence[float]) -> Any:
        events.append("asked")
        return lambda: events.append("agreed") or values

    run.train_step = SimpleNamespace(
        run=lambda number, limit: events.append("gradients") or StepSums(1.0, 0.0, 8, 8, 1.0, is_applied=True),
        leave_out=lambda: events.append("left out") or StepSums(0.0, 0.0, 0, 0, 0.0, False, is_left_out=True),
        update=lambda sums: events.append("update"), epoch_after=lambda step: step / 100,
    )  # fmt: skip
    run.spikes = SimpleNamespace(limit=None, is_left_out=lambda step: is_left_out, applied=lambda loss: None)
    run.processes = SimpleNamespace(is_main=True, begin_sum=begin_sum)
    run.stop = SimpleNamespace(knows_end=False, votes=lambda save_s, step_s: (0, 0))
    run.saver._processes = run.processes
    run.saver.checkpointer = SimpleNamespace(status=lambda: (0, 0))
    agreed = loop.train(run)
    assert events == ["left out" if is_left_out else "gradients", "asked", "update", "agreed"]
    assert run.step == 20 and agreed.is_save_due, "it is asked about the step that is being made"
