"""Ranks of save_stall: transformers' Trainer with DeepSpeed, saving the same model."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

from benchmarks import bare
from benchmarks.rank import finish, lost, read_spec
from launcher.train import rank_setup

_WARM_UP_STEPS = 3


def deepspeed_settings(stage: int) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": False, "contiguous_gradients": True}
    if stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True  # as in its documentation: else no model is saved
    return {
        "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "gradient_clipping": "auto",
        "zero_optimization": zero, "zero_allow_untested_optimizer": True, "steps_per_print": 10**12,
    }  # fmt: skip


def use_gloo() -> None:
    """Without CUDA Accelerate starts no process group for DeepSpeed: gives it the name of one."""
    from accelerate.state import PartialState

    prepare = PartialState._prepare_backend

    def prepared(self: Any, *args: Any, **kwargs: Any) -> Any:
        backend, kind = prepare(self, *args, **kwargs)
        return ("gloo" if backend is None and "LOCAL_RANK" in os.environ else backend), kind

    PartialState._prepare_backend = prepared


def main() -> None:
    spec = read_spec()
    rank_setup.before_imports()
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    use_gloo()
    import torch.distributed as dist
    from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    num_usual: int = spec["num_usual"]
    cycle = num_usual + 2  # the usual steps, the one that saves, the one after it
    found: dict[str, list[float]] = {"trainer": [], "trainer_call": [], "usual": []}

    class Clock(TrainerCallback):
        """Times from the end of a step to the end of the next; every `cycle`-th step saves."""

        def __init__(self) -> None:
            self.last = 0.0
            self.usual: list[float] = []

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            now = time.perf_counter()
            place = (state.global_step - _WARM_UP_STEPS) % cycle
            if state.global_step > _WARM_UP_STEPS:
                if place == 0:  # the step after the save: the interval holds both
                    is_first = state.global_step == _WARM_UP_STEPS + cycle
                    if not is_first:
                        found["trainer"].append(lost(now - self.last, self.usual))
                        found["usual"] += self.usual
                    else:
                        found["trainer_call"].clear()
                    self.usual = []
                    shutil.rmtree(Path(args.output_dir) / f"checkpoint-{state.global_step - 1}", ignore_errors=True)
                    os.sync()
                    dist.barrier()
                else:
                    self.usual.append(now - self.last)
            control.should_save = place == cycle - 1 and state.global_step > _WARM_UP_STEPS
            self.last = time.perf_counter()

    class TimedTrainer(Trainer):
        def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            started = time.perf_counter()
            super()._save_checkpoint(*args, **kwargs)
            found["trainer_call"].append(time.perf_counter() - started)

    arguments = TrainingArguments(
        output_dir=str(Path(spec["work_dir"]) / "trainer"), per_device_train_batch_size=1,
        max_steps=_WARM_UP_STEPS + (spec["num_repetitions"] + 1) * cycle, save_strategy="no", logging_strategy="no",
        report_to=[], disable_tqdm=True, deepspeed=deepspeed_settings(spec["zero_stage"]), dataloader_pin_memory=False,
        optim="adamw_torch",
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**spec["model"]))
    TimedTrainer(model=model, args=arguments, train_dataset=bare.rows(), callbacks=[Clock()]).train()
    shutil.rmtree(arguments.output_dir, ignore_errors=True)
    finish(spec, found)


if __name__ == "__main__":
    main()
