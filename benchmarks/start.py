"""From the command to the end of the first step, beside a bare Accelerate script of the same job.

    python -m benchmarks.start [--pairs N] [--strategy ddp zero2] [--json FILE]

Two processes on the CPU train a small Llama from a folder on chats. In turns: the bare script (`benchmarks.bare_job`:
tokenizer, rows, model, optimizer, prepare, one step), `launcher train` in a new folder with nothing in the token cache,
and the same command again, which goes on from the checkpoint of the first. A start ends when its first step is written
down.
The second table says where the time of `launcher train` goes, seen from outside.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common import ACCELERATE_CONFIG, RECORDS_DIR, ROOT, Record, Spread, machine, start_command, table
from benchmarks.throughput import write_chats

_POLL_S = 0.005
_LIMIT_S = 300.0
MODEL: dict[str, Any] = {
    "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6,
    "num_key_value_heads": 6, "max_position_embeddings": 1024,
}  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ m.content }}\n{% endif %}{% endfor %}"
)


def write_model(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from launcher.data.tokenizer import byte_tokenizer

    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **MODEL)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class Start:
    """A command that was started, followed until its first step is written down."""

    def __init__(self, command: list[str], log: Path) -> None:
        self._log, self.began = log, time.time()
        self._process = start_command(command, log)

    def wait_for(self, what: Callable[[], Any]) -> float:
        """Seconds from the start until it is so."""
        while not what():
            if self._process.poll() is not None or time.time() - self.began > _LIMIT_S:
                sys.exit(f"it ended without a step:\n{self._log.read_text()[-4000:]}")
            time.sleep(_POLL_S)
        return time.time() - self.began

    def has_child(self, *words: str) -> bool:
        """Whether a process of its session has these words in its command."""
        for folder in Path("/proc").iterdir():
            if not folder.name.isdigit():
                continue
            try:
                text = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if all(word in text for word in words) and int(folder.name) != self._process.pid:
                    return True
            except OSError:
                continue
        return False

    def stop(self, number: int) -> None:
        """Ends it and waits; SIGTERM lets `launcher train` save."""
        os.killpg(self._process.pid, number)
        self._process.wait()


def bare(work_dir: Path, strategy: str, number: int) -> float:
    done = work_dir / f"bare-{strategy}-{number}"
    spec = {"strategy": strategy, "model": str(work_dir / "model"), "rows": str(work_dir / "chats.jsonl")}
    start = Start(
        [*accelerate_launch(), "-m", "benchmarks.bare_job", json.dumps({**spec, "done": str(done)})],
        work_dir / f"bare-{number}.log",
    )
    seconds = start.wait_for(done.exists)
    start.stop(signal.SIGKILL)
    return seconds


def accelerate_launch() -> list[str]:
    return [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file",
        str(ACCELERATE_CONFIG), "--num_processes", "2", "--multi_gpu",
        "--main_process_port", "0", "--num_cpu_threads_per_process", "1",
    ]  # fmt: skip


def ours(work_dir: Path, strategy: str, folder: Path, step: int) -> dict[str, float]:
    """Starts it, and stops it once a step beyond `step` is done; it saves as it stops."""
    metrics, timeline = folder / "metrics.jsonl", folder / "logs" / "timeline.jsonl"
    before = timeline.stat().st_size if timeline.exists() else 0
    start = Start(
        [
            sys.executable, "-m", "launcher.cli", "train", f"model.model_name_or_path={work_dir / 'model'}",
            f"data.train_files=[{work_dir / 'chats.jsonl'}]", "data.max_length=512",
            f"data.cache_dir={folder.parent / (folder.name + '-cache')}", f"strategy={strategy}",
            "launch.num_processes=2", "train.train_batch_size=2", "train.per_device_train_batch_size=1",
            "train.max_steps=100000", "train.logging_steps=1", "eval.eval_strategy=no", "checkpoint=last",
            "checkpoint.save_steps=100000", "tracker=off", f"output_dir={folder}",
        ],
        folder.parent / f"{folder.name}.log",
    )  # fmt: skip
    agent = start.wait_for(lambda: start.has_child("launcher.train.accelerate_launch", str(folder)))
    ranks = start.wait_for(lambda: start.has_child("launcher.train", str(folder), " -u "))
    total = start.wait_for(lambda: any(line.get("step", 0) > step for line in _lines(metrics)))
    events = {line["event"]: line["t"] - start.began for line in _lines(timeline, before)}
    start.stop(signal.SIGTERM)
    points = {"accelerate launch": agent, "ranks": ranks, "run folder": events["start"], "loop": events["begin"]}
    return {**points, "first step": total}


def _lines(path: Path, begin: int = 0) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    text = path.read_bytes()[begin:].decode()
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n") and line.strip()]


def measure(work_dir: Path, strategies: list[str], pairs: int, record: Record) -> None:
    write_chats(work_dir / "chats.jsonl")
    write_model(work_dir / "model")
    for strategy in strategies:
        for number in range(-1, pairs):  # the first round warms up: DeepSpeed compiles an operator
            folder, about = work_dir / f"run-{strategy}-{number}", machine(work_dir)
            pair: dict[str, Any] = {}
            for kind in ("bare", "ours") if number % 2 == 0 else ("ours", "bare"):
                if kind == "bare":
                    pair["bare"] = bare(work_dir, strategy, number)
                else:
                    pair["first"] = ours(work_dir, strategy, folder, 0)
                    done = _lines(folder / "metrics.jsonl")[-1]["step"]
                    pair["second"] = ours(work_dir, strategy, folder, done)
            shutil.rmtree(folder)
            if number >= 0:
                record.add(strategy, about, **pair)


def as_text(found: dict[str, Any]) -> str:
    rows, parts = [], []
    for strategy, rounds in found.items():
        for kind in ("first", "second"):
            totals = [points["first step"] for points in rounds[kind]]
            ratios = [a / b for a, b in zip(totals, rounds["bare"], strict=True)]
            values = (Spread.of(totals).text(1, 1), Spread.of(rounds["bare"]).text(1, 1), Spread.of(ratios).text(1, 2))
            rows.append([strategy, kind, *values])
            names = list(rounds[kind][0])
            ends = {name: [points[name] for points in rounds[kind]] for name in names}
            begins = [[0.0] * len(totals), *list(ends.values())[:-1]]
            spent = [
                Spread.of([b - a for a, b in zip(begin, end, strict=True)]).text(1, 1)
                for begin, end in zip(begins, ends.values(), strict=True)
            ]
            parts.append([strategy, kind, *spent])
    head = ["strategy", "start", "launcher train, s", "bare script, s", "ratio"]
    until = [
        "command to accelerate launch", "to its ranks (imports)", "to the run's folder (process group)",
        "to the loop (data, model, prepare)", "first step",
    ]  # fmt: skip
    return (
        f"Median (lowest to highest, number of starts).\n\n{table(head, rows)}\n\n"
        f"{table(['strategy', 'start', *until], parts)}"
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--strategy", nargs="+", default=["ddp", "zero2"])
    parser.add_argument("--add", action="store_true", help="to the pairs that the file has")
    parser.add_argument("--json", type=Path, default=RECORDS_DIR / "start.json")
    arguments = parser.parse_args(argv)
    record = Record(arguments.json, is_added=arguments.add)
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        measure(Path(name), arguments.strategy, arguments.pairs, record)
    print(f"{machine(ROOT)}, {record.loads()}\n\n{as_text(record.found)}")


if __name__ == "__main__":
    main()
