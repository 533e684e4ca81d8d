"""Small facts about processes. Standard library only."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

RESTARTED = "LAUNCHER_RESTARTED"
"""Environment variable of a start that continues an earlier start of the same command (after a crash, a requeue)."""

_PR_SET_PDEATHSIG = 1
_PR_SET_MM, _PR_SET_MM_MAP = 35, 14
_shown: list[ctypes.Array[ctypes.c_char]] = []
"""Memory that the kernel reads for /proc."""


def die_with_parent(expected_parent: int | None = None, signal_number: int = signal.SIGKILL) -> None:
    """Asks the kernel to signal this process when its parent dies, and ends at once if that happened already.

    A SIGKILLed agent otherwise leaves its ranks running on the GPUs.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal_number, 0, 0, 0)
    parent = os.getppid()
    if parent == 1 and os.getpid() != 1 and expected_parent not in (None, 1):
        os._exit(1)
    if expected_parent is not None and parent != expected_parent:
        os._exit(1)


def show_as(command: Sequence[str], env: Mapping[str, str]) -> bool:
    """Shows another command line and environment for this process in /proc; False where the kernel cannot do that.

    Both are read from the process's own memory, from where the kernel was told (prctl_mm_map of linux/prctl.h).
    """
    words = b"".join(os.fsencode(word) + b"\0" for word in command)
    variables = b"".join(os.fsencode(f"{name}={value}") + b"\0" for name, value in env.items())
    memory = ctypes.create_string_buffer(words + variables, len(words) + len(variables))
    begin = ctypes.addressof(memory)
    middle, end = begin + len(words), begin + len(words) + len(variables)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.sbrk.restype = ctypes.c_void_p
    fields = Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()
    code_begin, code_end, stack, data_begin, data_end, heap = (int(fields[n - 3]) for n in (26, 27, 28, 45, 46, 47))
    areas = (code_begin, code_end, data_begin, data_end, heap, libc.sbrk(0), stack, begin, middle, middle, end)
    no_change = (0, 0, 0xFFFFFFFF)  # of the auxiliary vector, and of the executable
    table = struct.pack("=12Q2I", *areas, *no_change)
    is_done: bool = libc.prctl(_PR_SET_MM, _PR_SET_MM_MAP, table, ctypes.c_ulong(len(table)), 0) == 0
    if is_done:
        _shown.append(memory)
    return is_done


def yield_cores() -> None:
    """Lowest priority, for this process and, where it leads a session of its own, for that session.

    Where the kernel groups processes by session (kernel.sched_autogroup_enabled, the default of most distributions),
    `nice` only counts inside of one: a process at nice 19 in a session of its own takes half of a busy core.
    """
    with contextlib.suppress(OSError):
        os.nice(19)
    for _ in range(5 if os.getsid(0) == os.getpid() else 0):
        try:
            Path("/proc/self/autogroup").write_text("19")
            return
        except BlockingIOError:  # the kernel takes one such wish of all users in a tenth of a second
            time.sleep(0.2)
        except OSError:
            return


def take_cores_back() -> None:
    """Undoes `yield_cores` for this process with all its threads, as far as the user may: root, or by RLIMIT_NICE."""
    if os.getpgid(0) != os.getpid():
        return
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PGRP, 0, 0)  # nice is kept per thread
    with contextlib.suppress(OSError):
        if os.getsid(0) == os.getpid():
            Path("/proc/self/autogroup").write_text("0")


def use_resting_cores() -> None:
    """Lets this thread run only where nobody else wants to.

    SCHED_IDLE gives a core back the moment a rank wakes up, where nice 19 still holds it for some milliseconds; but it
    cannot be left again, and cores that never rest starve it.
    """
    with contextlib.suppress(OSError):  # not allowed in every container
        os.nice(19)
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def start_ticks(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None where it is not running. Tells a reused pid apart."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:  # noqa: PTH123
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def is_alive(pid: int, ticks: int | None) -> bool:
    """Whether the process that started at `ticks` still runs under this pid; one that cannot be seen counts as that."""
    now = start_ticks(pid)
    if now is None and not Path(f"/proc/{pid}").exists():
        try:
            os.kill(pid, 0)
        except PermissionError:  # another user's, where /proc is mounted with hidepid
            return True
        except (ProcessLookupError, OverflowError):
            return False
    return now is not None and (ticks is None or now == ticks)


def host() -> str:
    return socket.gethostname()


_INITIAL_NAMESPACE = "pid:[4026531836]"
"""Of a machine itself, in every kernel (PROC_PID_INIT_INO); containers have others."""


def boot_id() -> str | None:
    """Another one after every start of the machine; containers on one machine share it."""
    return _first_line("/proc/sys/kernel/random/boot_id")


def pid_namespace() -> str | None:
    """Where this process's pids mean something; None where /proc shows other processes than those of it."""
    try:
        return os.readlink("/proc/self/ns/pid") if os.readlink("/proc/self") == str(os.getpid()) else None  # noqa: PTH115
    except OSError:
        return None


def machine_id() -> str | None:
    """The same after every start of the machine; images and containers may share it."""
    return _first_line("/etc/machine-id")


def is_same_machine(other_machine_id: str | None, other_namespace: str | None) -> bool:
    """Whether a process of an earlier boot ran on this machine, for certain: neither it nor we are in a container."""
    is_bare = other_namespace == pid_namespace() == _INITIAL_NAMESPACE
    return is_bare and other_machine_id is not None and other_machine_id == machine_id()


def _first_line(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="ascii").strip() or None
    except (OSError, ValueError):
        return None
