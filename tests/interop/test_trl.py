"""TRL's SFTTrainer and ours train on the same tokens of the same rows, with the same losses: promise 7."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from launcher.config.compose import compose
from launcher.data import StepSampler, build_data, build_tokenizer
from launcher.data.tokenizer import byte_tokenizer
from tests.distributed.zygote import ROOT, environment
from tests.interop.bench import LLAMA, Bench
from tests.unit.data.test_chat_templates import FOLDER, TOOL, assistant, parts, user

pytestmark = pytest.mark.slow

_NUM_STEPS, _BATCH = 6, 4
_WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]


def words(i: int) -> str:
    return " ".join(_WORDS[(i * j + j) % 8] for j in range(2 + i % 5))


def turns(i: int, count: int) -> list[dict[str, Any]]:
    return [make(words(i + k)) for k in range(count) for make in (user, assistant)]


def call(i: int) -> list[dict[str, Any]]:
    """A question, a call of a tool, its answer, and what is made of it."""
    made = {"type": "function", "function": {"name": "add", "arguments": {"a": i}}}
    return [
        user(words(i)), assistant("", tool_calls=[made]), {"role": "tool", "name": "add", "content": str(i)},
        assistant(words(i + 1)),
    ]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    rows: list[dict[str, Any]]
    trl: dict[str, Any] = dataclasses.field(default_factory=dict)
    ours: tuple[str, ...] = ()
    template: str | None = None
    """The stock chat template of TRL's; None: the one of the byte tokenizer."""


_ASSISTANT = {"assistant_only_loss": True}
_N = range(26)
CASES = {
    "text": Case([{"text": words(i)} for i in _N]),
    "text_cut": Case([{"text": words(i)} for i in _N], {"max_length": 20}, ("data.max_length=20",)),
    "completion": Case([{"prompt": words(i), "completion": " " + words(i + 3)} for i in _N]),
    "completion_whole": Case(
        [{"prompt": words(i), "completion": " " + words(i + 3)} for i in _N], {"completion_only_loss": False},
        ("data.completion_only_loss=false",),
    ),
    "chat_completion": Case([{"prompt": [user(words(i))], "completion": [assistant(words(i + 3))]} for i in _N]),
    "chat": Case([{"messages": turns(i, 1 + i % 3)} for i in _N], _ASSISTANT),
    "chat_whole": Case([{"messages": turns(i, 2)} for i in _N], {}, ("data.completion_only_loss=false",)),
    "think": Case(
        [{"messages": [user(words(i)), assistant(words(i + 1), reasoning_content=words(i + 2))]} for i in _N],
        _ASSISTANT,
    ),
    "think_qwen3": Case(
        [{"messages": [user(words(i)), assistant(f"<think>\n{words(i)}\n</think>\n\n{words(i + 1)}")]} for i in _N],
        _ASSISTANT, template="qwen3",
    ),
    "tools_qwen2_5": Case(
        [{"messages": call(i), "tools": [TOOL]} for i in _N], _ASSISTANT, template="qwen2_5_training"
    ),
    "tools_qwen3": Case([{"messages": call(i), "tools": [TOOL]} for i in _N], _ASSISTANT, template="qwen3_training"),
    "system_llama3": Case(
        [{"messages": [{"role": "system", "content": words(i)}, *turns(i, 2)]} for i in _N], _ASSISTANT,
        template="llama3",
    ),
    "parts_gemma3": Case(
        [{"messages": [{"role": "user", "content": parts(words(i))},
                       {"role": "assistant", "content": parts(words(i + 1))}]} for i in _N],
        _ASSISTANT, template="gemma3",
    ),
    "micro_batches": Case(
        [{"text": words(i)} for i in _N], {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        ("train.per_device_train_batch_size=2",),
    ),
}  # fmt: skip
"""In micro_batches, labelled tokens differ between the two halves of a step.

With tools both get TRL's own variant of the template. Of Qwen's stock ones TRL trains on what they do not print: on the
line break that the generation prompt brings (Qwen2.5), and on empty thoughts in a call (Qwen3).
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trl") / "base"
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    config = AutoConfig.for_model(**LLAMA, vocab_size=272, pad_token_id=tokenizer.pad_token_id,
                                  eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id)  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def overrides(case: Case, base: Path, folder: Path) -> list[str]:
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in case.rows))
    template = [f"data.chat_template={FOLDER / f'{case.template}.jinja'}"] if case.template else []
    return [
        "model=pretrained", f"model.model_name_or_path={base}", f"data.train_files=[{rows}]",
        f"train.max_steps={_NUM_STEPS}", f"train.train_batch_size={_BATCH}",
        f"train.per_device_train_batch_size={_BATCH}", "scheduler=constant", "scheduler.warmup_steps=0",
        "checkpoint=off", "strategy=single", "data.max_length=2048", *template, *case.ours,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def theirs(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """TRL on every case, the rows in the order in which ours takes them."""
    folder, cases = tmp_path_factory.mktemp("theirs"), {}
    for name, case in CASES.items():
        sampler = StepSampler(len(case.rows), _BATCH, compose(["data=arithmetic", "model=tiny_llama"]).seed)
        order = np.concatenate([sampler.rows_of_step(step) for step in range(_NUM_STEPS)]).tolist()
        cases[name] = {
            "rows": [case.rows[i] for i in order], "num_steps": _NUM_STEPS, "model": str(base),
            "template": (FOLDER / f"{case.template}.jinja").read_text() if case.template else None,
            "settings": {"max_length": 2048, "per_device_train_batch_size": _BATCH, **case.trl},
        }  # fmt: skip
    (folder / "cases.json").write_text(json.dumps(cases))
    command = [sys.executable, "-m", "tests.interop.trl_run", str(folder / "cases.json")]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=500)
    lines = [line for line in done.stdout.splitlines() if line.startswith("CASES ")]
    assert done.returncode == 0 and lines, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    found: dict[str, dict[str, Any]] = json.loads(lines[-1].removeprefix("CASES "))
    return found


@pytest.mark.parametrize("name", CASES)
def test_tokens_and_losses_are_those_of_trl_when_rows_are(
    bench: Bench, base: Path, theirs: dict[str, dict[str, Any]], tmp_path: Path, name: str
) -> None:
    more = overrides(CASES[name], base, tmp_path)
    config = compose(bench.overrides(tmp_path / "run", *more))
    data = build_data(config, build_tokenizer(config), is_builder=True, wait=lambda: None)
    sampler = StepSampler(len(data.train), _BATCH, config.seed)
    order = np.concatenate([sampler.rows_of_step(step) for step in range(_NUM_STEPS)])
    for i, (tokens, labels) in zip(order, theirs[name]["rows"], strict=True):
        ((own, mask),) = data.train.segments(int(i))
        assert own.tolist() == tokens
        assert (
            np.where(mask, own.astype(np.int64), -100).tolist()[1:] == labels[1:]
        )  # the first token is predicted by none
    losses = bench.ours(tmp_path / "run", *more)
    assert list(losses) == list(range(1, _NUM_STEPS + 1))
    assert losses[1] == pytest.approx(theirs[name]["losses"][0], rel=1e-5)
    assert list(losses.values()) == pytest.approx(theirs[name]["losses"], rel=1e-4)
