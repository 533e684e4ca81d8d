"""The Trainer of `kills`: the script that one writes for it, resuming where there is a checkpoint."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    spec: dict[str, Any] = json.loads(sys.argv[1])
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
    from transformers.trainer_utils import get_last_checkpoint

    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    with Path(spec["rows"]).open(encoding="utf-8") as file:
        chats = [json.loads(line)["messages"] for line in file]
    rows = [tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"][:512] for chat in chats]

    def collate(items: list[list[int]]) -> dict[str, Any]:
        padded = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(item) for item in items], batch_first=True, padding_value=-100
        )
        return {"input_ids": padded.clamp(min=0), "labels": padded, "attention_mask": (padded != -100).long()}

    arguments = TrainingArguments(
        output_dir=spec["folder"], max_steps=spec["num_steps"], per_device_train_batch_size=2, save_strategy="steps",
        save_steps=spec["save_steps"], save_total_limit=1, logging_steps=10, report_to=[], disable_tqdm=True,
        learning_rate=5e-5, use_cpu=True, dataloader_pin_memory=False,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32)
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collate)  # type: ignore[arg-type]
    folder = Path(spec["folder"])
    last = get_last_checkpoint(spec["folder"]) if folder.is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    trainer.save_model()
    if trainer.args.process_index == 0:
        (folder / "done").touch()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
