"""Tokens per second and the share of the matrix-multiply peak on one GPU, in turns with transformers' Trainer and TRL.

    python -m benchmarks.gpu.throughput [--case NAME…] [--steps N]

The Trainer trains the same packed batches with bf16 forward and fp32 masters, TRL its own packs of the same texts. Each
contender is a process that stands still while another makes its step. The peak is an 8192³ bf16 product in the same
run. Results as they come, and in $OUT.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.common import ROOT
from benchmarks.gpu.models import flops_per_token, make_model, write_documents
from benchmarks.gpu.places import in_memory
from benchmarks.throughput import TRL_OPTIONS, Contender

T = TypeVar("T")
_STEPS = 6
_NUM_TOKENS = 2_000_000


@dataclass(frozen=True)
class Case:
    """A model on packed rows of `length` tokens, `rows` of them in a micro-batch and a step; and who trains it."""

    model: str
    length: int
    rows: int
    peers: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    is_lora: bool = False


def _ours(**train: Any) -> dict[str, Any]:
    return {"train": train}


CASES = {  # one of each model first: time may not suffice for all
    "0.6b-8k": Case("qwen3-0.6b", 8192, 1, ("trainer",)),
    "1b-4k": Case("llama-3.2-1b", 4096, 4, ("trainer",)),
    "8b-lora-4k": Case("llama-3-8b", 4096, 1, (), {"model": {"gradient_checkpointing": False}}, is_lora=True),
    "0.6b-8k-compiled": Case("qwen3-0.6b", 8192, 1, (), _ours(torch_compile=True)),
    "0.6b-4k": Case("qwen3-0.6b", 4096, 1, ("trl-packed",)),
    "0.6b-8k-x4-compiled": Case("qwen3-0.6b", 8192, 4, (), _ours(torch_compile=True)),
    "0.6b-8k-zero2-compiled": Case(
        "qwen3-0.6b", 8192, 2, (), {**_ours(torch_compile=True), "strategy": {"name": "zero2"}}
    ),
    "1b-4k-compiled": Case("llama-3.2-1b", 4096, 4, (), _ours(torch_compile=True)),
    "8b-lora-4k-compiled": Case("llama-3-8b", 4096, 1, (), _ours(torch_compile=True), is_lora=True),
    "tiny": Case("tiny", 512, 2, ("trainer",)),
    "tiny-trl": Case("tiny", 512, 2, ("trl-packed",)),
}
_DEFAULT = [name for name, case in CASES.items() if case.model != "tiny"]
_MODELS_BYTES = 30 * 2**30
"""Of all cases together, with their data."""


def measure(name: str, work_dir: Path, steps: int, peak: float, device: str) -> dict[str, Any]:
    case = CASES[name]
    model = make_model(case.model, work_dir, device)
    data = work_dir / f"documents-{case.length}.jsonl"
    counts_path = data.with_suffix(".counts")
    if not counts_path.exists():
        total = _NUM_TOKENS if device == "cuda" else 100_000
        counts_path.write_text(json.dumps(write_documents(data, total, case.length)))
    counts = json.loads(counts_path.read_text())
    spec = {
        "settings": _settings(case, work_dir / f"run-{name}", model, data), "work_dir": str(work_dir),
        "model": str(model), "data": str(data), "dtype": "bfloat16", "batch": case.rows, "max_length": case.length,
        "use_cpu": device == "cpu",
    }  # fmt: skip
    flops = flops_per_token(case.model, counts["mean_attended"], is_lora=case.is_lora)
    sides = {kind: {**spec, "kind": _kind(kind), **_options(kind)} for kind in ("ours", *case.peers)}
    found: dict[str, Any] = {"case": name, "flops_per_token": flops, "mean_attended": counts["mean_attended"]}
    has_bare = "strategy" not in case.settings  # under ZeRO, DeepSpeed's engine is the loop
    (taken, pairs, found["profile"]), failure = beside_or_alone(
        lambda some: _in_turns(name, some, work_dir, steps, has_bare=has_bare), sides
    )
    if failure is not None:
        found["alone_since"] = failure
    for kind, lines in taken.items():
        rates = [line["tokens"] / line["seconds"] for line in lines[2:]]
        rate = statistics.median(rates)
        found[kind] = {
            "tokens_per_second": rate, "lowest": min(rates), "highest": max(rates), "mfu": rate * flops / peak,
            "peak_memory_bytes": lines[-1].get("peak_memory_bytes"), "first_step_s": lines[0]["seconds"],
            "losses": [line["loss"] for line in lines], "syncs": lines[-1].get("syncs"),
            "tokens_per_step": lines[-1]["tokens"], "attention": lines[-1].get("attention"),
        }  # fmt: skip
    if pairs:
        found["of_a_bare_step"] = statistics.median(own["seconds"] / bare["seconds"] for own, bare in pairs)
    return found


def _settings(case: Case, output_dir: Path, model: Path, data: Path) -> dict[str, Any]:
    more = {key: dict(value) for key, value in case.settings.items()}
    settings = {
        "output_dir": str(output_dir),
        "model": {"model_name_or_path": str(model), "dtype": "bfloat16", **more.pop("model", {})},
        "data": {
            "train_files": [str(data)], "max_length": case.length, "packing": True,
            "cache_dir": str(output_dir.with_name("cache")),
        },
        "train": {
            "max_steps": 100_000, "train_batch_size": case.rows, "per_device_train_batch_size": case.rows,
            **more.pop("train", {}),
        },
        "scheduler": {"lr_scheduler_type": "constant"}, "strategy": {"name": "single"}, "tracker": {"name": None},
        "optim": {"learning_rate": 5e-5}, "checkpoint": {"save_strategy": "no"}, **more,
    }  # fmt: skip
    if case.is_lora:
        settings["model"]["peft"] = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": 16,
            "lora_alpha": 32,
            "target_modules": "all-linear",
        }
    return settings


def beside_or_alone(run: Callable[[Mapping[str, Any]], T], sides: Mapping[str, Any]) -> tuple[T, str | None]:
    """Ours with its peers; where any of them fails (two may need more memory than there is), ours alone and why."""
    try:
        return run(sides), None
    except SystemExit as error:
        if len(sides) == 1:
            raise
        failure = str(error)
    return run({"ours": sides["ours"]}), failure


def _in_turns(
    name: str, sides: Mapping[str, Any], work_dir: Path, steps: int, *, has_bare: bool
) -> tuple[dict[str, list[dict[str, Any]]], list[tuple[dict[str, Any], dict[str, Any]]], str]:
    """What each said of its steps; pairs of a step of ours and one of a bare loop; and a profile of ours.

    Args:
        has_bare: make those pairs. They come last: both train our model, whose losses are compared before.
    """
    running: dict[str, Contender] = {}
    taken: dict[str, list[dict[str, Any]]] = {}
    pairs = []
    try:
        for kind, side in sides.items():
            running[kind], taken[kind] = Contender(side, work_dir / f"{name}-{kind}.log"), []
        for contender in running.values():
            contender.wait_until_ready()
        for number in range(steps + 2):
            order = list(running) if number % 2 == 0 else list(running)[::-1]
            for kind in order:
                taken[kind].append(running[kind].step())
        for _ in range(steps + 1 if has_bare else 0):
            pairs.append((running["ours"].step(), running["ours"].step("bare")))
        return taken, pairs[1:], running["ours"].profile()
    finally:
        for contender in running.values():
            contender.close()


def _kind(name: str) -> str:
    return name.partition("-")[0]


def _options(name: str) -> dict[str, Any]:
    if name in TRL_OPTIONS:
        return {"trl": TRL_OPTIONS[name]}
    return {"trainer": {"use_liger_kernel": True}} if name == "trainer-liger" else {}


def peak_flops(device: str) -> float:
    """Of an 8192³ bf16 product of random numbers (256³ fp32 on a CPU), in operations per second."""
    import torch

    size, dtype = (8192, torch.bfloat16) if device == "cuda" else (256, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(14):
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return 2 * size**3 / statistics.median(times[4:])


def line_of(found: dict[str, Any]) -> str:
    parts = [found["case"]]
    for kind, value in found.items():
        if isinstance(value, dict):
            memory = f", {value['peak_memory_bytes'] / 2**30:.1f} GiB" if value["peak_memory_bytes"] else ""
            parts.append(
                f"{kind} {value['tokens_per_second']:,.0f} tokens/s ({value['lowest']:,.0f} to {value['highest']:,.0f})"
                f", MFU {value['mfu']:.1%}{memory}, first step {value['first_step_s']:.1f} s, syncs {value['syncs']}, "
                f"attention {value['attention']}, loss {value['losses'][0]:.4f} to {value['losses'][-1]:.4f}"
            )
    if "of_a_bare_step" in found:
        parts.append(f"a step takes {found['of_a_bare_step']:.3f} of a bare loop's")
    if "alone_since" in found:
        parts.append(f"ours alone, since beside a peer: {found['alone_since'][-1500:]}")
    return "\n    ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--case", nargs="+", default=os.environ.get("CASES", "").split(), choices=CASES)
    parser.add_argument("--steps", type=int, default=_STEPS)
    arguments = parser.parse_args()
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    out = Path(os.environ.get("OUT", ROOT / "benchmarks" / "results" / "gpu"))
    out.mkdir(parents=True, exist_ok=True)
    peak = peak_flops(device)
    print(f"peak of a bf16 product: {peak / 1e12:.0f} TFLOP/s", flush=True)
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="gpu-", dir=in_memory(_MODELS_BYTES)) as name:
        for case in arguments.case or (_DEFAULT if device == "cuda" else ["tiny", "tiny-trl"]):
            try:
                found = measure(case, Path(name), arguments.steps, peak, device)
            except (SystemExit, Exception) as error:
                print(f"{case}: {type(error).__name__}: {str(error)[-1500:]}", flush=True)
                continue
            results.append(found)
            print(line_of(found), flush=True)
            if os.environ.get("PROFILE"):
                print(found["profile"], flush=True)
            (out / "throughput.json").write_text(json.dumps({"peak_flops": peak, "cases": results}, indent=1))


if __name__ == "__main__":
    main()
