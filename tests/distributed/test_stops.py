"""A trained model stops where its training rows do: promise 7."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.distributed.runs import Lab

# The end of a turn is neither the tokenizer's EOS (<|end|>) nor anything that the model stops at by itself.
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|tool|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.mark.parametrize("more", [(), ("model.eos_token=<|system|>",)])
def test_generation_ends_with_the_turn_when_template_and_tokenizer_disagree(
    lab: Lab, tmp_path: Path, more: tuple[str, ...]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = tmp_path / "rows.jsonl"
    answer = "four"
    row = {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": answer}]}
    rows.write_text(json.dumps(row) + "\n")
    template = tmp_path / "chat.jinja"
    template.write_text(TEMPLATE)
    run = lab.run(
        tmp_path / "run", "single", 1, f"data.train_files=[{rows}]", f"data.chat_template={template}",
        "train.max_steps=60", "checkpoint.save_steps=30", *more,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(run.root)
    end = tokenizer.convert_tokens_to_ids("<|tool|>")
    for folder in (run.checkpoint_dir(30), run.checkpoint_dir(60), run.root):
        eos = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
        assert end in (eos if isinstance(eos, list) else [eos]), folder
    model = AutoModelForCausalLM.from_pretrained(run.root)
    prompt = tokenizer.apply_chat_template(row["messages"][:1], add_generation_prompt=True, return_tensors="pt")
    ids = prompt["input_ids"] if not isinstance(prompt, torch.Tensor) else prompt
    out = model.generate(ids, max_new_tokens=50, do_sample=False)[0, ids.shape[1] :]
    assert tokenizer.decode(out[:-1]) == answer and int(out[-1]) == end
