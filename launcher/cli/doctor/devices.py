"""Devices, memory, and the compilers of DeepSpeed's operators. torch is asked in a process of its own."""

from __future__ import annotations

import fcntl
import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launcher.base.device_memory import host_bytes
from launcher.base.devices import num_cores, visible_gpus
from launcher.base.words import size
from launcher.cli.doctor.findings import ERROR, OK, WARNING, Finding
from launcher.config.settings import RunConfig

_TORCH_TIMEOUT_S = 120.0
_ASK_TORCH = """
import json, torch, torch.distributed as dist
from torch.utils.cpp_extension import get_default_build_root
import os
cuda = torch.cuda.is_available()
print("ANSWER" + json.dumps({
    "torch": torch.__version__, "cuda": torch.version.cuda, "is_cuda_available": cuda,
    "devices": [
        {"name": p.name, "bytes": p.total_memory, "capability": f"{p.major}.{p.minor}"}
        for p in (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count() if cuda else 0))
    ],
    "architectures": torch.cuda.get_arch_list() if cuda else [],
    "nccl": ".".join(map(str, torch.cuda.nccl.version())) if cuda and dist.is_nccl_available() else None,
    "is_gloo_available": dist.is_gloo_available(),
    "build_root": os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root(),
}))
"""


def devices(config: RunConfig) -> Iterator[Finding]:
    gpus, answer = visible_gpus(), _ask_torch()
    if answer is None:
        yield Finding("torch", ERROR, "torch cannot be imported", f"{sys.executable} -c 'import torch'")
        return
    yield Finding(
        "torch", OK, f"{answer['torch']}, built for " + (f"CUDA {answer['cuda']}" if answer["cuda"] else "CPU")
    )
    if not answer["is_gloo_available"]:
        yield Finding("gloo", ERROR, "this torch has no gloo, over which the processes agree", "pip install torch")
    if not answer["is_cuda_available"]:
        if gpus:
            why = "this torch is a CPU build" if not answer["cuda"] else "torch sees none: driver and CUDA do not fit"
            yield Finding("devices", ERROR, f"{len(gpus)} GPUs are there, but {why}",
                          "nvidia-smi shows the driver's CUDA; pip install a torch that was built for it")  # fmt: skip
        else:
            yield Finding("devices", OK, f"no GPU; {num_cores()} cores, with gloo")
        return
    for number, device in enumerate(answer["devices"]):
        known = not answer["architectures"] or any(a.startswith("sm_" + device["capability"].split(".")[0])
                                                   for a in answer["architectures"])  # fmt: skip
        text = f"GPU {number}: {device['name']}, {size(device['bytes'])}, compute capability {device['capability']}"
        if known:
            yield Finding("devices", OK, text)
        else:
            yield Finding("devices", ERROR, f"{text}: this torch has no code for it", "pip install -U torch")
    several = len(answer["devices"]) > 1 or config.launch.num_machines > 1
    if several and answer["nccl"] is None:
        yield Finding("nccl", ERROR, "several GPUs, but this torch has no NCCL", "pip install torch")
    elif several:
        yield Finding("nccl", OK, answer["nccl"])
    wanted = (config.launch.num_processes or 1) // config.launch.num_machines
    if wanted > len(answer["devices"]):
        yield Finding("devices", ERROR, f"{wanted} processes on this machine, but {len(answer['devices'])} GPUs",
                      f"launch.num_processes={len(answer['devices']) * config.launch.num_machines}")  # fmt: skip


@functools.cache
def _ask_torch() -> dict[str, Any] | None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _ASK_TORCH], capture_output=True, text=True, timeout=_TORCH_TIMEOUT_S,
        check=False,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWER")]
    return json.loads(lines[-1].removeprefix("ANSWER")) if lines else None


def memory(config: RunConfig) -> Iterator[Finding]:
    """Host memory, the container's limit, and locked memory, which pinned buffers need."""
    usable, is_limited = host_bytes(), host_bytes() < _meminfo("MemTotal")
    text = f"{size(usable)} of host memory" + (", a limit of the container" if is_limited else "")
    yield Finding("memory", OK, f"{text}; {size(_meminfo('MemAvailable'))} available")
    shm = shutil.disk_usage("/dev/shm")
    if shm.total < 2**30:
        yield Finding("/dev/shm", WARNING, f"{size(shm.total)} in all: NCCL and data loaders use it; snapshots do not",
                      "docker run --shm-size=16g, or mount -o remount,size=16g /dev/shm")  # fmt: skip
    else:
        yield Finding("/dev/shm", OK, f"{size(shm.free)} free of {size(shm.total)}")


def _meminfo(name: str) -> int:
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(f"{name} is not in /proc/meminfo")


def operators(config: RunConfig, *, fix: bool) -> Iterator[Finding]:
    """What DeepSpeed builds its operators with, and locks that a killed build left: torch waits for them for ever."""
    if config.strategy.zero_stage:
        compiler = shutil.which(os.environ.get("CXX") or "g++") or shutil.which("c++")
        has_nvcc = bool(shutil.which("nvcc") or os.environ.get("CUDA_HOME"))
        if compiler:
            yield Finding("compiler", OK, f"{compiler}: builds operators")
        else:
            text = f"strategy={config.strategy.name}: DeepSpeed builds operators with g++, which is not here"
            yield Finding("compiler", ERROR, text, "apt-get install g++")
        if config.strategy.is_offloaded and visible_gpus() and not has_nvcc:
            text = "zero3_offload builds CPUAdam with nvcc, which is not here: set CUDA_HOME"
            yield Finding("nvcc", ERROR, text, "export CUDA_HOME=/usr/local/cuda")
    answer = _ask_torch()
    root = Path(answer["build_root"]) if answer else None
    stale = [lock for lock in sorted(root.rglob("lock")) if _is_stale(lock)] if root and root.is_dir() else []
    for lock in stale:
        if fix:
            lock.unlink(missing_ok=True)
            yield Finding("operators", OK, f"{lock}: left by a killed build, removed")
        else:
            yield Finding("operators", WARNING, f"{lock} was left by a killed build: torch waits for it without end "
                          "(launcher train removes those of its own operators)", "launcher doctor --fix")  # fmt: skip
    if not stale:
        yield Finding("operators", OK, "no build was interrupted")


def _is_stale(lock: Path) -> bool:
    """Whether no build is at work there: each of ours holds a kernel lock beside the folder, others run a compiler."""
    own = lock.parent.parent / f".{lock.parent.name}.launcher-lock"
    if own.exists():
        with own.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return False
        return True
    return not _is_building()


def _is_building() -> bool:
    """Whether a process of this user runs ninja or a compiler now."""
    for path in Path("/proc").glob("[0-9]*/comm"):
        try:
            if path.stat().st_uid == os.getuid() and path.read_text().strip() in ("ninja", "cc1plus", "nvcc", "cicc"):
                return True
        except OSError:
            continue
    return False
