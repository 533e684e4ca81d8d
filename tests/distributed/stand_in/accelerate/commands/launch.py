"""Found before Accelerate's own by PYTHONPATH: `accelerate launch` of a machine whose ranks do as PLAN says.

PLAN is JSON: for each machine the action of its first start, second start, …: finish, stay (until STOP, or until the
first machine's ranks have ended), raise, raise-own, refuse, die, leave (exit 1 without a word), lose (a connection).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--machine_rank", type=int, default=0)
    parser.add_argument("--num_machines", type=int, default=1)
    given, rest = parser.parse_known_args()
    root = Path(next(word for word in rest if word.startswith("output_dir=")).partition("=")[2])
    starts = root / f"starts-{given.machine_rank}"
    number = len(starts.read_text().splitlines()) if starts.exists() else 0
    with starts.open("a") as file:
        file.write(os.environ["LAUNCHER_ATTEMPT"] + "\n")
    actions = json.loads(os.environ["PLAN"])[given.machine_rank]
    if given.machine_rank == 0:
        write(root, "running")
    (root / f"pid-{given.machine_rank}").write_text(str(os.getpid()))
    act(actions[min(number, len(actions) - 1)], given.machine_rank, root)


def write(root: Path, state: str, **fields: object) -> None:
    """run.json, as the main process does."""
    known = {"state": state, "reason": None, "attempt": os.environ["LAUNCHER_ATTEMPT"], "step": 3}
    temporary = root / ".run.json"
    temporary.write_text(json.dumps({**known, **fields}))
    temporary.rename(root / "run.json")


def state(root: Path) -> str | None:
    run = json.loads((root / "run.json").read_text()) if (root / "run.json").exists() else {}
    return run.get("state") if run.get("attempt") == os.environ["LAUNCHER_ATTEMPT"] else None


def act(action: str, rank: int, root: Path) -> None:
    kind, _, step = action.partition(":")
    if step:  # a checkpoint first
        folder = root / f"checkpoint-{step}"
        folder.mkdir(exist_ok=True)
        (folder / "manifest.json").write_text("{}")
    if kind == "finish" and rank == 0:
        time.sleep(0.3)
        write(root, "finished", step=20)
    elif kind in ("finish", "stay"):
        stay(rank, root)
    elif kind == "die":
        (root / "failed").write_text(os.environ["LAUNCHER_ATTEMPT"])
        print(f"  rank      : {rank} (local_rank: 0)\n  exitcode  : -9 (pid: 1)")
        sys.exit(1)
    elif kind == "leave":
        sys.exit(1)
    else:
        fail(kind, rank, root)


def stay(rank: int, root: Path) -> None:
    while rank == 0 or state(root) in (None, "running"):
        if rank == 0 and (root / "STOP").exists():
            write(root, "interrupted", reason=(root / "STOP").read_text() or "stop_file")
            (root / "STOP").unlink()
            return
        if (root / "failed").exists() and (root / "failed").read_text() == os.environ["LAUNCHER_ATTEMPT"]:
            fail("lose", rank, root)  # ranks notice that a peer has gone, and report it
        time.sleep(0.05)


def fail(kind: str, rank: int, root: Path) -> None:
    is_ours, words = (
        kind == "refuse",
        {"refuse": "the input is wrong", "lose": "gloo/transport Connection reset by peer"},
    )
    report = {
        "rank": rank, "host": f"host-{rank}", "time": time.time(), "attempt": os.environ["LAUNCHER_ATTEMPT"],
        "exit_code": 2 if is_ours else 1, "kind": "RuntimeError", "is_ours": is_ours, "step": 7,
        "training_began": True, "message": words.get(kind, "a fault"), "where": "/home/me/metric.py:5 in score",
        "is_users_code": kind == "raise-own", "traceback": [],
    }  # fmt: skip
    (Path(os.environ["LAUNCHER_ERROR_DIR"]) / f"error-rank-{rank}.json").write_text(json.dumps(report))
    if kind != "lose":
        (root / "failed").write_text(os.environ["LAUNCHER_ATTEMPT"])
    sys.exit(1)


if __name__ == "__main__":
    main()
