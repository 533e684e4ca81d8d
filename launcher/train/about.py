"""What a run consists of, in numbers: said at its start, and kept in run.json for the report."""

from __future__ import annotations

import math
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from launcher import __version__
from launcher.base import words
from launcher.base._deepspeed import full_shape
from launcher.config.settings import RunConfig

_PEAK_FLOPS = {
    "B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "GH200": 989e12, "A100": 312e12,
    "L40S": 362e12, "L4": 121e12, "A10G": 70e12, "A10": 125e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip
"""Dense bf16 with fp32 sums, per device, as NVIDIA's data sheets say. The first name that fits counts."""
_PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "peft")


def about_run(model: torch.nn.Module, *, num_rows: int, num_eval_rows: int | None, device: Any) -> dict[str, Any]:
    """For run.json: parameters, rows, versions, device."""
    sizes = [(math.prod(full_shape(p)), p.requires_grad) for p in model.parameters()]
    return {
        "num_parameters": sum(size for size, _ in sizes),
        "num_trainable_parameters": sum(size for size, is_trained in sizes if is_trained),
        "num_rows": num_rows, "num_eval_rows": num_eval_rows, "device": device_name(device), "versions": versions(),
    }  # fmt: skip


def device_name(device: Any) -> str:
    """NVIDIA H100 80GB HBM3; CPU."""
    return torch.cuda.get_device_name(device) if getattr(device, "type", str(device)) == "cuda" else "CPU"


def versions() -> dict[str, str]:
    """Of ourselves and of what decides the numbers."""
    found = {"launcher": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def memory_bytes(device: Any) -> int | None:
    """The most that this process has held on its GPU so far; on a CPU, what it holds in memory now."""
    if getattr(device, "type", "cpu") == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        resident_pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return resident_pages * os.sysconf("SC_PAGE_SIZE")


def mfu(line: dict[str, Any], about: dict[str, Any]) -> float | None:
    """The share of the devices' peak that the model's own arithmetic uses, for a line of metrics.jsonl.

    Of 6 floating-point operations per parameter and token (PaLM, appendix B, without attention), 4 where hardly any
    parameter is trained: no gradients of weights. None where the peak of the device is not known.
    """
    peak = next((flops for name, flops in _PEAK_FLOPS.items() if name in about["device"]), None)
    if peak is None or "tokens_per_second" not in line:
        return None
    parameters = about["num_parameters"]
    per_token = (6 if about["num_trainable_parameters"] > parameters / 2 else 4) * parameters
    return float(round(line["tokens_per_second"] * per_token / (peak * about["num_processes"]), 4))


def summary(config: RunConfig, about: dict[str, Any], *, epochs: float, total_steps: int) -> list[str]:
    """What is about to be run, a line each."""
    total, trained = about["num_parameters"], about["num_trainable_parameters"]
    name = config.model.model_name_or_path or f"{config.model.config.get('model_type', 'model')} from scratch"
    which = "all trained" if trained == total else f"{words.count(trained)} trained, {words.percent(trained / total)}"
    train, world = config.train, about["num_processes"]
    micro_steps = -(-train.train_batch_size // (train.micro_batch_size * world))
    held_out = f", {about['num_eval_rows']:,} to evaluate on" if about["num_eval_rows"] else ""
    split = f"{world} process{'es' if world > 1 else ''} x {train.micro_batch_size} x {micro_steps}"
    return [
        f"model    {name}, {words.count(total)} parameters ({which}), {config.model.dtype}",
        f"data     {about['num_rows']:,} rows{held_out}",
        f"steps    {total_steps:,} ({epochs:.3g} epochs), {train.train_batch_size} samples each: {split} micro-steps",
        f"devices  {world} x {about['device']}, strategy={config.strategy.name}",
        f"folder   {config.output_dir}",
    ]
