"""Whether a model predicts a token from those before it alone."""

from __future__ import annotations

from typing import Any

import torch

from launcher.base.errors import ConfigError
from launcher.model.leaks import NUM_DRAWS, Leaks, all_agree, evaluating, log_probs, padded, random_rows

_LENGTH = 12
_SWITCHES = {"is_decoder": "true", "causal": "true", "use_bidirectional_attention": "false"}
"""Fields of transformers' configs by which an architecture becomes causal."""


def check_causal(model: Any, config: Any, vocab_size: int, device: torch.device, source: str | None) -> None:
    """Refuses a model that sees the token that it is to predict: it would learn to copy it, and its loss would fall to
    0. transformers builds such ones without an error (BERT, RoBERTa and XLM, made for masked tokens). Collective.

    Args:
        model: the prepared one, as training calls it.
        config: transformers' config of it.
        source: model.model_name_or_path; None: from scratch.

    Raises:
        ConfigError: with the field of its config that makes it causal, where it has one.
    """
    leaks = Leaks()
    with evaluating(model):
        for draw in range(NUM_DRAWS):
            row, beside, other = random_rows(draw, (_LENGTH, _LENGTH, _LENGTH), vocab_size, device)
            changed = row.clone()
            changed[-1] = (row[-1] + 1) % vocab_size
            before, after = (log_probs(model, padded([first, beside]))[0, :-1] for first in (row, changed))
            leaks.add(before, after)
            if all_agree(leaks.are_none or leaks.are_unknown, device):
                return
            leaks.add_control(before, log_probs(model, padded([row, other]))[0, :-1])
    if all_agree(leaks.are_rounding, device):
        return
    raise ConfigError([
        f"{config.model_type} is not causal as it is configured: what it predicts of a token depends on that token and "
        f"those after it (by {leaks.smallest:.2g} in log probability), so that it would learn to copy. "
        + _cure(config, source)
    ])  # fmt: skip


def _cure(config: Any, source: str | None) -> str:
    text = config.get_text_config()
    for name, value in _SWITCHES.items():
        if str(getattr(text, name, value)).lower() != value:
            where = f"{name}: {value} in the config.json of {source}" if source else f"model.config.{name}={value}"
            return f"Set {where}"
    return "Train another architecture: model.config.model_type=llama" if source is None else "Train another model"
