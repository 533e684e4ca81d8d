"""Starters that race for one lock: `python -m tests.faults.lock_race FOLDER TRIES STARTERS LINKS LOCK`.

Prints for each try how each of them ended: 0 held the lock alone, 2 was refused, 3 found another holder beside it.
LINKS is yes, or no: a file system without hard links. flock always fails. LOCK is what lies there: none, stale (of dead
processes here), claimed (somebody died taking it over), empty (unreadable), elsewhere (a heartbeat that stands still).
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from launcher.base import lock, lock_file
from launcher.base.errors import RunLockedError
from launcher.base.process import boot_id, host, pid_namespace


def _fail(*args: Any, **kwargs: Any) -> NoReturn:
    raise OSError(errno.EOPNOTSUPP, "not on this file system")


def _prepare(path: Path, kind: str, number: int) -> None:
    here = {"host": host(), "boot_id": boot_id(), "pid_namespace": pid_namespace(), "pid": 1}
    stale = {**here, "id": f"{number:08x}", "pids": []}
    match kind:
        case "stale" | "claimed":
            path.write_text(json.dumps(stale))
        case "empty":
            path.write_text("")
        case "elsewhere":
            path.write_text(json.dumps({**stale, "host": "elsewhere", "boot_id": "b"}))
    if kind == "claimed":
        path.with_name(f".lock-{stale['id']}").write_text(json.dumps({**stale, "id": "dead"}))


def _start(path: Path, begin: float, held: Path) -> NoReturn:
    code = 1
    try:
        while time.monotonic() < begin:
            pass
        mine = lock.RunLock(path)
        mine.acquire([os.getpid()])
        own = held / f"{os.getpid()}"
        own.touch()
        time.sleep(0.1)  # longer than any other needs to be refused
        is_alone = list(held.iterdir()) == [own] and mine.is_held()
        own.unlink()
        mine.release()
        code = 0 if is_alone else 3
    except RunLockedError:
        code = 2
    finally:
        os._exit(code)


def main(folder: Path, tries: int, starters: int, links: str, kind: str) -> None:
    lock_file.STALE_S, lock._POLL_S = 0.1, 0.005
    fcntl.flock = _fail
    if links == "no":
        os.link = _fail
    for number in range(tries):
        root = folder / str(number)
        held = root / "held"
        held.mkdir(parents=True)
        _prepare(root / ".lock", kind, number)
        begin = time.monotonic() + 0.02
        pids = []
        for _ in range(starters):
            if (pid := os.fork()) == 0:
                _start(root / ".lock", begin, held)
            pids.append(pid)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        left = sorted(path.name for path in root.iterdir() if path.name.startswith(".lock"))
        print(json.dumps({"codes": codes, "left": left}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5])
