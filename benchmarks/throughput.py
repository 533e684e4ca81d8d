"""Tokens per second that are no padding, against transformers' Trainer and TRL, step by step in turns.

    python -m benchmarks.throughput --model DIR [--pairs N] [--dtype float32 bfloat16] [--json FILE]

DIR: a model with a chat template, such as `python -m benchmarks.smollm2 DIR` writes.
Four duels: on equal packed batches with the Trainer, whose losses must be ours to 1e-4 in fp32, once more with both
compiled; on the same chats with TRL as it ships, both at their defaults; and with TRL packing and keeping its
activations. Both contenders are processes of their own that stand still while the other makes its step; the first
step of each warms up.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, Spread, machine, report, table

_BATCH, _MAX_LENGTH, _NUM_CHATS = 4, 512, 600


def write_chats(path: Path) -> None:
    """Chats of one to four turns out of Python's own manual; lengths as uneven as in the wild."""
    from pydoc_data.topics import topics

    text = " ".join(topics[name] for name in sorted(topics))
    sentences = [s for s in re.split(r"(?<=[.!?])\s+", text) if 20 < len(s) < 400]
    source = random.Random(3)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(_NUM_CHATS):
            messages = []
            for _ in range(source.randint(1, 4)):
                answer = " ".join(source.choices(sentences, k=max(1, round(source.lognormvariate(0.6, 0.7)))))
                messages.append({"role": "user", "content": source.choice(sentences)})
                messages.append({"role": "assistant", "content": answer})
            file.write(json.dumps({"messages": messages}) + "\n")


TRL_OPTIONS = {"trl": {}, "trl-packed": {"packing": True, "gradient_checkpointing": False}}
_PEERS = ["trainer", "trainer-compiled", *TRL_OPTIONS]


def environment() -> dict[str, str]:
    """Of a contender: PYTHONPATH keeps what it had, since the packages of a bundle may be found by it alone."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": str(os.cpu_count() or 1),
        "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore",
    }  # fmt: skip


class Contender:
    """A process that makes one step when it is told to."""

    def __init__(self, spec: dict[str, Any], log: Path) -> None:
        self._log = log
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.throughput_ranks", json.dumps(spec)], cwd=ROOT, env=environment(),
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
            )  # fmt: skip
        self._is_ready = False

    def _tell(self, command: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{command}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            sys.exit(f"a contender ended:\n{self._log.read_text()[-4000:]}")

    def wait_until_ready(self) -> None:
        """Returns when it waits for its first turn; several can start at once."""
        if not self._is_ready:
            self._read()
            self._is_ready = True

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"a contender ended:\n{self._log.read_text()[-4000:]}")
        found: dict[str, Any] = json.loads(line)
        return found

    def step(self, kind: str = "step") -> dict[str, Any]:
        """
        Args:
            kind: `bare` for one of a bare loop over the same model; only ours.
        """
        self.wait_until_ready()
        self._tell(kind)
        return self._read()

    def profile(self) -> str:
        """Of one step more; only ours."""
        self._tell("profile")
        return str(self._read()["table"])

    def peak_bytes(self) -> int:
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) * 1024  # type: ignore[index]

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def matmul_flops(dtype: str) -> float:
    """Floating-point operations per second of products of 2048 x 2048 matrices on all cores, the median of ten: by
    whatever is faster, torch's own or oneDNN, which torch leaves aside for fp32."""
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    size = 2048
    a, b = (torch.randn(size, size).to(getattr(torch, dtype)) for _ in range(2))
    ways: list[Callable[[], Any]] = [lambda: a @ b]
    if torch.backends.mkldnn.is_available() and dtype == "float32":
        ways.append(lambda: torch.ops.mkldnn._linear_pointwise.default(a, b, None, "none", [], ""))
    medians = []
    for way in ways:
        seconds = []
        for _ in range(11):
            began = time.perf_counter()
            way()
            seconds.append(time.perf_counter() - began)
        medians.append(statistics.median(seconds[1:]))
    return 2 * size**3 / min(medians)


def flops_per_token(model: str) -> float:
    """6 of each parameter (PaLM, appendix B, without attention): forward, and twice as much backward."""
    from safetensors import safe_open

    with safe_open(Path(model) / "model.safetensors", framework="pt") as file:
        return 6.0 * sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


def duel(work_dir: Path, model: str, peer: str, dtype: str, pairs: int) -> dict[str, Any]:
    data = work_dir / "chats.jsonl"
    settings = {
        "output_dir": str(work_dir / f"run-{peer}-{dtype}"), "model": {"model_name_or_path": model, "dtype": dtype},
        "data": {
            "train_files": [str(data)], "max_length": _MAX_LENGTH, "packing": peer != "trl",
            "cache_dir": str(work_dir / "cache"),
        },
        "train": {
            "max_steps": 100_000, "train_batch_size": _BATCH, "per_device_train_batch_size": _BATCH,
            "torch_compile": peer == "trainer-compiled",
        },
        "scheduler": {"lr_scheduler_type": "constant"}, "strategy": {"name": "single"}, "tracker": {"name": None},
        "optim": {"learning_rate": 5e-5}, "checkpoint": {"save_strategy": "no"},
    }  # fmt: skip
    spec = {
        "settings": settings, "work_dir": str(work_dir), "model": model, "data": str(data), "dtype": dtype,
        "batch": _BATCH, "max_length": _MAX_LENGTH, "trl": TRL_OPTIONS.get(peer, {}),
        "trainer": {"torch_compile": peer == "trainer-compiled"},
    }  # fmt: skip
    sides = {
        kind: Contender({**spec, "kind": kind.partition("-")[0]}, work_dir / f"{kind}-{dtype}.log")
        for kind in ("ours", peer)
    }
    for side in sides.values():
        side.wait_until_ready()
    found: dict[str, Any] = {"peer": peer, "dtype": dtype, "ours": [], "peer_steps": []}
    peaks = []
    for number in range(pairs + 1):
        peaks.append(matmul_flops(dtype))
        for kind in ("ours", peer) if number % 2 == 0 else (peer, "ours"):
            found["ours" if kind == "ours" else "peer_steps"].append(sides[kind].step())
    found |= {"matmul_flops": statistics.median(peaks), "flops_per_token": flops_per_token(model)}
    found["peak_bytes"] = {kind: side.peak_bytes() for kind, side in sides.items()}
    for side in sides.values():
        side.close()
    found["ratios"] = [
        (a["tokens"] / a["seconds"]) / (b["tokens"] / b["seconds"])
        for a, b in zip(found["ours"][1:], found["peer_steps"][1:], strict=True)
    ]
    return found


def as_text(found: dict[str, Any]) -> str:
    rows = []
    for case in found["duels"]:
        rates = [
            Spread.of([s["tokens"] / s["seconds"] for s in case[side][1:]]).text(1, 0)
            for side in ("ours", "peer_steps")
        ]
        off = max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(case["ours"], case["peer_steps"], strict=True))
        peaks = " / ".join(f"{value / 2**30:.1f}" for value in case["peak_bytes"].values())
        losses = f"{off:.1e}" if case["peer"].startswith("trainer") else "other rows"
        rate = statistics.median(s["tokens"] / s["seconds"] for s in case["ours"][1:])
        has_peak = "matmul_flops" in case
        share = f"{rate * case['flops_per_token'] / case['matmul_flops']:.0%}" if has_peak else ""
        rows.append([case["peer"], case["dtype"], *rates, Spread.of(case["ratios"]).text(1, 2), losses, peaks, share])
    head = [
        "against", "dtype", "launcher, tokens/s", "peer, tokens/s", "ratio", "losses differ by", "peak, GiB",
        "of matmul peak",
    ]  # fmt: skip
    return f"Median (lowest to highest, number of pairs).\n\n{table(head, rows)}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True, help="a folder with a model and a chat template")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--peer", nargs="+", default=_PEERS, choices=_PEERS)
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "records" / "throughput.json")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        work_dir = Path(name)
        write_chats(work_dir / "chats.jsonl")
        found: dict[str, Any] = {"machine": machine(work_dir), "duels": []}
        for peer in arguments.peer:
            for dtype in arguments.dtype:
                found["duels"].append(duel(work_dir, arguments.model, peer, dtype, arguments.pairs))
                text = f"{found['machine']}\n\n{as_text(found)}"
                report("throughput", found, text, arguments.json)  # each takes minutes


if __name__ == "__main__":
    main()
