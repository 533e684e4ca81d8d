"""From the names of transformers' TrainingArguments, TRL's SFTConfig and other tools to ours, for messages.

An entry is one of: a key of ours, which takes the value as it is; overrides, with {value} where the value goes; or,
after a `!`, a sentence where there is nothing to set. Every override that a hint proposes must compose (tested).
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection
from dataclasses import dataclass

_NOT_NEEDED = "!leave it out: "
_UNSUPPORTED = "!there is no such setting here; leave it out"
_IGNORED = {
    "rows are tokenised before the run and read from memory": "dataloader_drop_last dataloader_num_workers "
    "dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor dataloader_in_order "
    "dataloader_multiprocessing_context dataset_kwargs",
    "every column that is no conversation or text is ignored": "remove_unused_columns label_names",
    "rows are shuffled by seed, each once in an epoch": "shuffle_dataset train_sampling_strategy group_by_length "
    "length_column_name shuffle_merged_datasets",
    "the whole evaluation set is read, and what is kept of it is small": "eval_accumulation_steps "
    "prediction_loss_only eval_do_concat_batches eval_use_gather_object include_for_metrics batch_eval_metrics "
    "include_inputs_for_metrics bf16_full_eval fp16_full_eval",
    "what each process prints is in output_dir/logs": "log_on_each_node log_level log_level_replica disable_tqdm "
    "logging_dir debug skip_memory_metrics",
    "checkpoints are safetensors, saved once, and resumed exactly": "save_safetensors save_on_each_node "
    "ignore_data_skip restore_callback_states_from_checkpoint enable_jit_checkpoint",
    "it follows from strategy and launch": "ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers "
    "ddp_static_graph ddp_backend accelerator_config parallelism_config local_rank use_cpu no_cuda tp_size "
    "distributed_type world_size",
    "the loss is the mean over the labelled tokens of all processes": "average_tokens_across_devices loss_type",
    "rows are padded to the longest of their micro-batch": "pad_to_multiple_of truncation_mode packing_strategy "
    "eval_packing pad_to_sequence_len eval_sample_packing",
    "metrics.jsonl always has num_tokens": "include_num_input_tokens_seen include_tokens_per_second",
    "model.gradient_checkpointing=true needs no arguments": "gradient_checkpointing_kwargs "
    "activation_checkpointing_kwargs",
    "`launcher train` trains, and evaluates by eval.eval_strategy": "do_train do_predict",
    "tokenised rows are cached by their content": "overwrite_cache",
    "report.html shows the curves": "plot_loss",
    "peft and transformers read it from the model": "lora_fan_in_fan_out tokenizer_type use_fast_tokenizer",
}
_UNKNOWN_HERE = (
    "optim_target_modules label_smoothing_factor tf32 torch_compile_backend torch_compile_mode "
    "use_liger_kernel liger_kernel_config neftune_noise_alpha torch_empty_cache_steps use_cache eval_delay "
    "eval_on_start activation_offloading use_unsloth enable_liger_kernel liger_plugin max_samples "
    "trackio_static_space_id jit_mode_eval dataset_streaming streaming"
)
_LEARNING_RATE, _FILES, _MODEL = "optim.learning_rate", "data.train_files=[{value}]", "model.model_name_or_path"
_HINTS = {
    # TrainingArguments
    "optim": "optim=adamw", "optimizer": "optim=adamw", "optim_args": "!set optim.kwargs.NAME=VALUE for each of them",
    "adam_beta1": "optim.kwargs.betas=[{value},0.999]", "adam_beta2": "optim.kwargs.betas=[0.9,{value}]",
    "adam_epsilon": "optim.kwargs.eps={value}", "warmup_ratio": "scheduler.warmup_steps",
    "lr_scheduler": "scheduler.lr_scheduler_type", "gradient_accumulation_steps": "!it follows from "
    "train.train_batch_size, train.per_device_train_batch_size and the number of processes",
    "auto_find_batch_size": "train.per_device_train_batch_size=auto", "bf16": "model.dtype=bfloat16",
    "fp16": "model.dtype=float16", "activation_checkpointing": "model.gradient_checkpointing",
    "logging_strategy": "train.logging_steps=10", "logging_first_step": "train.logging_steps=1",
    "logging_nan_inf_filter": "train.on_nonfinite=stop", "report_to": "tracker",
    "project": "tracker.init_kwargs.project", "trackio_space_id": "tracker.init_kwargs.space_id",
    "trackio_bucket_id": "tracker.init_kwargs.bucket_id", "evaluation_strategy": "eval.eval_strategy",
    "save_total_limit": "checkpoint.save_total_limit", "hub_always_push": "hub.hub_strategy=every_save",
    "hub_token": "!there is no key for a token: set HF_TOKEN or run `hf auth login`",
    "token": "!there is no key for a token: set HF_TOKEN or run `hf auth login`", "data_seed": "seed",
    "ddp_timeout": "launch.hang_timeout_s", "fsdp": "strategy=zero3", "fsdp_config": "strategy=zero3",
    "deepspeed": "strategy=zero2", "do_eval": "eval.eval_strategy=steps data.eval_split=0.01",
    "overwrite_output_dir": "checkpoint.resume_from_checkpoint=never", "output": "output_dir",
    # SFTConfig, and TRL's ModelConfig and ScriptArguments
    "model_init_kwargs": "!set model.dtype, model.attn_implementation and so on, each by itself",
    "router_aux_loss_coef": "!it is read from the model's own config", "chat_template_path": "data.chat_template",
    "preprocessing_num_workers": "data.dataset_num_proc", "dataset_processes": "data.dataset_num_proc",
    "dataset_text_field": "data.columns.text", "eos_token": "model.eos_token",
    "pad_token": "!padding bears no loss, so any token will do: leave it out", "max_seq_length": "data.max_length",
    "assistant_only_loss": "data.completion_only_loss", "use_peft": "model/peft=lora",
    "lora_r": "model/peft=lora model.peft.r={value}", "lora_rank": "model/peft=lora model.peft.r={value}",
    "lora_alpha": "model/peft=lora model.peft.lora_alpha={value}",
    "lora_dropout": "model/peft=lora model.peft.lora_dropout={value}",
    "lora_target_modules": "model/peft=lora model.peft.target_modules={value}",
    "lora_modules_to_save": "model/peft=lora model.peft.modules_to_save={value}",
    "use_rslora": "model/peft=lora model.peft.use_rslora={value}",
    "use_dora": "model/peft=lora model.peft.use_dora={value}",
    "load_in_4bit": "model/peft=lora model.quantization.load_in_4bit={value}",
    "load_in_8bit": "model/peft=lora model.quantization.load_in_8bit={value}",
    "use_bnb_nested_quant": "model/peft=lora model.quantization.load_in_4bit=true "
    "model.quantization.bnb_4bit_use_double_quant={value}",
    "bnb_4bit_quant_type": "model/peft=lora model.quantization.load_in_4bit=true "
    "model.quantization.bnb_4bit_quant_type={value}", "bnb_4bit_compute_dtype": "model/peft=lora "
    "model.quantization.load_in_4bit=true model.quantization.bnb_4bit_compute_dtype={value}",
    "bnb_4bit_quant_storage": "!it decides how FSDP shards; leave it out", "model_revision": "model.revision",
    "torch_dtype": "model.dtype",
    "dataset_train_split": "data.train_split", "dataset_test_split": "data.eval_split",
    # elsewhere
    "lr": _LEARNING_RATE, "peak_lr": _LEARNING_RATE, "wd": "optim.weight_decay", "betas": "optim.kwargs.betas",
    "eps": "optim.kwargs.eps", "momentum": "optim=sgd optim.kwargs.momentum={value}",
    "gradient_clipping": "train.max_grad_norm", "grad_clip": "train.max_grad_norm", "clip_grad": "train.max_grad_norm",
    "batch_size": "train.train_batch_size", "global_batch_size": "train.train_batch_size",
    "micro_batch_size": "train.per_device_train_batch_size", "epochs": "train.num_train_epochs",
    "num_epochs": "train.num_train_epochs", "steps": "train.max_steps", "num_steps": "train.max_steps",
    "total_steps": "train.max_steps", "model_name": _MODEL, "model_id": _MODEL, "base_model": _MODEL,
    "model_path": _MODEL, "pretrained": _MODEL, "train_file": _FILES, "train_data": _FILES, "data_path": _FILES,
    "dataset_path": _FILES, "data_files": _FILES, "dataset": "data.dataset_name", "datasets": "data.dataset_name",
    "eval_file": "data.eval_files=[{value}] eval.eval_strategy=steps", "val_set_size": "data.eval_split",
    "eval_split_ratio": "data.eval_split", "sequence_len": "data.max_length", "seq_len": "data.max_length",
    "max_seq_len": "data.max_length", "cutoff_len": "data.max_length", "block_size": "data.max_length",
    "sample_packing": "data.packing", "nodes": "launch.num_machines", "num_nodes": "launch.num_machines",
    "nnodes": "launch.num_machines", "gpus": "launch.gpus_per_node", "num_gpus": "launch.num_processes",
    "ntasks": "!set launch.num_processes, over all nodes",
    "ntasks_per_node": "!set launch.num_processes, over all nodes",
    "nproc_per_node": "!set launch.num_processes, over all nodes", "partition": "launch.sbatch.partition",
    "wandb_project": "tracker=wandb tracker.init_kwargs.project={value}", "logger": "tracker", "name": "run_name",
    **{name: f"tracker={name}" for name in ("wandb", "mlflow", "trackio", "tensorboard", "swanlab", "comet_ml")},
    "resume": "checkpoint.resume_from_checkpoint=auto",
    "lora": "model/peft=lora", "flash_attention": "model.attn_implementation=flash_attention_2",
    "quantization": "model/peft=lora model.quantization.load_in_4bit=true",
    "qlora": "model/peft=lora model.quantization.load_in_4bit=true", "adapter": "model.adapter_name_or_path",
    "lora_model_dir": "model.adapter_name_or_path", "adapter_path": "model.adapter_name_or_path",
    "merge_lora": "model/peft=lora model.merge_at_end={value}", "resize_vocab": "model.resize_embeddings",
    "special_tokens": "!set model.eos_token for what ends a text, model.add_tokens=[…] for new tokens",
    "additional_special_tokens": "model.add_tokens", "new_special_tokens": "model.add_tokens",
    "tokens": "model.add_tokens", "attn_impl": "model.attn_implementation",
    # axolotl
    "dataset_prepared_path": "data.cache_dir", "lora_target_linear": "model/peft=lora "
    "model.peft.target_modules=all-linear", "peft_use_dora": "model/peft=lora model.peft.use_dora={value}",
    "peft_use_rslora": "model/peft=lora model.peft.use_rslora={value}", "wandb_name": "run_name",
    "wandb_entity": "!name it in tracker.init_kwargs, or set WANDB_ENTITY",
    "train_on_inputs": "data.completion_only_loss=false",
    "roles_to_train": "!the assistant's turns are trained on; to leave one out: `train: false` in its message; the "
    "last one alone: data.loss_on=last_assistant_turn",
    "sdp_attention": "model.attn_implementation=sdpa", "evals_per_epoch": "!set "
    "eval.eval_strategy=steps eval.eval_steps=N, or eval.eval_strategy=epoch",
    "saves_per_epoch": "!set checkpoint.save_steps=N, or checkpoint.save_strategy=epoch",
    "auto_resume_from_checkpoints": "checkpoint.resume_from_checkpoint=auto",
    "early_stopping": "train.early_stopping_patience", "revision_of_model": "model.revision",
    "excess_length_strategy": "!longer rows are cut and counted: data.max_length",
    "tokenizer_config": "model.tokenizer_name_or_path", "dataset_num_processes": "data.dataset_num_proc",
    # LLaMA-Factory
    "stage": "!supervised fine-tuning is what there is: leave it out", "finetuning_type": "model/peft=lora",
    "lora_target": "model/peft=lora model.peft.target_modules={value}",
    "additional_target": "model/peft=lora model.peft.modules_to_save={value}",
    "quantization_bit": "model/peft=lora model.quantization.load_in_4bit=true",
    "quantization_type": "model/peft=lora model.quantization.load_in_4bit=true "
    "model.quantization.bnb_4bit_quant_type={value}",
    "double_quantization": "model/peft=lora model.quantization.load_in_4bit=true "
    "model.quantization.bnb_4bit_use_double_quant={value}",
    "template": "!the tokenizer's own chat template is used; another one: data.chat_template=FILE.jinja",
    "dataset_dir": "!name the files themselves: data.train_files=[FOLDER/FILE.json]",
    "eval_dataset": "data.eval_files=[{value}] eval.eval_strategy=steps", "val_size": "data.eval_split",
    "neat_packing": "data.packing", "train_on_prompt": "data.completion_only_loss=false",
    "mask_history": "data.loss_on=last_assistant_turn", "tokenized_path": "data.cache_dir",
    "mix_strategy": "!mix by weight: data.sources=[{train_files: [A], weight: 1}, …]",
    "interleave_probs": "!mix by weight: data.sources=[{train_files: [A], weight: 0.7}, …]",
    "flash_attn": "model.attn_implementation=auto", "add_special_tokens": "model.add_tokens",
    "disable_gradient_checkpointing": "model.gradient_checkpointing=false",
}  # fmt: skip
_OF_VALUES = {
    ("evals_per_epoch", "1"): "eval.eval_strategy=epoch", ("saves_per_epoch", "1"): "checkpoint.save_strategy=epoch",
    ("adapter", "lora"): "model/peft=lora", ("adapter", "qlora"): _HINTS["qlora"],
    ("finetuning_type", "full"): "!every parameter is trained by default: leave it out",
    ("finetuning_type", "freeze"): _UNSUPPORTED, ("lora_target", "all"): _HINTS["lora_target_linear"],
    ("quantization_bit", "8"): "model/peft=lora model.quantization.load_in_8bit=true",
    ("flash_attn", "fa2"): "model.attn_implementation=flash_attention_2",
    ("flash_attn", "sdpa"): "model.attn_implementation=sdpa",
    ("flash_attn", "disabled"): "model.attn_implementation=eager",
}  # fmt: skip
"""Names that mean something else with these values."""
_ALL = {
    **{name: f"{_NOT_NEEDED}{why}" for why, names in _IGNORED.items() for name in names.split()},
    **dict.fromkeys(_UNKNOWN_HERE.split(), _UNSUPPORTED),
    **_HINTS,
}
_VALUES = {"tracker": {"none": "off", "null": "off", "all": "tensorboard", "[]": "off"}}
_DATA_FILE = re.compile(r"\.(jsonl|ndjson|json|csv|parquet)(\.gz|\.zst)?$")


@dataclass(frozen=True)
class Hint:
    """What to type instead, or why there is nothing to type."""

    overrides: tuple[str, ...] = ()
    note: str = ""

    def __str__(self) -> str:
        if not self.overrides:
            return f"{self.note[:1].upper()}{self.note[1:]}."
        return f"Did you mean {' '.join(map(typed, self.overrides))}?"


def theirs_to_ours(name: str, value: str, keys: Collection[str], open_keys: Collection[str]) -> Hint | None:
    """The hint for a name from elsewhere; None where it is unknown.

    Args:
        name: the last part of what was typed, with - or _ between words.
        value: as it was typed.
        keys: what can be set here. A hint at a key that this version does not have is a note.
        open_keys: those that take keys of the user's own.
    """
    name = name.replace("-", "_").lower()
    entry = _OF_VALUES.get((name, value.lower())) or _ALL.get(name)
    if name == "deepspeed" and (stage := re.search(r"(?:z|zero|stage)[_-]?([123])", value.lower())):
        entry = f"strategy=zero{stage[1]}"
    if entry is None:
        return None
    if entry.startswith("!"):
        return Hint(note=entry[1:])
    if "=" in entry:
        is_refused = "{value}" not in entry and value.lower() in ("false", "none", "null", "no")
        if is_refused:
            return Hint(note=f"leave it out, or see {entry.partition('=')[0]}")
        overrides = tuple(part.replace("{value}", value) for part in entry.split(" "))
    else:
        overrides = (f"{entry}={_VALUES.get(entry, {}).get(value.strip('[]').lower() or '[]', value)}",)
    ours = [override.partition("=")[0] for override in overrides]
    if not all(key in keys or "/" in key or key.rpartition(".")[0] in open_keys for key in ours):
        return Hint(note="there is no such setting in this version")
    return Hint(overrides)


def typed(override: str) -> str:
    """As it is typed in a shell."""
    return shlex.quote(override) if set(override) & set("\"'[]{}()~*?$&;|<>\\ ") else override


def choice_hint(group: str, value: str) -> str | None:
    """The setting that was meant by something that is no choice of a group: a model, a file, a class."""
    is_path = value.startswith(("/", "./", "../", "~"))
    is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", value) is not None
    if group == "data" and (_DATA_FILE.search(value) or is_path):
        return f'data.train_files=["{value}"]'
    if group == "data" and is_hub_id:
        return f"data.dataset_name={value}"
    if group == "model" and (is_hub_id or is_path):
        return f'model.model_name_or_path="{value}"' if is_path else f"model.model_name_or_path={value}"
    if group == "optim" and "." in value:
        return f"optim.name={value}"
    if group == "hub" and value.lower() in ("on", "true", "yes"):
        return "hub=push"
    if group == "strategy":
        return {"deepspeed": "strategy=zero2", "fsdp": "strategy=zero3"}.get(value.lower())
    return None
