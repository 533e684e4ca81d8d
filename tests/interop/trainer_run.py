"""The real Trainer of transformers on the rows of a launcher config, one JSON argument; two processes under torchrun.

Its losses go to stdout as `LOSSES [[step, loss, learning_rate], …]`. The rows stand in the order in which ours takes
them and the Trainer takes them one after the other, so that its losses can be compared with ours step by step.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import numpy as np


def deepspeed_settings(stage: int, *, bf16: bool) -> dict[str, Any]:
    # Several sub-groups, and parameters in another order than the model's: the layouts that are easily read wrongly.
    odd = {"sub_group_size": 5000} if stage == 3 else {"round_robin_gradients": True}
    return {
        "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True, "bf16": {"enabled": bf16}, "fp16": {"enabled": False},
        "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True, **odd},
    }  # fmt: skip


def allow_cpu() -> None:
    """transformers has no way to say that DeepSpeed runs on a CPU: accelerate then starts no process group."""
    from accelerate.state import PartialState
    from transformers import training_args

    original = PartialState._prepare_backend

    def prepare(self: Any, *args: Any, **kwargs: Any) -> tuple[str | None, Any]:
        backend, kind = original(self, *args, **kwargs)
        return ("gloo" if backend is None and "LOCAL_RANK" in os.environ else backend), kind

    PartialState._prepare_backend = prepare
    training_args.is_torch_bf16_gpu_available = lambda: True


def main() -> None:
    settings = json.loads(sys.argv[1])
    if settings.get("stage"):
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        os.environ["DS_ACCELERATOR"] = "cpu"
        allow_cpu()
    from transformers import Trainer, TrainingArguments

    from launcher.config.compose import compose
    from launcher.data import StepSampler, build_data, build_tokenizer, collate
    from launcher.model.build import build_model

    config = compose(settings["overrides"])
    tokenizer = build_tokenizer(config)
    rows = build_data(config, tokenizer, is_builder=True, wait=lambda: None).train
    sampler = StepSampler(len(rows), config.train.train_batch_size, config.seed)
    order = np.concatenate([sampler.rows_of_step(step) for step in range(config.train.max_steps)])
    is_bf16 = config.mixed_precision == "bf16"
    world = int(os.environ.get("WORLD_SIZE", 1))
    per_device = config.train.per_device_train_batch_size
    arguments = TrainingArguments(
        output_dir=settings["output_dir"], max_steps=config.train.max_steps, save_steps=settings["save_steps"],
        per_device_train_batch_size=per_device, learning_rate=config.optim.learning_rate,
        gradient_accumulation_steps=config.train.train_batch_size // (world * per_device),
        weight_decay=config.optim.weight_decay, lr_scheduler_type=config.scheduler.lr_scheduler_type,
        warmup_steps=config.scheduler.warmup_steps, max_grad_norm=config.train.max_grad_norm, seed=config.seed,
        optim="adamw_torch", train_sampling_strategy="sequential", logging_steps=1, report_to=[],
        bf16=is_bf16, use_cpu=not settings.get("stage"),
        remove_unused_columns=False, disable_tqdm=True, dataloader_pin_memory=False,
        deepspeed=deepspeed_settings(settings["stage"], bf16=is_bf16) if settings.get("stage") else None,
    )  # fmt: skip
    model = build_model(config, tokenizer).module
    trainer = Trainer(
        model=model, args=arguments, train_dataset=[{"row": int(i)} for i in order], 
        data_collator=lambda items: collate(rows, np.array([i["row"] for i in items]), tokenizer.pad_token_id),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=settings.get("resume"))
    history = [(h["step"], h["loss"], h["learning_rate"]) for h in trainer.state.log_history if "loss" in h]
    if trainer.is_world_process_zero():
        print("LOSSES", json.dumps(history), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
