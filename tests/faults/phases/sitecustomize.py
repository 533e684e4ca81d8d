"""Holds a process of a run at a moment that a test names; every interpreter that has this folder in its path reads it.

PHASE is JSON: {"event": a name of Python's audit events, "match": a regular expression for its arguments, "seconds",
"reached": a file, "signal"?: for that process}. The first process in which such an event comes writes its pid into that
file and stands still.
"""

from __future__ import annotations

import json
import os
import re
import sys
import sysconfig
import time
from typing import Any


def _watch(phase: dict[str, Any]) -> None:
    pattern, reached = re.compile(phase["match"]), phase["reached"]
    is_over = False

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal is_over
        if is_over or event != phase["event"] or not pattern.search(repr(arguments)):
            return
        is_over = True
        try:
            fd = os.open(reached, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        except FileExistsError:
            return
        os.write(fd, str(os.getpid()).encode())
        os.close(fd)
        if "signal" in phase:
            os.kill(os.getpid(), phase["signal"])
        end = time.monotonic() + phase["seconds"]
        while time.monotonic() < end:
            time.sleep(0.05)

    sys.addaudithook(hook)


if os.environ.get("PHASE"):
    _watch(json.loads(os.environ["PHASE"]))

__file__ = f"{sysconfig.get_path('stdlib')}/sitecustomize.py"  # as a distribution's: a hook is there in a fork too
