"""How much memory the devices and this host have. Imports no torch."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from launcher.base.devices import own_cgroups, visible_gpus
from launcher.base.errors import UserError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_UNLIMITED_BYTES = 2**60
_CGROUP_LIMITS = ("memory.max", "memory.limit_in_bytes")
_CGROUP_KILLS = ("memory.events.local", "memory.events", "memory.oom_control")


_LEAST = 10**6
"""No device, disk or network has less, and 80 is meant as 80GB."""


def parse_bytes(text: str, option: str) -> int:
    """`80GB`, `24GiB`, `200e9`.

    Raises:
        UserError: it is none; names the option.
    """
    found = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([kmgt]i?)?b?\s*", text.lower())
    try:
        value = int(float(found[1]) * _UNITS[found[2] or ""]) if found else _refuse(text, option)
    except (ValueError, OverflowError):
        return _refuse(text, option)
    if value < _LEAST:
        raise UserError(f"{option} {text} means {value} bytes. With a unit: {option} 80GB")
    return value


def _refuse(text: str, option: str) -> int:
    raise UserError(f"{option} must be a number of bytes (got {text!r}). Example: {option} 80GB")


def host_bytes() -> int:
    """What this host's processes may use together: its memory, or less where a container is limited."""
    total = _UNLIMITED_BYTES
    for line in _text(Path("/proc/meminfo")).splitlines():
        if line.startswith("MemTotal:"):
            total = int(line.split()[1]) * 1024
    for folder in own_cgroups("memory"):
        for name in _CGROUP_LIMITS:
            if (limit := _text(folder / name).strip()).isdigit():
                total = min(total, int(limit))
    return total


def free_host_bytes() -> int:
    """What is still to be had of this host's memory, or of its container's; a page cache can be had."""
    free = _UNLIMITED_BYTES
    for line in _text(Path("/proc/meminfo")).splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    for folder in own_cgroups("memory"):
        stat = _text(folder / "memory.stat")  # version 1 has sums over the groups inside beside the group's own
        cache = max(map(int, re.findall(r"^(?:total_)?inactive_file (\d+)$", stat, re.MULTILINE)), default=0)
        for limit_name, used_name in zip(_CGROUP_LIMITS, ("memory.current", "memory.usage_in_bytes"), strict=True):
            limit, used = _text(folder / limit_name).strip(), _text(folder / used_name).strip()
            if limit.isdigit() and used.isdigit():
                free = min(free, int(limit) - int(used) + cache)
    return max(0, free)


def oom_kills() -> int:
    """How many processes of this one's cgroup (of the whole host, where it has none of its own) the kernel has killed
    since the host's memory, or the container's, was full."""
    for path in [*(folder / name for folder in own_cgroups("memory") for name in _CGROUP_KILLS), Path("/proc/vmstat")]:
        if (found := re.search(r"^oom_kill (\d+)$", _text(path), re.MULTILINE)) is not None:
            return int(found[1])
    return 0


def gpu_bytes() -> int | None:
    """Memory of the smallest visible GPU; None without one.

    Of the smallest of all where a visible one is not in nvidia-smi's list, as parts of a GPU (MIG) are not.
    """
    names = visible_gpus()
    if not names or not shutil.which("nvidia-smi"):
        return None
    command = ["nvidia-smi", "--query-gpu=index,uuid,memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    rows = [[field.strip() for field in line.split(",")] for line in answer.stdout.splitlines()]
    known = [(row[0], row[1], int(row[2]) * 2**20) for row in rows if len(row) == 3 and row[2].isdigit()]
    visible = [row for row in known if any(_is_meant(name, *row[:2]) for name in names)]
    sizes = [size for *_, size in (visible if len(visible) == len(names) else known)]
    return min(sizes, default=None)


def _is_meant(name: str, index: str, uuid: str) -> bool:
    """CUDA_VISIBLE_DEVICES holds indices, or UUIDs of which the beginning is enough."""
    return name == index if name.isdigit() else uuid.startswith(name)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
