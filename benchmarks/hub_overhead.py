"""What pushing to the Hub during training costs it: `launcher train` with a slow Hub beside the same run without.

    python benchmarks/hub_overhead.py [--quick] [--rounds N] [--json FILE]

The demo on one process, so that the uploader has a core; a server on this machine that speaks the Hub's protocol takes
1 MB/s, so that an upload is under way nearly all the time. Runs with and without take turns. Every run must make the
same number of steps and end with the same weights, and everything must have arrived.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, Spread, machine, report, table

_BYTES_PER_S = 1_000_000
_REPO = "bench/run"


def run_once(folder: Path, num_steps: int, hub: tuple[str, str] | None) -> dict[str, Any]:
    """One run from the command to its end; `hub` is the server's URL and a token.

    Returns: seconds of each logged window of steps after the first (which warms up), seconds of the whole command.
    """
    overrides = [
        "experiment=arithmetic", "strategy=single", "launch.num_processes=1", f"train.max_steps={num_steps}",
        "eval.eval_strategy=no", "checkpoint=last", "checkpoint.save_steps=40", "train.logging_steps=20", "tracker=off",
        f"output_dir={folder}",
    ]  # fmt: skip
    env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HOME": str(folder.parent / "home")}
    if hub is not None:
        overrides += [
            "hub.push_to_hub=true", f"hub.hub_model_id={_REPO}-{folder.name}", "hub.hub_strategy=checkpoint",
            "hub.max_wait_s=300",
        ]  # fmt: skip
        env |= {"HF_ENDPOINT": hub[0], "HF_TOKEN": hub[1], "HF_HUB_DISABLE_XET": "1"}
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "launcher.cli", "train", *overrides], env=env, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    took = time.perf_counter() - started
    if done.returncode:
        sys.exit(f"the run ended with {done.returncode}:\n{done.stdout[-4000:]}")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "loss" in line]
    assert logged[-1]["step"] == num_steps
    windows = [
        (after["num_tokens"] - before["num_tokens"]) / after["tokens_per_second"]
        for before, after in itertools.pairwise(logged)
    ]
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if hub is not None:
        check_arrived(hub[0], f"{_REPO}-{folder.name}", folder, num_steps, weights)
    return {"windows": windows, "took": took, "weights": weights}


def check_arrived(url: str, repo: str, folder: Path, num_steps: int, weights: str) -> None:
    """The model and the newest checkpoint are there, byte for byte."""
    for path, expected in (
        ("model.safetensors", weights),
        (
            "last-checkpoint/manifest.json",
            hashlib.sha256((folder / f"checkpoint-{num_steps}" / "manifest.json").read_bytes()).hexdigest(),
        ),
    ):
        with urllib.request.urlopen(f"{url}/{repo}/resolve/main/{path}") as answer:
            assert hashlib.sha256(answer.read()).hexdigest() == expected, f"{path} has not arrived"


@contextmanager
def hub_server(data_dir: Path, bytes_per_s: int = _BYTES_PER_S) -> Iterator[tuple[str, str]]:
    command = [
        sys.executable, "-m", "tests.hub.server", "--data-dir", str(data_dir), "--bytes-per-s", str(bytes_per_s),
    ]  # fmt: skip
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    os.sched_setscheduler(server.pid, os.SCHED_IDLE, os.sched_param(0))  # a Hub takes no core from a run
    try:
        assert server.stdout is not None
        url, token = (server.stdout.readline().strip().rpartition(" ")[2] for _ in range(2))
        yield url, token
    finally:
        server.kill()
        server.communicate()


def measure(work_dir: Path, is_quick: bool, rounds: int) -> dict[str, Any]:
    num_steps, rounds = (120, 1) if is_quick else (240, rounds)
    found: dict[str, Any] = {"machine": machine(work_dir), "without": [], "with": [], "rounds": [], "took": []}
    weights = set()
    with hub_server(work_dir / "server") as hub:
        for number in range(rounds):
            pair: dict[str, Any] = {}
            for kind in ("without", "with") if number % 2 == 0 else ("with", "without"):
                print(f"{time.strftime('%H:%M:%S')} run {number + 1} of {rounds}, {kind} the Hub", flush=True)
                folder = work_dir / f"{kind}-{number}"
                pair[kind] = run_once(folder, num_steps, hub if kind == "with" else None)
                found[kind] += pair[kind]["windows"]
                weights.add(pair[kind]["weights"])
            sums = {kind: sum(values["windows"]) for kind, values in pair.items()}
            found["rounds"].append(sums["with"] / sums["without"])
            found["took"].append({kind: values["took"] for kind, values in pair.items()})
    assert len(weights) == 1, "the Hub changed the result"
    return found


def as_text(found: dict[str, Any]) -> str:
    rows = [
        ["20 steps without the Hub, s", Spread.of(found["without"]).text()],
        ["20 steps while it is pushed to, s", Spread.of(found["with"]).text()],
        ["all steps of a run, with the Hub : without (at most 1.02)", Spread.of(found["rounds"]).text()],
    ]
    return (
        f"\n{found['machine']}\nMedian (lowest to highest, number). Same steps, same weights, everything arrived.\n\n"
        f"{table(['what', 'measured'], rows)}"
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one short run of each kind")
    parser.add_argument("--rounds", type=int, default=4, help="runs of each kind")
    parser.add_argument(
        "--json", type=Path, help="where the raw numbers go; default benchmarks/results/hub_overhead.json"
    )
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        found = measure(Path(name), arguments.quick, arguments.rounds)
    report("hub_overhead", found, as_text(found), arguments.json)


if __name__ == "__main__":
    main()
