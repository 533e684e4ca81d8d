"""What a run consists of, in numbers: said at its start, and kept in run.json for the report."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from launcher import __version__

_PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "peft")


def about_run(model: torch.nn.Module, *, num_rows: int, num_eval_rows: int | None, device: Any) -> dict[str, Any]:
    """For run.json: parameters, rows, versions, device."""
    sizes = [(int(getattr(p, "ds_numel", p.numel())), p.requires_grad) for p in model.parameters()]
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
