"""Settings that `launcher train` hands to its ranks are those that they would compose."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from launcher.config.compose import compose_arguments
from launcher.config.handed_on import COMPOSED, hand_on, take_over

_CASES: list[list[str]] = [
    [],
    [
        "+data.generator._target_=my.Rows",
        "+data.generator.name='b ü'",
        "model.model_name_or_path=org/name",
        "optim.learning_rate=1e-5",
    ],
    ["experiment=openr1_distill", "launch.num_processes=8", "model.dtype=bfloat16"],
    ["optim.kwargs.betas=[0.9,0.95]", "scheduler=cosine", "checkpoint=all", "strategy=zero3"],
    ["model/peft=lora", "model.peft.r=4", "launch.env.A='{\"b\": 1}'", "train.on_spike=rollback"],
]


@pytest.mark.parametrize("arguments", _CASES)
def test_settings_are_the_same_when_they_are_handed_on(arguments: list[str]) -> None:
    env: dict[str, str] = {}
    composed = compose_arguments(arguments)
    hand_on(composed, arguments, env)
    assert take_over(arguments, env) == composed
    assert env == {}, "programs of the user's code do not inherit it"


def test_nothing_is_taken_over_when_the_arguments_are_others() -> None:
    env: dict[str, str] = {}
    hand_on(compose_arguments(["seed=1"]), ["seed=1"], env)
    assert COMPOSED in env
    assert take_over(["seed=2"], env) is None and env == {}
    assert take_over(["seed=2"], env) is None


@pytest.mark.parametrize(
    "text", ["", "nonsense", "null", "[]", "{}", '{"arguments": []}', '{"arguments": [], "settings": {"sed": 1}}']
)
def test_nothing_is_taken_over_when_the_variable_holds_something_else(text: str) -> None:
    env = {COMPOSED: text}
    assert take_over([], env) is None and env == {}


@pytest.mark.parametrize("value", [{1: 2}, {"a": float}, {"a": "x" * 200_000}])
def test_settings_are_composed_anew_when_the_environment_cannot_hold_them(value: dict[Any, Any]) -> None:
    config = compose_arguments([])
    config.optim.kwargs = value
    env = {COMPOSED: "of an outer launcher"}
    hand_on(config, [], env)
    assert env == {}


def test_ranks_import_no_hydra_when_the_settings_are_handed_on() -> None:
    env: dict[str, str] = {}
    hand_on(compose_arguments([]), [], env)
    script = (
        "import sys; from launcher.train import __main__ as main\n"
        "assert main.take_over([]) is not None\n"
        "sys.exit(' '.join(sorted({'hydra', 'omegaconf'} & set(sys.modules))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env={**env, "PATH": ""}, capture_output=True, text=True, check=False
    )
    assert done.stderr.strip() == ""
