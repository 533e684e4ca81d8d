"""What every benchmark needs: the model, the way to start ranks, statistics, the machine, tables."""

from __future__ import annotations

import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from launcher.base.process import die_with_parent

ROOT = Path(__file__).resolve().parent.parent
ACCELERATE_CONFIG = ROOT / "launcher" / "agent" / "accelerate.yaml"
RESULTS_DIR = ROOT / "benchmarks" / "results"
RECORDS_DIR = ROOT / "benchmarks" / "records"
"""Of the figures that the README and docs/ quote."""
_LAUNCH_TIMEOUT_S = 600
NUM_TOKENS = 32
"""Of every row: short, since what is measured is the cost of saving, not of the model."""

MODEL: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 13,
    "num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 256, "vocab_size": 32000,
    "tie_word_embeddings": False,
}  # fmt: skip
"""74.5 M parameters."""

SMALL_MODEL: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "vocab_size": 512,
    "tie_word_embeddings": False,
}  # fmt: skip
"""The model of the demo: a step takes so little that whatever the loop adds is seen."""

STEP_20_MS_MODEL: dict[str, Any] = {
    **SMALL_MODEL, "hidden_size": 320, "intermediate_size": 864, "num_hidden_layers": 6, "vocab_size": 2048,
}  # fmt: skip
"""8.8 M parameters: about 20 ms per step of 32 tokens on one core."""

KEPT_MEMORY = {
    "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40),
    "MALLOC_TOP_PAD_": str(2**26), "THP_MEM_ALLOC_ENABLE": "1",
}  # fmt: skip
"""For every process of every contender: memory that was freed stays with it. Otherwise each step gives a gigabyte back
and finds it anew page by page (450,000 page faults under ZeRO-2, half of the step's time), and where the host of a
virtual machine takes free memory away, steps vary by a factor of two: more than a save costs."""


class Texts:
    """A data source for `data.generator`: rows of NUM_TOKENS bytes."""

    def __call__(self, split: str) -> Iterator[dict[str, Any]]:
        for i in range(512 if split == "train" else 1):
            yield {"text": f"{i:0{NUM_TOKENS - 1}d}"}  # the tokenizer adds the end token


def run_settings(
    output_dir: Path, model: dict[str, Any], strategy: str, num_processes: int, **checkpoint: Any
) -> dict[str, Any]:
    """The settings of a run of ours: one row per process and step, no trackers, saves only where a benchmark asks."""
    return {
        "output_dir": str(output_dir),
        "model": {"config": model},
        "data": {
            "generator": {"_target_": "benchmarks.common.Texts"}, "max_length": NUM_TOKENS,
            "cache_dir": str(output_dir.parent / "cache"),
        },
        "train": {
            "max_steps": 100_000, "train_batch_size": num_processes, "per_device_train_batch_size": 1,
            "logging_steps": 100_000,
        },
        "strategy": {"name": strategy},
        "tracker": {"name": None},
        "checkpoint": {"save_steps": 100_000, **checkpoint},
    }  # fmt: skip


def start_ranks(module: str, num_processes: int, spec: dict[str, Any]) -> dict[str, Any]:
    """Runs `benchmarks.MODULE` on every rank of an `accelerate launch` and returns what its main process found.

    Args:
        spec: plain data for the ranks; `work_dir` is theirs. They find the moment of the start in `started`.
    """
    result = Path(spec["work_dir"]) / f"result-{module}.json"
    result.unlink(missing_ok=True)
    agent = ["--multi_gpu", "--main_process_port", "0"] if num_processes > 1 else []
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ACCELERATE_CONFIG),
        "--num_processes", str(num_processes), "--num_machines", "1", "--num_cpu_threads_per_process", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", *agent, "-m", f"benchmarks.{module}",
    ]  # fmt: skip
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", **KEPT_MEMORY}
    started = time.time()
    spec = {**spec, "result": str(result), "started": started, "num_processes": num_processes}
    done = subprocess.run(
        [*command, json.dumps(spec)], env={**os.environ, **environment}, timeout=_LAUNCH_TIMEOUT_S, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    if done.returncode or not result.is_file():
        sys.exit(f"benchmarks.{module} ended with {done.returncode}:\n{done.stdout[-6000:]}")
    found: dict[str, Any] = json.loads(result.read_text())
    return found


# ---------------------------------------------------------------------- numbers


@dataclass(frozen=True)
class Spread:
    """The median and the range of some measurements."""

    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(tuple(values))

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def text(self, scale: float = 1.0, digits: int = 3) -> str:
        low, high = min(self.values), max(self.values)
        numbers = [f"{value * scale:.{digits}f}" for value in (self.median, low, high)]
        return f"{numbers[0]} ({numbers[1]} to {numbers[2]}, n={len(self.values)})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in [head, *rows]
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def machine(folder: Path) -> dict[str, Any]:
    """What the figures depend on."""
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": cpu, "cores": len(os.sched_getaffinity(0)), "memory_gib": round(memory / 2**30, 1),
        "load_before": [round(value, 2) for value in os.getloadavg()],
        "kernel": platform.release(), "file_system": _file_system(folder), "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "accelerate", "transformers", "deepspeed")},
    }  # fmt: skip


def _file_system(folder: Path) -> str:
    real, best = str(folder.resolve()), ("", "unknown")
    for line in Path("/proc/mounts").read_text().splitlines():
        _, mount, kind, *_ = line.split()
        if (real + "/").startswith(mount.rstrip("/") + "/") and len(mount) >= len(best[0]):
            best = (mount, kind)
    return best[1]


class Record:
    """A record that is written after every measurement, so that one that was broken off keeps what it has.

    Args:
        is_added: to what the file holds from before, measured on the same machine.
    """

    def __init__(self, path: Path, *, is_added: bool) -> None:
        self.path = path
        self.found: dict[str, Any] = json.loads(path.read_text()) if is_added and path.exists() else {}

    def add(self, case: str, about: dict[str, Any], **values: Any) -> None:
        """One more value of each of these in a case."""
        entry = self.found.setdefault(case, {"machines": []})
        entry["machines"].append(about)
        for name, value in values.items():
            entry.setdefault(name, []).append(value)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.found, indent=1) + "\n")

    def loads(self) -> str:
        """The load of the machine that each measurement began with."""
        loads = [about["load_before"][0] for entry in self.found.values() for about in entry["machines"]]
        return f"load average at the start of each: {min(loads)} to {max(loads)}"


def start_command(command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """A command in a session of its own, offline, on one thread for each process; it dies with the benchmark. Modules
    are compiled once, as anywhere: without their bytecode every process of ours would compile ours anew."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    environment |= {"PYTHONWARNINGS": "ignore", "TOKENIZERS_PARALLELISM": "false"}
    with log.open("w") as output:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True,
            preexec_fn=functools.partial(die_with_parent, os.getpid()),
        )  # fmt: skip


def report(name: str, found: dict[str, Any], text: str, out: Path | None) -> None:
    """Prints the tables and writes the raw numbers."""
    path = out or RESULTS_DIR / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{text}\n\nRaw numbers: {path}")
