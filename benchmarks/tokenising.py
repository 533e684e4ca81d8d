"""Rows per second from a JSON Lines file to tokens and loss masks on disk: ours against TRL's SFTTrainer, in turns.

    python -m benchmarks.smollm2 FOLDER
    python -m benchmarks.tokenising FOLDER [--pairs N]

Each measurement is a process of its own; imports, and the model that an SFTTrainer wants to see, are not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, Spread, machine, table

RECORD = ROOT / "benchmarks" / "records" / "tokenising.json"
MAX_LENGTH = 4096
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
)
"""SmolLM2's own with the tags by which TRL finds the assistant's words."""


def shapes(draw: random.Random) -> dict[str, tuple[int, Callable[[], int], Callable[[], int]]]:
    """Name → (rows, turns of a row, words of a turn)."""
    return {
        "chats of 2 to 8 turns, uneven": (
            3000, lambda: 2 * draw.randint(1, 4), lambda: int(min(600, max(3, draw.lognormvariate(3.8, 1))))
        ),
        "2 turns of 2000 words": (400, lambda: 2, lambda: 2000),
        "100 turns of 20 words": (400, lambda: 100, lambda: 20),
    }  # fmt: skip


def write_rows(folder: Path) -> dict[str, Path]:
    """Words of the standard library's sources, so that the text has rare ones too."""
    sources = sorted(Path(json.__file__).parents[1].glob("*.py"))[:60]
    words = " ".join(path.read_text(encoding="utf-8", errors="ignore") for path in sources).split()
    draw, files = random.Random(1), {}
    for name, (num_rows, turns, length) in shapes(draw).items():
        path = files[name] = folder / f"{len(files)}.jsonl"
        with path.open("w", encoding="utf-8") as file:
            for _ in range(num_rows):
                messages = []
                for i in range(turns()):
                    size = length()
                    start = draw.randrange(len(words) - size)
                    content = " ".join(words[start : start + size])
                    messages.append({"role": ("user", "assistant")[i % 2], "content": content})
                file.write(json.dumps({"messages": messages}) + "\n")
    return files


def ours(file: Path, tokenizer: Any, folder: Path) -> tuple[float, int, int]:
    """(seconds, tokens, tokens with loss)"""
    from launcher.base.devices import num_cores
    from launcher.data.cache import build_store, open_store
    from launcher.data.formats import Formatter
    from launcher.data.sources import FileSource

    started, store_dir = time.perf_counter(), folder / "tokens" / "key"
    build_store(
        store_dir, FileSource((file,)), Formatter(tokenizer, MAX_LENGTH, None), on_bad_row="stop",
        num_workers=num_cores(),
    )  # fmt: skip
    seconds, store = time.perf_counter() - started, open_store(store_dir)
    assert store is not None
    return seconds, len(store.tokens), int(store.mask.sum())


def trl(file: Path, tokenizer: Any, folder: Path, num_proc: int | None) -> tuple[float, int, int]:
    os.environ["HF_DATASETS_CACHE"] = str(folder)
    from datasets import load_dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    seconds = [0.0]

    class Timed(SFTTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, *arguments: Any, **named: Any) -> Any:
            began = time.perf_counter()
            prepared = super()._prepare_dataset(*arguments, **named)
            seconds[0] += time.perf_counter() - began
            return prepared

    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1,
    )  # fmt: skip
    started = time.perf_counter()
    rows = load_dataset("json", data_files=str(file), split="train", cache_dir=str(folder))
    seconds[0] += time.perf_counter() - started
    trainer = Timed(
        LlamaForCausalLM(config), processing_class=tokenizer, train_dataset=rows,
        args=SFTConfig(str(folder / "out"), max_length=MAX_LENGTH, assistant_only_loss=True, report_to=[], use_cpu=True,
                       dataset_num_proc=num_proc, bf16=False, gradient_checkpointing=False),
    )  # fmt: skip
    made = trainer.train_dataset
    masks = made["assistant_masks"] if "assistant_masks" in made.column_names else made["labels"]
    return (
        seconds[0], sum(min(MAX_LENGTH, len(ids)) for ids in made["input_ids"]),
        sum(sum(value not in (0, -100) for value in mask[:MAX_LENGTH]) for mask in masks),
    )  # fmt: skip


def child(contender: str, file: Path, tokenizer_dir: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    tokenizer.chat_template = TEMPLATE
    with tempfile.TemporaryDirectory() as folder:
        if contender == "ours":
            found = ours(file, tokenizer, Path(folder))
        else:
            found = trl(file, tokenizer, Path(folder), os.cpu_count() if contender == "trl, every core" else None)
    print("FOUND", json.dumps(found))


def measure(contender: str, file: Path, tokenizer_dir: Path) -> tuple[float, int, int]:
    command = [sys.executable, "-m", "benchmarks.tokenising", str(tokenizer_dir), "--child", contender, str(file)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    line = next((line for line in done.stdout.splitlines() if line.startswith("FOUND ")), None)
    if line is None:
        sys.exit(f"{contender}: {done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    seconds, num_tokens, num_labelled = json.loads(line.removeprefix("FOUND "))
    return seconds, num_tokens, num_labelled


def pairs_of(files: dict[str, Path], tokenizer_dir: Path, num_pairs: int) -> Iterator[dict[str, Any]]:
    for name, file in files.items():
        num_rows = len(file.read_text().splitlines())
        rates: dict[str, list[float]] = {"ours": [], "trl": [], "trl, every core": []}
        tokens: dict[str, tuple[int, int]] = {}
        for _ in range(num_pairs):
            for contender in rates:
                seconds, *tokens[contender] = measure(contender, file, tokenizer_dir)  # type: ignore[assignment]
                rates[contender].append(num_rows / seconds)
        if len({tuple(value) for value in tokens.values()}) != 1:
            sys.exit(f"{name}: not the same tokens and masks: {tokens}")
        yield {"rows": name, "num_rows": num_rows, "tokens_and_labelled": tokens["ours"], "rows_per_second": rates}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", type=Path, help="folder of SmolLM2's tokenizer")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child[0], Path(options.child[1]), options.tokenizer)
        return
    folder = Path(tempfile.mkdtemp())
    try:
        found = list(pairs_of(write_rows(folder), options.tokenizer, options.pairs))
        record = {
            "command": f"python -m benchmarks.tokenising FOLDER --pairs {options.pairs}",
            "date": time.strftime("%Y-%m-%d"), "machine": machine(folder), "found": found,
        }  # fmt: skip
    finally:
        shutil.rmtree(folder)
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    lines = []
    for entry in found:
        rates = entry["rows_per_second"]
        ratios = [
            Spread.of([a / b for a, b in zip(rates["ours"], rates[peer], strict=True)])
            for peer in ("trl", "trl, every core")
        ]
        spreads = [Spread.of(rates[name]).text(digits=0) for name in rates]
        lines.append([entry["rows"], *spreads, *(ratio.text(digits=2) for ratio in ratios)])
    print(table(["rows", *(f"{n}, rows/s" for n in found[0]["rows_per_second"]), "ours / trl", "/ every core"], lines))


if __name__ == "__main__":
    main()
