"""Memory that was freed stays with the process, unless its user wants otherwise."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

_SCRIPT = """
import ctypes, resource, sys
from pathlib import Path
from launcher.base.freed_memory import keep_freed_memory
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
keep_freed_memory()
def fill():
    at = libc.malloc(200 << 20)
    ctypes.memset(at, 1, 200 << 20)
    libc.free(at)
fill()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
fill()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux" or "glibc" not in os.confstr("CS_GNU_LIBC_VERSION"), reason="no glibc")
@pytest.mark.parametrize(("more", "is_kept"), [({}, True), ({"MALLOC_TOP_PAD_": "131072"}, False)])
def test_pages_are_found_again(more: dict[str, str], is_kept: bool) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_"))}
    faults = int(subprocess.check_output([sys.executable, "-c", _SCRIPT], env={**environment, **more}, text=True))
    assert (faults < 100) == is_kept, f"{faults} page faults"
