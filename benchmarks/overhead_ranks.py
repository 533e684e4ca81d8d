"""Ranks of step_overhead: steps of the product's loop and of a bare Accelerate loop over the same model, in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from benchmarks import bare
from benchmarks.rank import build_product, finish, read_spec


def main() -> None:
    spec = read_spec()
    run = build_product(spec["settings"])
    from launcher.train import loop

    batches = bare.batches(run.train_step.accelerator)

    def ours() -> None:
        """What `fit` does in every step."""
        run.watchdog.alive()
        agreed = loop.train(run)
        run.recorder.advance(run.step, run.state.progress.epoch, run.hub.status)
        run.saver.follow(*agreed.save)
        loop.log(run, agreed)
        loop.maybe_evaluate(run, by_clock=agreed.is_eval_due)
        with run.recorder.during("save"):
            run.saver.maybe_save(is_due=agreed.is_save_due)
        run.hub.poll()

    def plain() -> None:
        bare.step(run.train_step.accelerator, run.train_step.model, run.train_step.optimizer, next(batches))

    kinds: dict[str, Callable[[], None]] = {"ours": ours, "bare": plain}
    found: dict[str, list[float]] = {"ours": [], "bare": []}
    num_steps: int = spec["num_steps"]
    for block in range(2 * spec["num_blocks"] + 2):
        name = ("ours", "bare", "bare", "ours")[block % 4]
        run.processes.barrier()
        times = []
        for _ in range(num_steps):
            started = time.perf_counter()
            kinds[name]()
            times.append(time.perf_counter() - started)
        if block >= 2:  # the first block of each warms up
            found[name].append(statistics.median(times))
    run.saver.close()
    finish(spec, found)


if __name__ == "__main__":
    main()
