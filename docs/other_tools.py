# ruff: noqa: E501 - tables
"""Fills the tables of docs/from-*.md: a setting of another tool, and what is typed here. `make docs`.

Nothing is translated here: every row is what `launcher train` itself answers to the other tool's name
(launcher/config/hints.py), and tests compose all of it.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from pathlib import Path

from launcher.config.arguments import meant_by_option

FOLDER = Path(__file__).parent
_TRAINER = """output_dir=out overwrite_output_dir=true per_device_train_batch_size=4 gradient_accumulation_steps=8 per_device_eval_batch_size=8
auto_find_batch_size=true num_train_epochs=3 max_steps=1000 learning_rate=2e-5 weight_decay=0.1 adam_beta1=0.9 adam_beta2=0.95 adam_epsilon=1e-8
optim=adamw_torch optim_args=fused=true max_grad_norm=1 lr_scheduler_type=cosine lr_scheduler_kwargs={num_cycles:2}
warmup_ratio=0.03 warmup_steps=100 seed=42 data_seed=42 bf16=true fp16=true
gradient_checkpointing=true logging_steps=10 logging_strategy=steps logging_first_step=true logging_nan_inf_filter=true
report_to=wandb run_name=mine eval_strategy=steps eval_steps=500 do_eval=true metric_for_best_model=eval_loss greater_is_better=false
load_best_model_at_end=true save_strategy=steps save_steps=500 save_total_limit=5 save_only_model=true resume_from_checkpoint=out/checkpoint-500
push_to_hub=true hub_model_id=ORG/NAME hub_strategy=every_save hub_private_repo=true hub_revision=main hub_token=TOKEN
deepspeed=ds.json fsdp=full_shard ddp_timeout=1800 full_determinism=true
dataloader_num_workers=4 dataloader_drop_last=true group_by_length=true remove_unused_columns=true ignore_data_skip=true save_safetensors=true eval_accumulation_steps=8
torch_compile=true neftune_noise_alpha=5 label_smoothing_factor=0.1 use_liger_kernel=true"""
_TRL = """model_name_or_path=ORG/NAME model_revision=main dtype=bfloat16 torch_dtype=bfloat16 attn_implementation=sdpa trust_remote_code=true model_init_kwargs=x
dataset_name=ORG/ROWS dataset_config=default dataset_train_split=train dataset_test_split=test dataset_text_field=body
max_length=4096 packing=true padding_free=true packing_strategy=bfd eval_packing=true completion_only_loss=true assistant_only_loss=true
chat_template_path=chat.jinja eos_token=<|im_end|> pad_token=<pad> dataset_num_proc=8 activation_offloading=true shuffle_dataset=true
use_peft=true lora_r=16 lora_alpha=32 lora_dropout=0.05 lora_target_modules=[q_proj,v_proj] lora_modules_to_save=[lm_head] use_rslora=true use_dora=true
load_in_4bit=true load_in_8bit=true bnb_4bit_quant_type=nf4 use_bnb_nested_quant=true"""
_AXOLOTL = """base_model=ORG/NAME revision_of_model=main tokenizer_config=ORG/NAME tokenizer_type=AutoTokenizer trust_remote_code=true
dataset_prepared_path=cache val_set_size=0.05 sequence_len=4096 sample_packing=true eval_sample_packing=false pad_to_sequence_len=true excess_length_strategy=drop
train_on_inputs=true roles_to_train=assistant dataset_processes=8
adapter=lora adapter=qlora lora_r=32 lora_alpha=16 lora_dropout=0.05 lora_target_linear=true lora_target_modules=[q_proj,v_proj] lora_modules_to_save=[lm_head]
lora_model_dir=FOLDER lora_fan_in_fan_out=true peft_use_dora=true peft_use_rslora=true load_in_4bit=true load_in_8bit=true merge_lora=true
micro_batch_size=2 gradient_accumulation_steps=4 num_epochs=4 max_steps=1000 optimizer=adamw_torch learning_rate=2e-4 lr_scheduler=cosine weight_decay=0.1
adam_beta2=0.95 max_grad_norm=1 warmup_steps=10 warmup_ratio=0.03 bf16=auto tf32=true gradient_checkpointing=true flash_attention=true sdp_attention=true
evals_per_epoch=1 eval_steps=500 saves_per_epoch=1 save_steps=500 save_total_limit=5 save_only_model=true load_best_model_at_end=true metric_for_best_model=loss
early_stopping_patience=3 resume_from_checkpoint=out/checkpoint-500 auto_resume_from_checkpoints=true logging_steps=1
output_dir=out wandb_project=sft wandb_name=mine wandb_entity=me hub_model_id=ORG/NAME hub_strategy=every_save seed=42
deepspeed=zero3.json fsdp=full_shard special_tokens=x tokens=["<a>"] group_by_length=true liger_plugin=true"""
_LLAMAFACTORY = """model_name_or_path=ORG/NAME adapter_name_or_path=FOLDER trust_remote_code=true stage=sft do_train=true
finetuning_type=lora finetuning_type=full finetuning_type=freeze lora_rank=8 lora_alpha=16 lora_dropout=0.05 lora_target=all additional_target=[lm_head] use_dora=true use_rslora=true
quantization_bit=4 quantization_bit=8 quantization_type=nf4 double_quantization=true
dataset=ORG/ROWS dataset_dir=data eval_dataset=eval.jsonl template=qwen cutoff_len=2048 max_samples=1000 overwrite_cache=true preprocessing_num_workers=16 tokenized_path=cache
packing=true neat_packing=true train_on_prompt=true mask_history=true mix_strategy=concat interleave_probs=0.7 streaming=true
output_dir=out logging_steps=10 save_steps=500 save_only_model=true plot_loss=true overwrite_output_dir=true report_to=wandb
per_device_train_batch_size=1 gradient_accumulation_steps=8 learning_rate=1e-4 num_train_epochs=3 lr_scheduler_type=cosine warmup_ratio=0.1 bf16=true ddp_timeout=180000000
resume_from_checkpoint=out/checkpoint-500 val_size=0.1 per_device_eval_batch_size=1 eval_strategy=steps eval_steps=500
flash_attn=fa2 disable_gradient_checkpointing=true enable_liger_kernel=true use_unsloth=true resize_vocab=true add_tokens=["<a>"] add_special_tokens=["<a>"] deepspeed=ds_z3.json"""
TOOLS = {
    "trainer": (_TRAINER, "="), "trl": (_TRL, "="), "axolotl": (_AXOLOTL, ": "), "llamafactory": (_LLAMAFACTORY, ": "),
}  # fmt: skip
"""Their settings with a value each, and how they are written there."""


def settings(tool: str) -> list[tuple[str, str]]:
    return [(name, value) for name, _, value in (word.partition("=") for word in TOOLS[tool][0].split())]


def here(name: str, value: str) -> tuple[list[str], str]:
    """Overrides to type instead, or a sentence."""
    told = meant_by_option(f"--{name}", value).strip()
    if match := re.fullmatch(r"Did you mean (.+)\?", told):
        return shlex.split(match[1]), ""
    return [], told.rstrip(".")


def table(tool: str) -> str:
    """In the order of the list above; what needs nothing comes last, by its reason."""
    joined = TOOLS[tool][1]
    rows = ["| there | here |", "|---|---|"]
    notes: dict[str, list[str]] = {}
    for name, value in settings(tool):
        overrides, note = here(name, value)
        if note.startswith(("Leave it out", "There is no such")):
            is_twice = [other for other, _ in settings(tool)].count(name) > 1
            notes.setdefault(note, []).append(f"{name}{joined}{value}" if is_twice else name)
            continue
        there = f"`{name}{joined}{value}`".replace("|", "\\|")
        rows.append(f"| {there} | {_code(overrides) if overrides else note} |")
    rows += [f"| {', '.join(f'`{name}`' for name in names)} | {note} |" for note, names in notes.items()]
    return "\n".join(rows)


def _code(overrides: Iterable[str]) -> str:
    text = " ".join(shlex.quote(o) if set(o) & set("\"'[]{}<>| ") else o for o in overrides)
    return f"`{text}`".replace("|", "\\|")


def filled(page: str, tool: str) -> str:
    """A page with its table as it should be."""
    return re.sub(
        r"(<!-- table: make docs -->\n).*?(<!-- end -->)",
        lambda m: f"{m[1]}{table(tool)}\n{m[2]}",
        page,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    for tool in TOOLS:
        target = FOLDER / f"from-{tool}.md"
        target.write_text(filled(target.read_text(encoding="utf-8"), tool), encoding="utf-8")
