"""A fixed amount of training under kills: wall time over the undisturbed one, beside transformers' Trainer.

    python -m benchmarks.kills [--pairs N] [--steps N] [--add] [--json FILE]

Both train a Llama of 10.8 M parameters on the same chats, two processes under `accelerate launch`. Each saves as often
as is best for it: the Trainer, whose saves cost 0.3 s, every four steps, nearly four seconds (the square root of twice
that cost and the 26 s between kills says 3.9); the launcher, whose saves cost milliseconds, every other step, the
shortest interval at which the one before has always been written. A killer sends SIGKILL to every process of theirs at
moments drawn from an exponential distribution whose mean is a tenth of the undisturbed run, the same moments for both;
the command is typed again at once. The Trainer resumes from its last checkpoint; where a kill cut that off and it
fails, the folder is deleted, as a person would.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.common import RECORDS_DIR, ROOT, Spread, machine, report, start_command, table
from benchmarks.start import accelerate_launch, write_model
from benchmarks.throughput import write_chats

_SAVE_STEPS = {"ours": 2, "trainer": 4}
_POLL_S = 0.02


def ours_command(work_dir: Path, folder: Path, num_steps: int) -> list[str]:
    return [
        sys.executable, "-m", "launcher.cli", "train", f"model.model_name_or_path={work_dir / 'model'}",
        f"data.train_files=[{work_dir / 'chats.jsonl'}]", "data.max_length=512",
        f"data.cache_dir={work_dir / 'cache'}", "strategy=ddp", "launch.num_processes=2",
        "train.train_batch_size=4", "train.per_device_train_batch_size=2", f"train.max_steps={num_steps}",
        "train.logging_steps=10", "eval.eval_strategy=no", "checkpoint=last",
        f"checkpoint.save_steps={_SAVE_STEPS['ours']}", "tracker=off", f"output_dir={folder}",
    ]  # fmt: skip


def trainer_command(work_dir: Path, folder: Path, num_steps: int) -> list[str]:
    spec = {
        "model": str(work_dir / "model"), "rows": str(work_dir / "chats.jsonl"), "folder": str(folder),
        "num_steps": num_steps, "save_steps": _SAVE_STEPS["trainer"],
    }  # fmt: skip
    return [*accelerate_launch(), "-m", "benchmarks.kills_trainer", json.dumps(spec)]


def is_done(kind: str, folder: Path, num_steps: int) -> bool:
    if kind == "ours":
        path = folder / "run.json"
        return path.exists() and json.loads(path.read_text()).get("state") == "finished"
    return (folder / "done").exists()


def run_to_the_end(kind: str, work_dir: Path, num_steps: int, moments: Iterator[float]) -> dict[str, float]:
    """Wall time from the first command to the end of the last, and how often it was killed."""
    folder = work_dir / f"run-{kind}"
    shutil.rmtree(folder, ignore_errors=True)
    command = {"ours": ours_command, "trainer": trainer_command}[kind](work_dir, folder, num_steps)
    began, num_kills, num_failed = time.monotonic(), 0, 0
    kill_at = began + next(moments)
    while not is_done(kind, folder, num_steps):
        process = start_command(command, work_dir / f"{kind}.log")
        while process.poll() is None:
            if time.monotonic() >= kill_at:
                kill_all(process.pid)
                num_kills += 1
                kill_at = time.monotonic() + next(moments)
            time.sleep(_POLL_S)
        if process.returncode > 0 and not is_done(kind, folder, num_steps):  # it failed by itself
            num_failed += 1
            newest = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))[-1:]
            if num_failed > 20 or not newest or kind == "ours":
                sys.exit(f"{kind} ended with {process.returncode}:\n{(work_dir / f'{kind}.log').read_text()[-4000:]}")
            shutil.rmtree(newest[0])
    return {"seconds": time.monotonic() - began, "kills": num_kills, "failures": num_failed}


def kill_all(pid: int) -> None:
    """The process and everything below it, sessions of their own included."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError):
                continue
            children.setdefault(parent, []).append(int(folder.name))
    pending = [pid]
    for one in pending:
        pending += children.get(one, [])
    for one in reversed(pending):
        try:
            os.kill(one, signal.SIGKILL)
        except ProcessLookupError:
            continue


def never() -> Iterator[float]:
    while True:
        yield 1e9


def drawn(seed: int, mean_s: float) -> Iterator[float]:
    source = random.Random(seed)
    while True:
        yield source.expovariate(1 / mean_s)


def measure(work_dir: Path, found: dict[str, Any], given_mean_s: float | None) -> None:
    """Adds a pair to what was found, and prints it."""
    write_chats(work_dir / "chats.jsonl")
    write_model(work_dir / "model")
    number, num_steps = len(found["rounds"]), found["num_steps"]
    kinds = ("ours", "trainer") if number % 2 == 0 else ("trainer", "ours")
    plain = {kind: run_to_the_end(kind, work_dir, num_steps, never()) for kind in kinds}
    mean_s = given_mean_s or min(run["seconds"] for run in plain.values()) / 10
    killed = {kind: run_to_the_end(kind, work_dir, num_steps, drawn(number, mean_s)) for kind in kinds}
    pair = {"machine": machine(work_dir), "undisturbed": plain, "killed": killed, "mean_s_between_kills": mean_s}
    found["rounds"].append(pair)
    print(json.dumps(pair), flush=True)


def as_text(found: dict[str, Any]) -> str:
    rows = []
    for kind, name in (("ours", "launcher"), ("trainer", "transformers' Trainer")):
        plain = Spread.of([r["undisturbed"][kind]["seconds"] for r in found["rounds"]])
        killed = Spread.of([r["killed"][kind]["seconds"] for r in found["rounds"]])
        ratios = [r["killed"][kind]["seconds"] / r["undisturbed"][kind]["seconds"] for r in found["rounds"]]
        kills = [r["killed"][kind]["kills"] for r in found["rounds"]]
        values = (plain.text(1, 0), killed.text(1, 0), Spread.of(ratios).text(1, 2), Spread.of(kills).text(1, 0))
        rows.append([name, *values])
    head = ["", "undisturbed, s", "with kills, s", "ratio", "kills"]
    return table(head, rows)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--mean-s", type=float, help="between two kills; default: a tenth of the undisturbed run")
    parser.add_argument("--add", action="store_true", help="to the pairs that the file has: each takes half an hour")
    parser.add_argument("--json", type=Path, default=RECORDS_DIR / "kills.json")
    arguments = parser.parse_args(argv)
    found: dict[str, Any] = {"num_steps": arguments.steps, "rounds": []}
    if arguments.add and arguments.json.exists():
        found = json.loads(arguments.json.read_text())
    for _ in range(arguments.pairs):  # written after each: one that was broken off keeps what it has
        with tempfile.TemporaryDirectory(prefix="bench-") as name:
            measure(Path(name), found, arguments.mean_s)
        mean_s = Spread.of([r["mean_s_between_kills"] for r in found["rounds"]]).text(1, 1)
        head = f"{machine(ROOT)}\n\nA kill every {mean_s} s on average; {found['num_steps']} steps."
        report("kills", found, f"{head}\n\n{as_text(found)}", arguments.json)


if __name__ == "__main__":
    main()
