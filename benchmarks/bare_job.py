"""The bare script of `start`: what one writes with transformers and Accelerate for the same job; ends after a step."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    spec: dict[str, str] = json.loads(sys.argv[1])
    import torch
    from accelerate import Accelerator
    from transformers import AutoModelForCausalLM, AutoTokenizer

    accelerator = Accelerator(**(_deepspeed() if spec["strategy"] == "zero2" else {"cpu": True}))
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    with Path(spec["rows"]).open(encoding="utf-8") as file:
        chats = [json.loads(line)["messages"] for line in file]
    rows = [torch.tensor(tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"][:512]) for chat in chats]

    def collate(items: list[Any]) -> dict[str, Any]:
        pad = torch.nn.utils.rnn.pad_sequence
        labels = pad(items, batch_first=True, padding_value=-100)
        mask = (labels != -100).long()
        return {"input_ids": labels.clamp(min=0), "labels": labels, "attention_mask": mask}

    loader = torch.utils.data.DataLoader(rows, batch_size=1, shuffle=True, collate_fn=collate)  # type: ignore[arg-type]
    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    model.train()
    for batch in loader:
        accelerator.backward(model(**batch).loss)
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        break
    if accelerator.is_main_process:
        Path(spec["done"]).touch()
    sys.stdout.flush()
    os._exit(0)


def _deepspeed() -> dict[str, Any]:
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs

    settings = {
        "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 2, "overlap_comm": False}, "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**12,
    }  # fmt: skip
    return {
        "deepspeed_plugin": DeepSpeedPlugin(hf_ds_config=settings),
        "kwargs_handlers": [InitProcessGroupKwargs(backend="gloo")],
    }


if __name__ == "__main__":
    main()
