"""What the C library does with memory that was freed."""

from __future__ import annotations

import ctypes
import os

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8
"""Of malloc.h."""


def keep_freed_memory() -> None:
    """Large tensors that are freed stay with this process for the next ones.

    glibc gives each of them back and asks for new pages, which the kernel fills with zeros first: a seventh of a step
    on the CPU. What is held is what was held at the peak, 64 MiB and a few per cent more. Other C libraries, and
    whoever set `MALLOC_…` in the environment, keep their own way.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    mallopt(_ARENA_MAX, 1)  # else each thread keeps its own
    mallopt(_MMAP_MAX, 0)
    mallopt(_TRIM_THRESHOLD, -1)
    mallopt(_TOP_PAD, 64 << 20)
