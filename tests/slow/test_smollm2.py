"""Real input: SmolLM2-135M-Instruct, fine-tuned in chat format under ZeRO-2 on two processes, killed and continued."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]
TOTAL, SAVE, KILL = 20, 10, 12


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package carries the model as GGUF; transformers reads that and saves a plain Llama."""
    target = tmp_path_factory.mktemp("smollm2")
    subprocess.run([sys.executable, "-m", "benchmarks.smollm2", str(target)], check=True, timeout=300)
    return target


def write_chats(path: Path, count: int) -> None:
    with path.open("w", encoding="utf-8") as file:
        for i in range(count):
            a, b = 13 + 7 * i % 89, 11 + 5 * i % 83
            question = f"A shelf holds {a} red books and {b} blue books. How many books are on it?"
            answer = f"<think>{a} + {b} = {a + b}</think>There are {a + b} books on the shelf."
            chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": chat}) + "\n")


def command(model_dir: Path, data: Path, output_dir: Path) -> list[str]:
    return [
        sys.executable, "-m", "launcher.cli", "train",
        f"model.model_name_or_path={model_dir}", f"data.train_files=[{data}/train.jsonl]",
        f"data.eval_files=[{data}/eval.jsonl]", "strategy=zero2", "launch.num_processes=2",
        f"train.max_steps={TOTAL}", "train.train_batch_size=4", "train.per_device_train_batch_size=2",
        "train.logging_steps=1", "optim.learning_rate=1e-4", "eval.eval_strategy=steps", f"eval.eval_steps={SAVE}",
        f"checkpoint.save_steps={SAVE}", f"output_dir={output_dir}",
    ]  # fmt: skip


def logged_steps(output_dir: Path) -> dict[int, float]:
    path = output_dir / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def test_smollm2_is_bit_identical_when_killed_at_step_12(model_dir: Path, tmp_path: Path) -> None:
    """Promise 1, on a real pretrained model."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    write_chats(tmp_path / "train.jsonl", 64)
    write_chats(tmp_path / "eval.jsonl", 8)
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    subprocess.run(command(model_dir, tmp_path, undisturbed), check=True, timeout=1200)

    first = subprocess.Popen(command(model_dir, tmp_path, killed), start_new_session=True)
    deadline = time.monotonic() + 1200
    while max(logged_steps(killed), default=0) < KILL or not (killed / f"checkpoint-{SAVE}").is_dir():
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    subprocess.run(command(model_dir, tmp_path, killed), check=True, timeout=1200)

    assert logged_steps(killed) == logged_steps(undisturbed)
    assert min(logged_steps(killed).values()) < 0.7 * logged_steps(killed)[1], "it learns"
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (killed, undisturbed))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    model, tokenizer = AutoModelForCausalLM.from_pretrained(killed), AutoTokenizer.from_pretrained(killed)
    prompt = [{"role": "user", "content": "A shelf holds 20 red books and 22 blue books. How many books are on it?"}]
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = tokenizer.decode(model.generate(**ids, max_new_tokens=40, do_sample=False)[0], skip_special_tokens=True)
    assert "books" in answer.rpartition("assistant")[2]
