"""The built-in data set: sums and differences as chats with their reasoning, and the metric that reads the answers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from launcher.data.evaluation import EvalContext

_NUMBERS = range(10, 100)  # two digits each
_NUM_SHOWN = 4
"""Answers that each evaluation shows."""
_WORDINGS = {
    "+": ("What is {a} + {b}?", "Add {a} and {b}."),
    "-": ("What is {a} - {b}?", "Reduce {a} by {b}."),
}


class ArithmeticData:
    """Every sum and difference of two two-digit numbers with no negative result, shuffled; some of them held out.

    The same rows on every machine and in every version of numpy; no question is in both splits.

    Args:
        num_train: training rows; None: all that are not held out (about 12,000).
        num_eval: held-out rows.
        seed: of the shuffle.
    """

    def __init__(self, num_train: int | None = None, num_eval: int = 256, seed: int = 0) -> None:
        self.num_train = num_train
        self.num_eval = num_eval
        self.seed = seed

    def __call__(self, split: str) -> Iterator[dict[str, Any]]:
        """The rows of `train` or `eval`: a question, the reasoning in <think>, the answer."""
        problems = [
            (a, operator, b) for operator in _WORDINGS for a in _NUMBERS for b in _NUMBERS if operator == "+" or a >= b
        ]
        draws = np.random.PCG64(np.random.SeedSequence([self.seed])).random_raw(len(problems))
        order = np.argsort(draws, kind="stable")
        end = None if self.num_train is None else self.num_eval + self.num_train
        chosen = order[: self.num_eval] if split == "eval" else order[self.num_eval : end]
        for i in chosen.tolist():
            a, operator, b = problems[i]
            yield chat(a, operator, b, wording=int(draws[i]) % 2)


def chat(a: int, operator: str, b: int, wording: int = 0) -> dict[str, Any]:
    """One row: `<think>7+8=15, 4+3+1=8</think>85` answers `What is 47 + 38?`."""
    question = _WORDINGS[operator][wording].format(a=a, b=b)
    ones, tens, answer = _reason(a, operator, b)
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": f"<think>{ones}, {tens}</think>{answer}"},
        ]
    }


def _reason(a: int, operator: str, b: int) -> tuple[str, str, int]:
    """Column arithmetic, ones first, with the carry or the borrowed ten written out."""
    (a_tens, a_ones), (b_tens, b_ones) = divmod(a, 10), divmod(b, 10)
    if operator == "+":
        ones = a_ones + b_ones
        carry = ones // 10
        return f"{a_ones}+{b_ones}={ones}", f"{a_tens}+{b_tens}+{carry}={a_tens + b_tens + carry}", a + b
    borrow = int(a_ones < b_ones)
    ones = a_ones + 10 * borrow - b_ones
    tens = a_tens - b_tens - borrow
    return f"{a_ones + 10 * borrow}-{b_ones}={ones}", f"{a_tens}-{b_tens}-{borrow}={tens}", a - b


class ExactMatch:
    """The share of held-out questions whose generated answer is the given one, the text after `</think>` compared.

    Greedy, in batches padded on the left, every process with its own share of the questions.

    Args:
        max_new_tokens: of an answer with its reasoning; longer ones are cut and count as wrong.
        max_rows: only the first so many held-out rows; None: all.
    """

    def __init__(self, max_new_tokens: int = 48, max_rows: int | None = None) -> None:
        self.max_new_tokens = max_new_tokens
        self.max_rows = max_rows

    def __call__(self, context: EvalContext) -> dict[str, float]:
        """{"exact_match": share}. Collective; every process makes the same number of generate calls."""
        rows = list(context.rows[: self.max_rows])
        own = rows[context.rank :: context.world_size]
        longest = -(-len(rows) // context.world_size)
        matches = 0
        for start in range(0, longest, context.batch_size):
            batch = own[start : start + context.batch_size]
            answers = self._generate(context, batch or rows[:1])  # ZeRO-3 gathers weights in every call
            matches += sum(_final(answer) == _expected(row) for answer, row in zip(answers, batch, strict=False))
            for answer, row in zip(answers, batch[: _NUM_SHOWN - start], strict=False) if start < _NUM_SHOWN else ():
                prompt, expected = _prompt(row)[-1]["content"], _expected(row)
                context.show(prompt=prompt, answer=answer, expected=expected, is_right=_final(answer) == expected)
        total, count = context.sum_over_processes([float(matches), float(len(own))])
        return {"exact_match": total / max(count, 1.0)}

    def _generate(self, context: EvalContext, rows: list[dict[str, Any]]) -> list[str]:
        import torch

        from launcher.base._deepspeed import is_partitioned

        tokenizer = context.tokenizer
        prompts = [
            tokenizer.apply_chat_template(_prompt(row), tokenize=False, add_generation_prompt=True) for row in rows
        ]
        inputs = tokenizer(
            prompts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt"
        ).to(context.device)
        has_parts = any(map(is_partitioned, context.model.parameters()))
        with torch.no_grad():
            tokens = context.model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=self.max_new_tokens,
                do_sample=False,
                use_cache=True,  # training switches it off in the model's config
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
                synced_gpus=has_parts,
            )
        texts: list[str] = tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return texts


def _prompt(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The turns before the last assistant turn, which is what a model has to write."""
    if "messages" in row:
        return list(row["messages"][:-1])
    prompt = row["prompt"]
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def _expected(row: dict[str, Any]) -> str:
    last = row["messages"][-1]["content"] if "messages" in row else row["completion"]
    return _final(last if isinstance(last, str) else last[-1]["content"])


def _final(text: str) -> str:
    """What comes after the reasoning."""
    return text.rpartition("</think>")[2].strip()
