"""The built-in data set says what is true, and exact match counts what is right."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from launcher.data import EvalContext
from launcher.data.arithmetic import ArithmeticData, ExactMatch, chat

ROWS = list(ArithmeticData()("train"))
PINNED_QUESTIONS = ["What is 74 - 15?", "What is 79 - 60?", "What is 38 + 83?"]


def answer_of(row: dict[str, Any]) -> str:
    return str(row["messages"][1]["content"])


def test_rows_are_true() -> None:
    for row in ROWS + list(ArithmeticData()("eval")):
        question, content = (message["content"] for message in row["messages"])
        a, b = map(int, re.findall(r"\d+", question))
        is_sum = "+" in question or question.startswith("Add")
        thought, answer = content.removeprefix("<think>").split("</think>")
        assert int(answer) == (a + b if is_sum else a - b) >= 0
        for step in thought.split(", "):
            left, right = step.split("=")
            terms = list(map(int, re.split(r"[+-]", left)))
            assert int(right) == (sum(terms) if is_sum else terms[0] - sum(terms[1:]))


def test_rows_are_worded_and_reasoned_as_shown() -> None:
    (question, answer) = chat(47, "+", 38)["messages"]
    assert question == {"role": "user", "content": "What is 47 + 38?"}
    assert answer == {"role": "assistant", "content": "<think>7+8=15, 4+3+1=8</think>85"}
    assert answer_of(chat(52, "-", 38)) == "<think>12-8=4, 5-3-1=1</think>14"
    assert answer_of(chat(52, "-", 50)) == "<think>2-0=2, 5-5-0=0</think>2"


def test_held_out_problems_are_not_trained_on() -> None:
    def problems(rows: Sequence[dict[str, Any]]) -> set[tuple[bool, tuple[str, ...]]]:
        questions = [row["messages"][0]["content"] for row in rows]
        return {("+" in q or "Add" in q, tuple(re.findall(r"\d+", q))) for q in questions}

    data = ArithmeticData(num_train=500, num_eval=100)
    train, held_out = list(data("train")), list(data("eval"))
    assert (len(train), len(held_out)) == (500, 100)
    assert not problems(train) & problems(held_out)
    assert len(problems(train) | problems(held_out)) == 600


def test_rows_are_the_same_every_time_and_differ_by_seed() -> None:
    assert list(ArithmeticData()("train")) == ROWS
    assert list(ArithmeticData(seed=1)("train")) != ROWS
    assert [row["messages"][0]["content"] for row in ROWS[:3]] == PINNED_QUESTIONS


# ---------------------------------------------------------------------- exact match


class Oracle(torch.nn.Module):
    """Writes the answers that it was told, whatever it is asked, and checks how it is called."""

    def __init__(self, tokenizer: Any, answers: dict[str, str]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.tokenizer, self.answers, self.calls = tokenizer, answers, 0

    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self.calls += 1
        self.kwargs = kwargs
        assert attention_mask[:, -1].all()  # padded on the left
        prompts = self.tokenizer.batch_decode(input_ids * attention_mask + 256 * (1 - attention_mask))
        answers = [self.answers[prompt.replace("<|pad|>", "")] + "<|end|>" for prompt in prompts]
        tokens = self.tokenizer(answers, padding=True, padding_side="right", return_tensors="pt")["input_ids"]
        return torch.cat([input_ids, tokens], dim=1)


def context(tokenizer: Any, model: Any, rows: list[dict[str, Any]], **kwargs: Any) -> EvalContext:
    settings = {"rank": 0, "world_size": 1, "sum_over_processes": lambda values: values, "batch_size": 4} | kwargs
    return EvalContext(model=model, tokenizer=tokenizer, rows=rows, device=torch.device("cpu"), **settings)


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    return ROWS[:11]


@pytest.fixture
def oracle(tokenizer: Any, rows: list[dict[str, Any]]) -> Oracle:
    """Right in all rows but the third and the last, where it is wrong and unfinished."""
    answers = {}
    for i, row in enumerate(rows):
        prompt = tokenizer.apply_chat_template(row["messages"][:1], tokenize=False, add_generation_prompt=True)
        answers[prompt] = {2: "<think>x</think>1", 10: "<think>"}.get(i, answer_of(row))
    return Oracle(tokenizer, answers)


def test_exact_match_is_the_share_of_right_answers(tokenizer: Any, rows: list[dict[str, Any]], oracle: Oracle) -> None:
    assert ExactMatch()(context(tokenizer, oracle, rows)) == {"exact_match": 9 / 11}
    assert ExactMatch(max_rows=2)(context(tokenizer, oracle, rows)) == {"exact_match": 1.0}
    assert oracle.kwargs["do_sample"] is False
    assert oracle.kwargs["synced_gpus"] is False


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 16])
def test_exact_match_is_exact_on_any_number_of_processes(
    tokenizer: Any, rows: list[dict[str, Any]], oracle: Oracle, world_size: int
) -> None:
    sums, calls = [0.0, 0.0], set()

    def add(values: list[float]) -> list[float]:
        sums[0], sums[1] = sums[0] + values[0], sums[1] + values[1]
        return values

    for rank in range(world_size):
        oracle.calls = 0
        ExactMatch()(
            context(tokenizer, oracle, rows, rank=rank, world_size=world_size, batch_size=2, sum_over_processes=add)
        )
        calls.add(oracle.calls)
    assert sums == [9.0, 11.0]
    assert len(calls) == 1  # ZeRO-3 hangs where one process generates more often than another


def test_exact_match_when_weights_are_partitioned(tokenizer: Any, rows: list[dict[str, Any]], oracle: Oracle) -> None:
    oracle.weight.ds_id = 0  # as DeepSpeed marks them
    ExactMatch()(context(tokenizer, oracle, rows))
    assert oracle.kwargs["synced_gpus"] is True


def test_exact_match_when_rows_are_prompt_and_completion(tokenizer: Any) -> None:
    oracle = Oracle(tokenizer, {"<|user|>q<|end|><|assistant|>": "<think>z</think> 7 "})
    text = [{"prompt": "q", "completion": "<think>y</think>7"}]
    turns = [{"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "7"}]}]
    assert (
        ExactMatch()(context(tokenizer, oracle, text))
        == ExactMatch()(context(tokenizer, oracle, turns))
        == {"exact_match": 1.0}
    )
