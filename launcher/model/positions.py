"""Whether rows are longer than the positions that a model knows. Asked before the first step, with the row at fault."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch

from launcher.base.errors import ConfigError

_TABLE = re.compile(r"(^|\.)(wpe|embed_positions|position_embeddings?|pos_emb\w*)$")


def check_positions(module: torch.nn.Module, config: Any, longest: int, place: Callable[[], str]) -> list[str]:
    """A notice where rows go beyond what a model with rotary positions was made for: it runs there all the same.

    Args:
        config: the model's, of transformers.
        longest: tokens of the longest row, as cut by data.max_length.
        place: file and line of that row.

    Raises:
        ConfigError: the model looks positions up in a table, and the row goes beyond its end.
    """
    limit = _table_size(module)
    if limit is not None and longest > limit:
        raise ConfigError(
            [
                f"{place()} has {longest} tokens but {config.model_type} has only {limit} positions. "
                f"To cut rows: data.max_length={limit}"
            ]
        )
    known = getattr(config, "max_position_embeddings", None)  # with scaled rotary positions: of the scaled model
    if limit is not None or not isinstance(known, int) or longest <= known:
        return []
    return [
        f"{place()} has {longest} tokens, more than the {known} positions that {config.model_type} was made for "
        f"(max_position_embeddings). To cut rows: data.max_length={known}"
    ]


def _table_size(module: torch.nn.Module) -> int | None:
    """How many positions a table of learnt ones has; None for rotary positions, ALiBi and models without any."""
    for name, part in module.named_modules():
        if isinstance(part, torch.nn.Embedding) and _TABLE.search(name):
            return part.num_embeddings - int(getattr(part, "offset", 0))
    return None
