"""TRL's SFTTrainer on the cases of a JSON file (one argument): what it trains on, and its losses.

They go to stdout as `CASES {name: {"rows": [[tokens, labels], …], "losses": [loss, …]}}`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def train(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(
        output_dir=str(folder), max_steps=case["num_steps"], learning_rate=0.01, lr_scheduler_type="constant",
        weight_decay=0.1, optim="adamw_torch", bf16=False, fp16=False, use_cpu=True, gradient_checkpointing=False,
        dataloader_pin_memory=False, train_sampling_strategy="sequential", logging_steps=1, save_strategy="no",
        report_to=[], disable_tqdm=True, loss_type="nll", **case["settings"],
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(case["model"])
    if case["template"] is not None:
        tokenizer.chat_template = case["template"]
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(case["model"]), args=arguments, processing_class=tokenizer,
        train_dataset=Dataset.from_list(case["rows"]),
    )  # fmt: skip
    rows = [[row["input_ids"], row.get("labels", row["input_ids"])] for row in trainer.train_dataset]
    trainer.train()
    return {"rows": rows, "losses": [line["loss"] for line in trainer.state.log_history if "loss" in line]}


def main() -> None:
    cases = json.loads(Path(sys.argv[1]).read_text())
    found = {name: train(case, Path(sys.argv[1]).parent / name) for name, case in cases.items()}
    print("CASES", json.dumps(found), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
