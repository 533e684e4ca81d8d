"""What the Hub costs the training: a loop with a throttled Hub beside the same loop without, in turns.

`python -m tests.hub.overhead` prints the median step times and their ratio. Wants a free core for the uploader.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from launcher.base.paths import RunPaths
from launcher.hub import Hub, NoHub, build_hub
from tests.hub.helpers import hub_environment, make_checkpoint, make_config, write_model


def steps(
    hub: Hub | NoHub, run: Path, num_steps: int, save_steps: int, num_bytes: int
) -> tuple[list[float], list[float]]:
    """Step times and the times of the calls at a save, in seconds; making the checkpoint itself is not counted."""
    matrix, times, saves = np.random.default_rng(0).random((256, 256)), [], []
    for step in range(1, num_steps + 1):
        started = time.perf_counter()
        for _ in range(8):
            matrix = np.tanh(matrix @ matrix.T / 256)
        hub.poll()
        times.append(time.perf_counter() - started)
        if step % save_steps == 0:
            folder = make_checkpoint(run, step, num_bytes)
            started = time.perf_counter()
            hub.checkpoint_committed(step, folder)
            saves.append(time.perf_counter() - started)
            shutil.rmtree(folder)
    return times, saves


def measure(root: Path, options: argparse.Namespace) -> tuple[list[float], list[float], list[float]]:
    """Step times without and with the Hub, and times of the calls at a save; everything must arrive."""
    without: list[float] = []
    with_hub: list[float] = []
    saves: list[float] = []
    for number in range(options.rounds):
        run = root / f"run-{number}"
        config = make_config(run, hub_strategy="checkpoint", max_bytes_per_s=options.bytes_per_s, max_wait_s=120.0)
        without += steps(NoHub(), run, options.steps, options.save_steps, options.bytes)[0]
        hub = build_hub(config, RunPaths(run))
        hub.start()
        times, stalls = steps(hub, run, options.steps, options.save_steps, options.bytes)
        with_hub += times
        saves += stalls
        write_model(run, 1)
        hub.finish(run)
        assert hub.status()["pending"] == [], hub.status()
        assert {"model", f"checkpoint-{options.steps}"} <= set(hub.status()["pushed"])
    return without, with_hub, saves


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--save-steps", type=int, default=300)
    parser.add_argument("--bytes", type=int, default=2_000_000)
    parser.add_argument("--bytes-per-s", type=float, default=3e6)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        command = [sys.executable, "-m", "tests.hub.server", "--data-dir", f"{root}/server"]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)  # its threads must not take our time
        try:
            assert server.stdout is not None
            url = server.stdout.readline().strip()
            os.environ.update(hub_environment(url, Path(root) / "home", xet=False))
            without, with_hub, saves = measure(Path(root), options)
        finally:
            server.kill()
            server.communicate()
    before, after = statistics.median(without), statistics.median(with_hub)
    print(f"step without Hub: {before * 1e3:.3f} ms, with: {after * 1e3:.3f} ms, ratio {after / before:.4f}")
    print(f"call at a save: median {statistics.median(saves) * 1e3:.2f} ms, worst {max(saves) * 1e3:.2f} ms")


if __name__ == "__main__":
    main()
