"""Root passes every permission; these make of it somebody who does not, and change nothing for other users."""

from __future__ import annotations

import contextlib
import ctypes
import struct
from collections.abc import Iterator

_HEADER = struct.pack("=Ii", 0x20080522, 0)
"""Linux's capget(2): version 3, this thread."""
_SETS = "=6I"
"""Effective, permitted and inheritable of the first 32 capabilities, then of the others."""
_DAC = 1 << 1 | 1 << 2
"""CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH."""
_PR_CAPBSET_DROP = 24


@contextlib.contextmanager
def without_privileges() -> Iterator[None]:
    """In this thread; processes that it starts have them again, unless `drop_privileges` is their preexec_fn."""
    libc = ctypes.CDLL(None, use_errno=True)
    before = ctypes.create_string_buffer(struct.calcsize(_SETS))
    assert libc.capget(_HEADER, before) == 0
    effective, *others = struct.unpack(_SETS, before.raw)
    assert libc.capset(_HEADER, struct.pack(_SETS, effective & ~_DAC, *others)) == 0
    try:
        yield
    finally:
        assert libc.capset(_HEADER, before.raw) == 0


def drop_privileges() -> None:
    """For a child, before it becomes its command."""
    libc = ctypes.CDLL(None, use_errno=True)
    for number in (1, 2):
        libc.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0)
