"""Optimizer groups and the schedule as a function of the step."""

from __future__ import annotations

import pytest
import torch
from transformers import get_scheduler

from launcher.base.errors import ConfigError
from launcher.checkpoint.load import scalar_of
from launcher.checkpoint.segments import Segment
from launcher.config.settings import RunConfig
from launcher.model.optim import Schedule, build_optimizer

TOTAL = 40


def model() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 2, bias=False))


def config(kind: str = "cosine", **scheduler: object) -> RunConfig:
    made = RunConfig()
    made.optim.learning_rate, made.optim.weight_decay = 0.1, 0.5
    made.scheduler.lr_scheduler_type = kind
    for name, value in scheduler.items():
        setattr(made.scheduler, name, value)
    return made


def test_weight_decay_spares_norms_and_biases() -> None:
    module = model()
    groups = build_optimizer(config(), module).param_groups
    decayed, spared = ({id(p) for p in g["params"]} for g in groups)
    assert [g["weight_decay"] for g in groups] == [0.5, 0.0]
    assert decayed == {id(module[0].weight), id(module[2].weight)}
    assert spared == {id(module[0].bias), id(module[1].weight), id(module[1].bias)}


@pytest.mark.parametrize(
    "kind",
    ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"],
)
def test_learning_rate_is_transformers_at_every_step_when_resumed_there(kind: str) -> None:
    plain = torch.optim.SGD(model().parameters(), lr=0.1)
    reference = get_scheduler(kind, plain, num_warmup_steps=5, num_training_steps=TOTAL)
    wanted = []
    for _ in range(TOTAL):
        wanted.append(plain.param_groups[0]["lr"])
        plain.step()
        reference.step()
    for step in range(TOTAL):
        optimizer = build_optimizer(config(), model())
        schedule = Schedule(config(kind, warmup_steps=5), optimizer, TOTAL)
        schedule.load(schedule.state(), step)
        rates = []
        for _ in range(step, TOTAL):
            rates.append(schedule.learning_rate)
            optimizer.step()
            schedule.step()
        assert rates == wanted[step:]


def test_warmup_below_one_is_a_fraction_of_all_steps() -> None:
    optimizer = build_optimizer(config(), model())
    schedule = Schedule(config("constant_with_warmup", warmup_steps=0.25), optimizer, TOTAL)
    for _ in range(5):
        optimizer.step()
        schedule.step()
    assert schedule.learning_rate == pytest.approx(0.1 * 5 / 10)


def test_plateau_goes_on_with_its_patience_when_resumed() -> None:
    def run(resume_after: int | None) -> list[float]:
        kind = config("reduce_lr_on_plateau", lr_scheduler_kwargs={"patience": 1, "factor": 0.5})
        optimizer = build_optimizer(kind, model())
        schedule = Schedule(kind, optimizer, TOTAL)
        rates = []
        for i, metric in enumerate([3.0, 2.0, 2.1, 2.2, 2.3, 2.4, 2.5]):
            if i == resume_after:
                state = schedule.state()
                optimizer = build_optimizer(kind, model())
                schedule = Schedule(kind, optimizer, TOTAL)
                schedule.load(state, i)
            schedule.evaluated(metric)
            rates.append(schedule.learning_rate)
        return rates

    undisturbed = run(None)
    assert undisturbed[-1] < 0.1
    assert all(run(i) == undisturbed for i in range(1, 7))


def test_optimizer_is_refused_with_the_key_when_it_does_not_exist() -> None:
    wrong = config()
    wrong.optim.name = "torch.optim.Adamm"
    with pytest.raises(ConfigError, match=r"optim\.name=torch\.optim\.Adamm"):
        build_optimizer(wrong, model())


def test_update_is_one_kernel_unless_another_way_is_asked_for() -> None:
    assert build_optimizer(config(), model()).defaults["fused"] is True
    asked = config()
    asked.optim.kwargs = {"foreach": True}
    assert not build_optimizer(asked, model()).defaults["fused"]
    asked.optim.name, asked.optim.kwargs = "torch.optim.Adadelta", {}  # it has no such kernel
    assert "fused" not in build_optimizer(asked, model()).defaults


@pytest.mark.parametrize(
    ("name", "is_fused", "was_on_host", "expected"),
    [
        ("ASGD", False, False, "meta"), ("Adam", False, True, "cpu"), ("Adam", False, None, "cpu"),
        ("AdamW", True, False, "meta"), ("AdamW", True, True, "meta"),
    ],
)  # fmt: skip
def test_scalars_of_a_state_lie_where_the_optimizer_has_them_when_it_goes_on(
    name: str, is_fused: bool, was_on_host: bool | None, expected: str
) -> None:
    """Parameters of a device, for which "meta" stands. Where they lie decides which kernels compute."""
    key = torch.nn.Parameter(torch.empty(4, device="meta"))
    optimizer = getattr(torch.optim, name)([key])
    optimizer.param_groups[0]["fused"] = is_fused
    kind = None if was_on_host is None else {"dtype": "F32", "is_on_host": was_on_host}
    found = scalar_of(Segment(key.detach(), optimizer, 0, (), (), key), 3.0, kind)
    assert (found.device.type, found.dtype) == (expected, torch.float32)
