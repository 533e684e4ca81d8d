"""What of a run's settings was changed since it ended, as far as it would decide the result. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from launcher.config.settings import CheckpointConfig, RunConfig, to_dict

_DECIDING = ("seed", "data", "model", "train", "optim", "scheduler")
_NOT_DECIDING = (
    "data.cache_dir", "data.dataset_num_proc", "data.on_bad_row", "data.eval_files", "model.trust_remote_code",
    "model.gradient_checkpointing",
    "train.logging_steps", "train.max_steps", "train.num_train_epochs", "train.per_device_train_batch_size",
    "train.full_determinism", "train.early_stopping_patience", "train.early_stopping_threshold",
    "train.on_out_of_memory",
)  # fmt: skip
"""The number of steps among them: whether more are asked for is another question."""
_KEPT_BY_THE_RUN = "data.chat_template_date"
"""Where it is not set, a run goes on with what it began with."""
_PATHS = ("data.train_files", "model.model_name_or_path", "model.tokenizer_name_or_path",
          "model.adapter_name_or_path")  # fmt: skip


def changed_settings(before: Mapping[str, Any], config: RunConfig) -> list[str]:
    """A line for each difference. What an older version did not know had its default."""
    defaults = dict(_settings(to_dict(RunConfig())))
    was, now = {**defaults, **dict(_settings(before))}, dict(_settings(to_dict(config)))
    return [
        f"{key}: {was.get(key)!r} in the run, {value!r} now"
        for key, value in now.items()
        if not (key == _KEPT_BY_THE_RUN and value is None) and _comparable(key, was.get(key)) != _comparable(key, value)
    ]


def _settings(data: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for group in _DECIDING:
        value = data.get(group)
        items = (
            {f"{group}.{name}": inner for name, inner in value.items()} if isinstance(value, dict) else {group: value}
        )
        yield from ((key, inner) for key, inner in items.items() if key not in _NOT_DECIDING and group in data)
    if isinstance(data.get("eval"), dict) and isinstance(data.get("checkpoint"), dict):
        yield "checkpoint.load_best_model_at_end", _choice(data["eval"], data["checkpoint"])


def _choice(evaluation: Mapping[str, Any], checkpoint: Mapping[str, Any]) -> str | bool:
    """By what the published model is chosen; False: it is the last one."""
    if not checkpoint.get("load_best_model_at_end") or evaluation.get("eval_strategy") in (None, False, "no"):
        return False
    name, direction = checkpoint.get("metric_for_best_model"), checkpoint.get("greater_is_better")
    chosen = CheckpointConfig(metric_for_best_model=str(name or "loss"), greater_is_better=direction)
    return f"the {'highest' if chosen.is_greater_better else 'lowest'} {chosen.metric_key}"


def _comparable(key: str, value: Any) -> Any:
    """A file or folder that was moved is the same; so is a number that YAML wrote another way."""
    if key in _PATHS:
        return [Path(str(name)).name for name in value] if isinstance(value, list) else value and Path(str(value)).name
    if key == "model.attn_implementation":  # the default used to be sdpa, which auto is wherever a model takes it
        return "sdpa" if value == "auto" else value
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value
