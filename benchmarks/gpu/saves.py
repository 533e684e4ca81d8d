"""What a save costs the training on a GPU: a 1.24B model, bf16 with fp32 masters under ZeRO-2.

    python -m benchmarks.gpu.saves [--model NAME] [--times N]

The call, the stall (from the end of the step before the save to the end of the step after it, less a usual step), the
steps while the writers work, and one copy of the same bytes from the device into pinned memory, in the same process.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, Spread
from benchmarks.gpu.models import make_model, write_documents
from benchmarks.gpu.places import in_memory
from benchmarks.rank import build_product, timed

_MAX_DURING_S = 25.0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", help="default: llama-3.2-1b, without a GPU tiny")
    parser.add_argument("--times", type=int, default=2)
    arguments = parser.parse_args()
    # In memory: what is asked is the training's part, not how fast this machine's disk is.
    work_dir = Path(tempfile.mkdtemp(prefix="saves-", dir=in_memory(60 * 2**30)))
    print(f"in {work_dir}, {shutil.disk_usage(work_dir).free / 2**30:.0f} GiB free", flush=True)
    code = 1
    try:
        _measure(work_dir, arguments.model, arguments.times)
        code = 0
    except BaseException:
        traceback.print_exc()
    shutil.rmtree(work_dir, ignore_errors=True)
    os._exit(code)  # the process group's and CUDA's destructors can hang


def _measure(work_dir: Path, name: str | None, times: int) -> None:
    import torch

    has_cuda = torch.cuda.is_available()
    name = name or ("llama-3.2-1b" if has_cuda else "tiny")
    length = 2048 if has_cuda else 256
    model = make_model(name, work_dir, "cuda" if has_cuda else "cpu")
    data = work_dir / "documents.jsonl"
    write_documents(data, 400 * length if has_cuda else 40 * length, length)
    settings: dict[str, Any] = {
        "output_dir": str(work_dir / "run"), "model": {"model_name_or_path": str(model), "dtype": "bfloat16"},
        "data": {"train_files": [str(data)], "max_length": length, "packing": True, "cache_dir": str(work_dir / "c")},
        "train": {"max_steps": 100_000, "train_batch_size": 2, "per_device_train_batch_size": 2},
        "strategy": {"name": "zero2"}, "tracker": {"name": None}, "scheduler": {"lr_scheduler_type": "constant"},
        # A virtual machine may show little of its memory as free until it is used.
        "checkpoint": {"save_steps": 100_000, "low_memory": False},
    }  # fmt: skip
    run = build_product(settings)
    from launcher.base.paths import RunPaths
    from launcher.checkpoint.engine import Phase
    from launcher.train import loop

    checkpointer, paths = run.saver.checkpointer, RunPaths((work_dir / "run").resolve())

    def step() -> None:
        agreed = loop.train(run)
        run.saver.follow(*agreed.save)

    found: dict[str, Any] = {"call": [], "stall": [], "write": [], "during": [], "usual": [], "copy": []}

    def save() -> None:
        usual = [timed(step) for _ in range(8)]
        found["usual"] += usual
        started = time.perf_counter()
        run.saver.save()
        found["call"].append(time.perf_counter() - started)
        step()
        found["stall"].append(time.perf_counter() - started - statistics.median(usual))
        during: list[float] = []
        while checkpointer.phase is not Phase.IDLE and time.perf_counter() - started < _MAX_DURING_S:
            during.append(timed(step) / statistics.median(usual) - 1)
        if checkpointer.phase is Phase.IDLE:
            found["write"].append(time.perf_counter() - started)
        found["during"] += during[:-1]
        run.saver.wait()
        shutil.rmtree(paths.checkpoint_dir(run.saver.saved_step), ignore_errors=True)
        os.sync()

    for _ in range(5):
        step()
    save()  # the first starts the writer and warms up
    report(found, {}, checkpointer.plan.buffer_bytes)
    first = {key: list(value) for key, value in found.items()}
    for value in found.values():
        value.clear()
    size = checkpointer.plan.buffer_bytes
    if has_cuda:
        buffer = checkpointer._buffer
        chunk = torch.empty(min(size, 2**31), dtype=torch.uint8, device="cuda")

        def copy() -> None:
            for start in range(0, size, len(chunk)):
                part = buffer.tensor[start : start + len(chunk)]
                part.copy_(chunk[: len(part)], non_blocking=True)
            torch.cuda.synchronize()

        found["copy"] = [timed(copy) for _ in range(3)]
        found["is_pinned"] = buffer.is_pinned
        del chunk
    for _ in range(times):
        save()
        report(found, first, size)
    run.saver.close()


def report(found: dict[str, Any], first: dict[str, Any], size: int) -> None:
    out = Path(os.environ.get("OUT", ROOT / "benchmarks" / "results" / "gpu"))
    out.mkdir(parents=True, exist_ok=True)
    (out / "saves.json").write_text(json.dumps({"bytes": size, **found, "first": first}))
    texts = [f"{size / 1e9:.2f} GB in the buffer, pinned: {found.get('is_pinned')}"]
    for key, scale, unit in (("call", 1e3, "ms"), ("stall", 1e3, "ms"), ("copy", 1e3, "ms"), ("usual", 1e3, "ms")):
        if found[key]:
            texts.append(f"{key} {Spread.of(found[key]).text(scale, 1)} {unit}")
    if found["during"]:
        texts.append(f"steps during the write {Spread.of(found['during']).text(100, 1)} % slower")
    if found["write"]:
        texts.append(f"durable after {Spread.of(found['write']).text(1, 1)} s")
    if found["copy"]:
        ratio = statistics.median(found["stall"]) / statistics.median(found["copy"])
        texts.append(f"stall {ratio:.2f} copies, copy rate {size / statistics.median(found['copy']) / 1e9:.1f} GB/s")
    print("; ".join(texts), flush=True)


if __name__ == "__main__":
    main()
