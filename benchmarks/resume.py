"""Ranks of save_stall: from the start of the command to the end of the first step after a resume."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from benchmarks import bare
from benchmarks.rank import build_product, finish, read_spec
from launcher.train import rank_setup


def ours(spec: dict[str, Any]) -> None:
    """The product: finds the newest checkpoint, verifies every byte of it, loads it."""
    from launcher.train import loop

    run = build_product(spec["settings"])
    assert run.step > 0, "nothing was resumed"
    loop.train(run)


def plain(spec: dict[str, Any]) -> None:
    """A bare Accelerate script that calls `load_state`."""
    rank_setup.before_imports()
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import torch
    from accelerate import Accelerator
    from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs
    from transformers import AutoConfig, AutoModelForCausalLM

    from launcher.config.parse import parse_config
    from launcher.train.accelerator import deepspeed_config

    settings = deepspeed_config(parse_config(spec["settings"]), torch.cuda.is_available())
    accelerator = Accelerator(
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=settings),
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")],
    )
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**spec["settings"]["model"]["config"]))
    norms = {"params": [p for n, p in model.named_parameters() if "norm" in n]}
    others = {"params": [p for n, p in model.named_parameters() if "norm" not in n]}
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW([others, norms], lr=5e-5))
    accelerator.load_state(str(Path(spec["work_dir"]) / "plain"))
    bare.step(accelerator, model, optimizer, next(bare.batches(accelerator)))


def main() -> None:
    spec = read_spec()
    {"ours": ours, "plain": plain}[spec["kind"]](spec)
    finish(spec, {"seconds": time.time() - spec["started"]})


if __name__ == "__main__":
    main()
