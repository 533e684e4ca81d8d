"""A hint must itself work when it is typed: names of TrainingArguments, SFTConfig and other tools, composed again."""

# ruff: noqa: E501 - tables
from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest
from transformers import TrainingArguments

from launcher import cli
from launcher.base.errors import ConfigError
from launcher.config.compose import compose
from launcher.config.hints import _ALL, choice_hint
from launcher.config.schema import valid_keys
from launcher.config.settings import RunConfig

SFT_FIELDS = [
    "model_init_kwargs", "trust_remote_code", "router_aux_loss_coef", "chat_template_path", "dataset_text_field",
    "dataset_kwargs", "dataset_num_proc", "eos_token", "max_length", "truncation_mode", "shuffle_dataset", "packing",
    "packing_strategy", "padding_free", "pad_to_multiple_of", "eval_packing", "completion_only_loss",
    "assistant_only_loss", "loss_type", "activation_offloading", "pad_token",
]  # fmt: skip
"""Of trl 1.16, those that TrainingArguments does not have."""
OTHERS = [
    "model_name_or_path", "model_revision", "dtype", "torch_dtype", "attn_implementation", "use_peft", "lora_r",
    "lora_alpha", "lora_dropout", "lora_target_modules", "lora_modules_to_save", "use_rslora", "use_dora",
    "load_in_4bit", "load_in_8bit", "dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split",
]  # fmt: skip
"""TRL's ModelConfig and ScriptArguments."""
VALUES = {
    **dict.fromkeys(["max_length", "seq_len", "max_seq_len", "max_seq_length", "sequence_len", "cutoff_len", "block_size"], "512"),
    **dict.fromkeys(["trust_remote_code", "packing", "padding_free", "completion_only_loss", "logging_first_step"], "true"),
    "hub_strategy": "every_save",
    "bf16": "true", "fp16": "true", "fsdp": "full_shard", "fsdp_config": "x.json", "deepspeed": "ds.json",
    "overwrite_output_dir": "true", "do_eval": "true", "use_peft": "true", "lora": "true", "hub_always_push": "true",
    "save_strategy": "epoch", "eval_strategy": "steps", "evaluation_strategy": "steps", "activation_checkpointing": "true",
    "lr_scheduler_type": "cosine", "lr_scheduler": "cosine", "lr_scheduler_kwargs": "{num_cycles: 2}", "report_to": "none",
    "logger": "tensorboard", "save_total_limit": "3", "metric_for_best_model": "loss", "resume_from_checkpoint": "never",
    "hub_model_id": "org/name", "model_name_or_path": "org/name", "dataset_name": "org/data", "dtype": "bfloat16",
    "torch_dtype": "bfloat16", "attn_implementation": "eager", "lora_target_modules": "[q_proj,v_proj]",
    "lora_modules_to_save": "[lm_head]", "loss_type": "nll", "assistant_only_loss": "true", "betas": "[0.9,0.95]",
    "train_file": "rows.jsonl", "train_data": "rows.jsonl", "data_path": "rows.jsonl", "dataset_path": "rows.jsonl",
    "data_files": "rows.jsonl", "eval_file": "rows.jsonl", "chat_template_path": "chat.jinja", "model_revision": "main",
    "dataset_config": "default", "dataset_test_split": "0.1", "val_set_size": "0.1", "eval_split_ratio": "0.1",
    "dataset_train_split": "train", "lora_dropout": "0.05", "warmup_ratio": "0.03", "momentum": "0.9",
    "hub_private_repo": "true", "greater_is_better": "true", "quantization": "4bit", "qlora": "true",
    "merge_lora": "true", "resize_vocab": "true", "additional_special_tokens": '["<a>"]', "new_special_tokens": '["<a>"]',
    "tokens": '["<a>"]', "attn_impl": "eager", "adapter": "org/name", "adapter_path": "org/name",
    "lora_model_dir": "org/name", "use_bnb_nested_quant": "true", "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_compute_dtype": "bfloat16", "sample_packing": "true",
    "partition": "gpu", "hub_revision": "main", "wandb_project": "sft", "flash_attention": "true", "project": "sft",
    "trackio_space_id": "org/space", "trackio_bucket_id": "org/bucket", "eval_steps": "10", "dataset_text_field": "body",
    "dataset": "org/data", "datasets": "org/data", "auto_find_batch_size": "true", "output_dir": "runs/x",
    "run_name": "mine", "name": "mine", "eos_token": "x", "gradient_checkpointing": "true", "load_in_4bit": "true",
    "dataset_prepared_path": "cache", "train_on_inputs": "true", "auto_resume_from_checkpoints": "true",
    "sdp_attention": "true", "lora_target_linear": "true", "peft_use_dora": "true", "peft_use_rslora": "true",
    "revision_of_model": "main", "tokenizer_config": "org/name", "lora_target": "[q_proj]", "finetuning_type": "lora",
    "additional_target": "[lm_head]", "quantization_bit": "4", "quantization_type": "nf4", "double_quantization": "true",
    "eval_dataset": "rows.jsonl", "val_size": "0.1", "neat_packing": "true", "train_on_prompt": "true",
    "mask_history": "true", "tokenized_path": "cache", "flash_attn": "auto", "add_special_tokens": '["<a>"]',
    "disable_gradient_checkpointing": "true",
    "load_in_8bit": "true", "base_model": "org/name", "model_name": "org/name", "model_id": "org/name",
    "model_path": "org/name", "pretrained": "org/name", "optim": "adamw_torch", "optimizer": "adam", "output": "runs/x",
}  # fmt: skip
NO_OVERRIDES = {name for name, entry in _ALL.items() if entry.startswith("!")}


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for room in ("trackers", "quantization_rules"):
        monkeypatch.setattr(f"launcher.config.{room}.is_installed", lambda module: True)
    for name in ("rows.jsonl", "chat.jsonl"):
        Path(name).write_text(json.dumps({"text": "one"}) + "\n")
    Path("chat.jinja").write_text("{{ messages }}")


def told(override: str) -> str:
    with pytest.raises(ConfigError) as caught:
        compose([override])
    (problem,) = caught.value.problems
    return problem


def proposals(problem: str) -> list[list[str]]:
    """The overrides of each `Did you mean …?`, as a shell reads them."""
    return [
        shlex.split(text)
        for match in re.findall(r"Did you mean (.+?)\?(?: |$)", problem)
        for text in match.split(" or ")
    ]


def check_proposals(problem: str) -> None:
    for overrides in proposals(problem):
        compose(overrides)


THEIRS = {f.name: f.default for f in dataclasses.fields(TrainingArguments)}


def value_of(name: str) -> str:
    default = THEIRS.get(name)
    return VALUES.get(name, str(default).lower() if isinstance(default, (bool, int, float)) else "1")


def test_hint_composes_when_a_name_of_another_tool_is_set() -> None:
    """Hints about different keys are composed together: one composition takes a third of a second."""
    names = dict.fromkeys([*THEIRS, *SFT_FIELDS, *OTHERS, *_ALL])
    overrides = [f"train.{name}={value_of(name)}" for name in names if f"train.{name}" not in valid_keys(RunConfig)]
    with pytest.raises(ConfigError) as caught:
        compose(overrides)
    problems = [p for p in caught.value.problems if " is not a setting" in p]
    assert len(problems) == len(overrides)
    together: list[dict[str, list[str]]] = []
    for problem in problems:
        name = problem.partition(" ")[0].removeprefix("train.")
        assert name in NO_OVERRIDES or proposals(problem) or "in this version" in problem, problem
        assert "Valid:" not in problem, f"nothing was proposed: {problem}"
        for proposed in proposals(problem):
            keys = {re.sub(r"data\.(dataset_name|train_files)", "data", o.partition("=")[0]) for o in proposed}
            is_alone = any("model.quantization" in override for override in proposed)
            group = None if is_alone else next((g for g in together if not keys & g.keys()), None)
            if group is None:
                together.append(group := {})
            group |= dict.fromkeys(keys, proposed)
            if any("model.quantization" in override for override in proposed):
                compose([*proposed, "model.model_name_or_path=org/name"])  # of pretrained models alone
                together.remove(group)
    for group in together:
        everything = list(dict.fromkeys(override for proposed in group.values() for override in proposed))
        try:
            compose(everything)
        except ConfigError:
            for proposed in group.values():
                compose(proposed)


def test_every_field_of_sft_config_is_known_when_trl_is_installed() -> None:
    if importlib.util.find_spec("trl") is not None:
        from trl import SFTConfig

        names = {f.name for f in dataclasses.fields(SFTConfig)}
        assert names - THEIRS.keys() <= {*SFT_FIELDS, *_ALL}


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("optim.lr=1e-4", "optim.learning_rate=1e-4"),
        ("lr=1e-4", "optim.learning_rate=1e-4"),
        ("model=Qwen/Qwen2.5-0.5B", "model.model_name_or_path=Qwen/Qwen2.5-0.5B"),
        ("data=chat.jsonl", 'data.train_files=["chat.jsonl"]'),
        ("data=org/rows", "data.dataset_name=org/rows"),
        ("optim=AdamW", "optim=adamw"),
        ("optim=torch.optim.NAdam", "optim.name=torch.optim.NAdam"),
        ("strategy=fsdp", "strategy=zero3"),
        ("hub=on", "hub=push"),
        ("wandb=true", "tracker=wandb"),
        ("resume=true", "checkpoint.resume_from_checkpoint=auto"),
        ("train.adam_beta2=0.95", "optim.kwargs.betas=[0.9,0.95]"),
        ("model.lora_r=8", "model.peft.r=8"),
        ("adapter=lora", "model/peft=lora"),
        ("finetuning_type=lora", "model/peft=lora"),
        ("flash_attn=fa2", "model.attn_implementation=flash_attention_2"),
        ("lora_target=all", "model.peft.target_modules=all-linear"),
    ],
)
def test_hint_names_what_was_meant(override: str, meant: str) -> None:
    problem = told(override)
    assert any(meant in overrides for overrides in proposals(problem)), problem
    check_proposals(problem)


def test_choice_that_is_a_path_becomes_the_setting() -> None:
    assert choice_hint("model", "./my") == 'model.model_name_or_path="./my"'
    assert choice_hint("checkpoint", "org/x") is None


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["--max_steps=10"], "train.max_steps=10"),
        (["--max-steps", "10"], "train.max_steps=10"),
        (["--learning_rate", "1e-4", "seed=1"], "optim.learning_rate=1e-4"),
        (["--optim=adamw_torch"], "optim=adamw"),
        (["--deepspeed=ds_z3_config.json"], "strategy=zero3"),
        (["--evals_per_epoch=1"], "eval.eval_strategy=epoch"),
        (["--lora_r=8"], "model/peft=lora model.peft.r=8"),
        (["--train.max_steps=10"], "train.max_steps=10"),
        (["--load_best_model_at_end"], "checkpoint.load_best_model_at_end=VALUE"),
    ],
)
def test_option_of_another_tool_is_named_as_our_setting(
    arguments: list[str], meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", "--cfg", "job", *arguments]) == 2
    shown = capsys.readouterr().err
    assert f"Did you mean {meant}?" in shown
    if "VALUE" not in meant:
        check_proposals(shown)


def test_list_that_hydra_cannot_read_is_quoted_item_by_item(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for value, files in (("[~/rows.jsonl]", 1), ("[~/rows.jsonl,~/chat.jsonl]", 2), ("~/rows.jsonl", 1)):
        problem = told(f"data.train_files={value}")
        (quoted,) = shlex.split(problem.partition("for Hydra: ")[2])
        assert len(compose([quoted]).data.train_files) == files
