"""Becomes the process of one job, tied to the controller: `python -m launcher.sweep.child PARENT RECORD COMMAND…`.

A separate program rather than code between fork and exec, which is unsafe beside threads. The record is written before
the job exists, so that a controller killed at any moment leaves no job that its successor cannot recognise.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from launcher.base.files import replace_file
from launcher.base.process import boot_id, die_with_parent, host, pid_namespace, start_ticks


def main(arguments: list[str]) -> None:
    """Never returns. Where the controller dies, the job gets SIGTERM and ends with a save."""
    parent, record, *command = arguments
    die_with_parent(int(parent), signal.SIGTERM)
    info = json.loads(record)
    me = {
        "pid": os.getpid(), "ticks": start_ticks(os.getpid()), "host": host(), "boot_id": boot_id(),
        "pid_namespace": pid_namespace(),
    }  # fmt: skip
    path = Path(info.pop("path"))
    replace_file(path, json.dumps({**info, **me}).encode(), within=path.parents[1])
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
