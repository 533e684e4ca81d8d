"""One contender of `throughput`: an optimizer step per line on stdin, answered with its time, tokens and loss."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_ANSWERS = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)  # what libraries print is no answer


def serve(**steps: Callable[[], dict[str, Any]]) -> None:
    """Makes the step that a line names, until stdin ends; of `profile`, one of `step` with its profile."""
    print(json.dumps({"ready": True}), file=_ANSWERS)
    for line in sys.stdin:
        if line.strip() == "profile":
            print(json.dumps({"table": _profiled(steps["step"])}), file=_ANSWERS)
            continue
        started = time.perf_counter()
        found = steps[line.strip()]()
        print(json.dumps({"seconds": time.perf_counter() - started, **found}), file=_ANSWERS)
    os._exit(0)


def _profiled(step: Callable[[], Any]) -> str:
    """Where the time of a step goes: the device's, or without one the CPU's."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    def spent(row: Any) -> float:
        return float(row.self_device_time_total if torch.cuda.is_available() else row.self_cpu_time_total)

    started = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        step()
    took = time.perf_counter() - started
    rows = sorted(seen.key_averages(), key=spent, reverse=True)
    total = sum(map(spent, rows))
    lines = [f"{took * 1e3:.0f} ms with the profiler, {total / 1e3:.0f} ms of them on the device"]
    for row in rows[:22]:
        lines.append(f"{spent(row) / 1e3:8.2f} ms {row.count:5d} x {row.key[:100]}")
    return "\n".join(lines)


def ours(spec: dict[str, Any]) -> None:
    from benchmarks.rank import build_product

    run = build_product(spec["settings"])
    attention = run.state.settings["attention"]["name"]

    def step() -> dict[str, Any]:
        with _counted_syncs() as syncs:
            sums = run.train_step.run(run.step)
            run.train_step.update(sums)
        run.state.progress.step += 1
        found = {"tokens": sums.num_tokens, "loss": sums.loss_sum / sums.num_labelled, "attention": attention}
        return {**found, **_device_facts(), **syncs}

    serve(step=step, bare=_bare(run))


def _bare(run: Any) -> Callable[[], dict[str, float]]:
    """A step of the shortest loop there is, of the same model and loss, on a batch that is on the device already."""
    from launcher.data import collate, to_device

    own = run.train_step
    accelerator, model, rows = own.accelerator, own.model, own._rows
    ids = own._sampler.rows_of_step(0)
    batch, num_tokens = to_device(collate(rows, ids, own._pad_token_id), accelerator.device), rows.num_tokens(ids)
    num_labelled = max(1, rows.num_labelled_tokens(ids))

    def step() -> dict[str, float]:
        with accelerator.autocast():
            loss, _, _ = own._loss(model, batch)
        accelerator.backward(loss / num_labelled)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        own.optimizer.step()
        own.optimizer.zero_grad()
        return {"tokens": num_tokens, "loss": loss.item() / num_labelled, **_device_facts()}

    return step


def _device_facts() -> dict[str, float]:
    """On CUDA: waits for the device, so that a step's time is the device's too."""
    import torch

    if not torch.cuda.is_available():
        return {}
    torch.cuda.synchronize()
    return {"peak_memory_bytes": float(torch.cuda.max_memory_allocated())}


@contextlib.contextmanager
def _counted_syncs() -> Iterator[dict[str, float]]:
    """How often the host waited for the device, as torch's debug mode counts it."""
    import torch

    found: dict[str, float] = {}
    if not torch.cuda.is_available():
        yield found
        return
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        yield found
    torch.cuda.set_sync_debug_mode("default")
    found["syncs"] = float(sum("synchroniz" in str(warning.message) for warning in seen))


def _turns(trainer_class: Any) -> Any:
    """The trainer, waiting for its turn before each step."""
    from transformers import TrainerCallback

    seen: dict[str, Any] = {}

    class Turns(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            if not sys.stdin.readline():
                os._exit(0)
            seen.update(started=time.perf_counter(), tokens=0)

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            facts = _device_facts()
            answer = {"seconds": time.perf_counter() - seen["started"], "tokens": seen["tokens"], **facts}
            print(json.dumps({**answer, "loss": seen["loss"].item()}), file=_ANSWERS)

    class InTurns(trainer_class):  # type: ignore[misc, valid-type]
        def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            mask = inputs.get("attention_mask")
            seen["tokens"] += int(inputs["input_ids"].numel() if mask is None else mask.sum())
            found = super().compute_loss(model, inputs, *args, **kwargs)
            seen["loss"] = (found[0] if isinstance(found, tuple) else found).detach()  # read when the time is taken
            return found

    return InTurns, Turns


def trainer(spec: dict[str, Any]) -> None:
    """transformers' Trainer on our very batches."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    from launcher.config.parse import parse_config
    from launcher.data import StepSampler, build_data, build_tokenizer, collate

    config = parse_config(spec["settings"])
    tokenizer = build_tokenizer(config)
    rows = build_data(config, tokenizer, is_builder=True, wait=lambda: None).train
    sampler = StepSampler(len(rows), config.train.train_batch_size, config.seed)

    class Batches(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            for step in range(100_000):
                yield collate(rows, np.sort(sampler.rows_of_step(step)), tokenizer.pad_token_id)

    arguments = TrainingArguments(
        **_common(spec), per_device_train_batch_size=1, bf16=config.model.dtype == "bfloat16",
        gradient_checkpointing=False, **spec.get("trainer", {}),
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32)
    cls, turns = _turns(Trainer)
    print(json.dumps({"ready": True}), file=_ANSWERS)
    cls(
        model=model, args=arguments, train_dataset=Batches(), data_collator=lambda items: items[0], callbacks=[turns()]
    ).train()


def trl(spec: dict[str, Any]) -> None:
    """TRL's SFTTrainer as it ships; `trl` in the spec changes that."""
    from datasets import load_dataset
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    arguments = SFTConfig(
        **_common(spec), per_device_train_batch_size=spec["batch"], max_length=spec["max_length"],
        bf16=spec["dtype"] == "bfloat16", model_init_kwargs={"dtype": "float32"}, **spec.get("trl", {}),
    )  # fmt: skip
    cls, turns = _turns(SFTTrainer)
    rows = load_dataset("json", data_files=spec["data"], split="train", cache_dir=str(Path(spec["work_dir"]) / "hf"))
    made = cls(model=spec["model"], args=arguments, train_dataset=rows, callbacks=[turns()])
    print(json.dumps({"ready": True}), file=_ANSWERS)
    made.train()


def _common(spec: dict[str, Any]) -> dict[str, Any]:
    return {
        "output_dir": str(Path(spec["work_dir"]) / spec["kind"]), "max_steps": 100_000, "save_strategy": "no",
        "logging_strategy": "no", "report_to": [], "disable_tqdm": True, "dataloader_pin_memory": False,
        "learning_rate": 5e-5, "lr_scheduler_type": "constant", "use_cpu": spec.get("use_cpu", True),
    }  # fmt: skip


if __name__ == "__main__":
    given: dict[str, Any] = json.loads(sys.argv[1])
    {"ours": ours, "trainer": trainer, "trl": trl}[given["kind"]](given)
