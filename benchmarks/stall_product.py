"""Ranks of save_stall: the product's save, plain `save_state` of the same engine, and a memory copy, in turn."""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.rank import build_product, finish, lost, memory_bytes, read_spec, reset_peak_memory, timed


class Bench:
    """One training run, its steps timed between the ends of steps: they end with a collective, on all ranks at once."""

    def __init__(self, spec: dict[str, Any]) -> None:
        from launcher.base.paths import RunPaths
        from launcher.checkpoint.engine import Phase
        from launcher.train import loop

        self.run = build_product(spec["settings"])
        self.loop, self.idle = loop, Phase.IDLE
        self.paths = RunPaths(Path(spec["settings"]["output_dir"]).resolve())
        self.checkpointer = self.run.saver.checkpointer
        self.num_usual: int = spec["num_usual"]
        self.max_during: int = spec["max_during"]
        self.plain_dir = Path(spec["work_dir"]) / "plain"
        self.found: dict[str, Any] = {
            "ours": [], "ours_call": [], "plain": [], "plain_call": [], "copy": [], "usual": [], "during_write": [],
            "write": [],
        }  # fmt: skip

    def step(self) -> None:
        agreed = self.loop.train(self.run)
        self.run.saver.follow(*agreed.save)

    def usual(self) -> list[float]:
        """The steps right before what is measured, with nothing in the background."""
        times = [timed(self.step) for _ in range(self.num_usual)]
        self.found["usual"] += times
        return times

    def clean(self) -> None:
        """Removes what was saved and lets the disk come to rest, outside every measurement."""
        self.run.processes.barrier()  # the others may still be saving
        if self.run.processes.is_main:
            shutil.rmtree(self.paths.checkpoint_dir(self.run.saver.saved_step), ignore_errors=True)
            shutil.rmtree(self.plain_dir, ignore_errors=True)
            os.sync()
        self.run.processes.barrier()

    # -------------------------------------------------------------- what is measured

    def ours(self) -> None:
        """The save of the loop and the step after it; then steps while the writers work."""
        usual = self.usual()
        started = time.perf_counter()
        self.run.saver.save()
        call = time.perf_counter() - started
        self.step()
        self.found["ours"].append(lost(time.perf_counter() - started, usual))
        self.found["ours_call"].append(call)
        during: list[float] = []
        while self.checkpointer.phase is not self.idle and len(during) < self.max_during:
            during.append(timed(self.step))
        if self.checkpointer.phase is self.idle:
            self.found["write"].append(time.perf_counter() - started)
            during = during[:-1]  # the write ended somewhere inside it
        self.run.saver.wait()
        median = statistics.median(usual)
        self.found["during_write"] += [[value, value / median - 1] for value in during]

    def plain(self) -> None:
        """Accelerate's own `save_state`, on the very same engine."""
        from accelerate import Accelerator

        usual = self.usual()
        started = time.perf_counter()
        Accelerator.save_state(self.run.train_step.accelerator, str(self.plain_dir))
        call = time.perf_counter() - started
        self.step()
        self.found["plain"].append(lost(time.perf_counter() - started, usual))
        self.found["plain_call"].append(call)

    def copy(self) -> None:
        """One copy of as many bytes as this process's state has, into memory that was written before."""
        import torch

        size = self.checkpointer.plan.buffer_bytes
        source, target = torch.ones(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)
        for _ in range(3):
            self.run.processes.barrier()
            took = timed(lambda: target.copy_(source))
            self.found["copy"].append(max(self.run.processes.gather(took)))

    # -------------------------------------------------------------- once

    def memory(self, action: Callable[[], None]) -> dict[str, int]:
        """What an action adds to this process's resident memory, for good and at its peak."""
        before = memory_bytes()
        reset_peak_memory()
        action()
        after = memory_bytes()
        return {"kept": after["VmRSS"] - before["VmRSS"], "peak": after["VmHWM"] - before["VmRSS"]}

    def first_saves(self) -> None:
        """The unmeasured first save of each kind, with the memory it takes."""

        def ours() -> None:
            self.run.saver.save()
            self.run.saver.wait()

        found = self.found
        found["memory_ours"] = self.memory(ours)
        writer = Path(f"/proc/{self.checkpointer.writer_pid}/smaps_rollup").read_text().splitlines()
        private = [int(line.split()[1]) * 1024 for line in writer if line.startswith("Private")]
        found["memory_writer"] = sum(private)
        self.clean()
        self.step()
        from accelerate import Accelerator

        if self.run.processes.world_size > 1:
            found["memory_plain"] = self.memory(
                lambda: Accelerator.save_state(self.run.train_step.accelerator, str(self.plain_dir))
            )
            self.clean()
        plan = self.checkpointer.plan
        found["own_bytes"], found["total_bytes"] = plan.buffer_bytes, plan.total_bytes
        found["num_params"] = sum(info.numel for info in self.run.state.trained.params)

    def idle_write(self, folder: Path) -> None:
        """How long the writers take with the ranks standing still, and the disk for the same bytes: write and fsync."""
        import torch

        self.step()
        self.found.setdefault("idle_write", []).append(timed(self._save_and_wait))
        self.clean()
        data = torch.randint(255, (self.found["own_bytes"],), dtype=torch.uint8).numpy().data
        path = folder / f"raw-{self.run.processes.rank}"
        self.run.processes.barrier()
        took = timed(lambda: _write_raw(path, data))
        self.found.setdefault("raw_write", []).append(max(self.run.processes.gather(took)))
        path.unlink()

    def _save_and_wait(self) -> None:
        self.run.saver.save()
        self.run.saver.wait()


def _write_raw(path: Path, data: memoryview) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    for start in range(0, len(data), 1 << 26):
        os.pwrite(fd, data[start : start + (1 << 26)], start)
    os.fsync(fd)
    os.close(fd)


def main() -> None:
    spec = read_spec()
    bench = Bench(spec)
    for _ in range(3):
        bench.step()
    bench.first_saves()
    kinds: list[str] = spec["kinds"]
    for repetition in range(spec["num_repetitions"]):
        for kind in kinds if repetition % 2 == 0 else kinds[::-1]:
            getattr(bench, kind)()
            bench.clean()
    for _ in range(spec["num_idle_writes"]):
        bench.idle_write(Path(spec["work_dir"]))
    if spec["keep"]:  # one checkpoint of each kind, for the resumes
        bench.step()
        bench.plain()
        bench._save_and_wait()
    bench.run.saver.close()
    finish(spec, bench.found)


if __name__ == "__main__":
    main()
