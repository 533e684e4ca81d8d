"""Which devices this process may use. Imports no torch."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_AMD_DRIVER = Path("/dev/kfd")


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        names = [name.strip() for name in given.split(",")]
        valid = [name for name in names if name]
        return valid[: valid.index("-1")] if "-1" in valid else valid  # CUDA ignores what follows an invalid one
    if shutil.which("nvidia-smi"):
        try:
            answer = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return []
        return [str(i) for i, _ in enumerate(line for line in answer.stdout.splitlines() if line.startswith("GPU "))]
    return [str(i) for i, _ in enumerate(Path("/dev").glob("nvidia[0-9]*"))]


def device_problems(num_local: int, num_machines: int = 1) -> list[str]:
    """Why so many processes cannot run on this machine: each takes a GPU of its own, where there are any."""
    num_gpus = len(visible_gpus())
    if not num_gpus or num_local <= num_gpus:
        return []
    return [
        f"{num_local} processes on this machine need a GPU each, and {num_gpus} {'is' if num_gpus == 1 else 'are'} "
        f"visible. Set launch.num_processes={num_gpus * num_machines}; to train on the CPU instead, export "
        "CUDA_VISIBLE_DEVICES="
    ]


def precision_problems(dtype: str, *, has_gpu: bool | None = None) -> list[str]:
    """Why this machine cannot train in this dtype (`model.dtype`).

    Args:
        has_gpu: where torch knows; None: as far as it can be seen without.
    """
    if dtype != "float16":
        return []
    if has_gpu if has_gpu is not None else bool(visible_gpus()) or _AMD_DRIVER.exists():
        return []
    return ["model.dtype=float16 is trained on GPUs only, and none is visible here. Set model.dtype=bfloat16"]


def spare_device_problems(device: int | None, num_local: int) -> list[str]:
    """Why an evaluation in the background cannot take this one of the visible GPUs: the processes take the first."""
    num_gpus, key = len(visible_gpus()), "eval.background_device"
    if not num_gpus:
        return [] if device is None else [f"{key}={device} but no GPU is visible. Set {key}=null: it takes the CPU"]
    if device is not None and num_local <= device < num_gpus:
        return []
    got = f"{key}={device}" if device is not None else f"eval.in_background=true needs {key}"
    if num_local < num_gpus:
        spare = ", ".join(map(str, range(num_local, num_gpus)))
        return [
            f"{got}: a GPU that does not train, of {spare} (visible: {num_gpus}; the processes take the first "
            f"{num_local}). Set {key}={num_local}"
        ]
    mend = f"Set launch.num_processes={num_gpus - 1} on this machine, and {key}={num_gpus - 1}; or "
    return [
        f"{got}: a GPU that does not train, and all {num_gpus} that are visible do. "
        f"{mend if num_gpus > 1 else 'Set '}eval.in_background=false"
    ]


def num_cores() -> int:
    """Cores of this process's affinity mask, within its cgroups' quotas (containers).

    Where Slurm confines a job to its cores by neither, it at least says how many they are.
    """
    allowed, given = len(os.sched_getaffinity(0)), os.environ.get("SLURM_CPUS_ON_NODE", "")
    allowed = min(allowed, int(given)) if given.isdecimal() else allowed
    quotas = [quota for folder in own_cgroups("cpu") if (quota := _quota(folder)) is not None]
    return max(1, min([allowed, *(math.ceil(quota) for quota in quotas)]))


def own_cgroups(controller: str) -> list[Path]:
    """The folders of this process's cgroup and of those around it, version 2 and version 1 (`cpu`, `memory`)."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = _CGROUPS / controllers if controllers else _CGROUPS
        own = root / name.lstrip("/")
        found += [folder for folder in (own, *own.parents) if folder == root or root in folder.parents]
    return found


def _quota(folder: Path) -> float | None:
    """Cores' worth of time that a cgroup may use; None where it has no limit."""
    try:
        if (both := folder / "cpu.max").is_file():
            quota, period = both.read_text(encoding="ascii").split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text(encoding="ascii")
            period = (folder / "cpu.cfs_period_us").read_text(encoding="ascii")
        return int(quota) / int(period) if quota.strip() not in ("max", "-1") else None
    except (OSError, ValueError, ZeroDivisionError):
        return None
