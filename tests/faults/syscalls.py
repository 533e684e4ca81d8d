"""Builds `syscalls.c`, and starts processes under it."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import subprocess
import tempfile
import threading
from pathlib import Path

_SOURCE = Path(__file__).with_name("syscalls.c")


def library() -> Path:
    """Compiled once for each version of the source; the compiler is there, since DeepSpeed needs one too."""
    source = _SOURCE.read_bytes()
    made = Path(tempfile.gettempdir()) / f"launcher-syscalls-{os.getuid()}-{hashlib.sha256(source).hexdigest()[:16]}.so"
    if not made.exists():
        half = made.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
        command = ["g++", "-x", "c", "-O1", "-shared", "-fPIC", "-o", str(half), str(_SOURCE), "-ldl", "-lpthread"]
        subprocess.run(command, check=True)
        half.rename(made)
    return made


def preloaded(root: Path | None = None, log: Path | None = None) -> dict[str, str]:
    """Environment of a process whose changes below `root` are seen, and recorded in `log`."""
    variables = {"LD_PRELOAD": str(library())}
    if root is not None and log is not None:
        variables |= {"FAULTS_ROOT": str(root), "FAULTS_LOG": str(log)}
    return variables


MODES = ("nothing", "before", "half", "after", "once", "from_here")
"""SIGKILL before an operation, in the middle of a write, after an operation; an error of one, or of all from one on."""


class Trap:
    """Springs at the n-th operation below a folder, in this process (which must run under the library).

    Armed in a fork, it counts and springs there; `count` and `what` are seen on both sides.
    """

    def __init__(self, root: Path) -> None:
        self._root = str(root).encode()
        self._library = ctypes.CDLL(str(library()))
        self._library.faults_what.restype = ctypes.c_char_p
        self._library.faults_count.restype = ctypes.c_long

    def arm(self, mode: str, at: int = -1, error: str = "EIO", *, with_reads: bool = False) -> None:
        number = getattr(errno, error)
        self._library.faults_arm(self._root, MODES.index(mode), ctypes.c_long(at), number, int(with_reads))

    def disarm(self) -> None:
        self._library.faults_disarm()

    @property
    def count(self) -> int:
        """Operations since it was armed."""
        return int(self._library.faults_count())

    @property
    def what(self) -> str:
        """The operation at which it sprang; empty where it did not."""
        return bytes(self._library.faults_what()).decode()
