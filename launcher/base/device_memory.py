"""How much memory the devices and this host have. Imports no torch."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from launcher.base.devices import visible_gpus
from launcher.base.errors import UserError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_UNLIMITED_BYTES = 2**60
_CGROUP_LIMITS = ("memory.max", "memory.limit_in_bytes")


def parse_bytes(text: str, option: str) -> int:
    """`80GB`, `24GiB`, `200e9`.

    Raises:
        UserError: it is none; names the option.
    """
    found = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([kmgt]i?)?b?\s*", text.lower())
    try:
        return int(float(found[1]) * _UNITS[found[2] or ""]) if found else _refuse(text, option)
    except ValueError:
        return _refuse(text, option)


def _refuse(text: str, option: str) -> int:
    raise UserError(f"{option} must be a number of bytes (got {text!r}). Example: {option} 80GB")


def host_bytes() -> int:
    """What this host's processes may use together: its memory, or less where a container is limited."""
    total = _UNLIMITED_BYTES
    for line in _text(Path("/proc/meminfo")).splitlines():
        if line.startswith("MemTotal:"):
            total = int(line.split()[1]) * 1024
    for folder in _own_groups():
        for name in _CGROUP_LIMITS:
            if (limit := _text(folder / name).strip()).isdigit():
                total = min(total, int(limit))
    return total


def _own_groups() -> list[Path]:
    """The control groups that limit this process's memory, from the innermost up."""
    found = []
    for line in _text(Path("/proc/self/cgroup")).splitlines():
        number, controllers, path = line.split(":", 2)
        if number != "0" and "memory" not in controllers.split(","):
            continue
        top = Path("/sys/fs/cgroup") if number == "0" else Path("/sys/fs/cgroup/memory")
        inner = Path(path.lstrip("/"))
        found += [top / folder for folder in (inner, *inner.parents)]
    return found


def num_oom_kills() -> int:
    """How often the kernel has killed a process of this control group for want of memory, or any of this host where no
    group says."""
    for folder in _own_groups():
        for name in ("memory.events", "memory.oom_control"):
            if (count := _counted(folder / name)) is not None:
                return count
    return _counted(Path("/proc/vmstat")) or 0


def _counted(path: Path) -> int | None:
    for line in _text(path).splitlines():
        if line.startswith("oom_kill "):
            return int(line.split()[1])
    return None


def gpu_bytes() -> int | None:
    """Memory of the smallest visible GPU; None without one."""
    if not visible_gpus() or not shutil.which("nvidia-smi"):
        return None
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    sizes = [int(line) * 2**20 for line in answer.stdout.split() if line.isdigit()]
    return min(sizes, default=None)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
