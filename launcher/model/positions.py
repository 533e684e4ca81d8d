"""Whether rows are longer than the positions that a model knows, asked before the first step with the row at fault; and
rotary positions that change with the length of what they are computed for.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch

from launcher.base.errors import ConfigError

_TABLE = re.compile(r"(^|\.)(wpe|embed_positions|positions_embed|position_embeddings?(\.embedding)?|pos_(emb|enc)\w*)$")


def check_positions(
    module: torch.nn.Module, config: Any, longest: int, place: Callable[[], str], *, is_packed: bool = False,
    micro_batch_size: int = 1,
) -> list[str]:  # fmt: skip
    """A notice where rows go beyond what a model with rotary positions was made for: it runs there all the same.

    Args:
        config: the model's, of transformers.
        longest: tokens of the longest row, as cut by data.max_length.
        place: file and line of that row.
        is_packed: several rows in one sequence.
        micro_batch_size: samples of a forward.

    Raises:
        ConfigError: the model looks positions up in a table, and the row goes beyond its end; or a long row in a pack
            would change the positions of the others.
    """
    limit = _table_size(module, config)
    if limit is not None and longest > limit:
        raise ConfigError(
            [
                f"{place()} has {longest} tokens but {config.model_type} has only {limit} positions. "
                f"To cut rows: data.max_length={limit}"
            ]
        )
    notices = []
    switch = _switching_length(config)
    if switch is not None and longest > switch[1]:
        what = f"{place()} has {longest} tokens, and {config.model_type} (rope_type={switch[0]}) takes other positions "
        if is_packed:
            raise ConfigError([
                f"data.packing=true: {what}for all rows of a pack where one has more than {switch[1]}, so that they "
                f"are not what they are alone. Set data.packing=false, or cut rows: data.max_length={switch[1]}"
            ])  # fmt: skip
        if micro_batch_size > 1:
            notices.append(
                f"{what}for all rows of a micro-batch where one has more than {switch[1]}, as in transformers. To "
                "train each row as it is alone: train.per_device_train_batch_size=1"
            )
    # With scaled rotary positions: of the scaled model.
    known = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is not None or not isinstance(known, int) or longest <= known:
        return notices
    return [
        *notices,
        f"{place()} has {longest} tokens, more than the {known} positions that {config.model_type} was made for "
        f"(max_position_embeddings). To cut rows: data.max_length={known}",
    ]


def _switching_length(config: Any) -> tuple[str, int] | None:
    """(rope_type, tokens) beyond which a model's rotary positions become others, with the longest row at hand."""
    text = config.get_text_config()
    parameters = getattr(text, "rope_parameters", None) or {}
    for own in [parameters, *(part for part in parameters.values() if isinstance(part, dict))]:  # per kind of layer
        if own.get("rope_type") in ("longrope", "dynamic"):
            limits = own.get("original_max_position_embeddings"), getattr(text, "max_position_embeddings", None)
            return next(((str(own["rope_type"]), limit) for limit in limits if isinstance(limit, int)), None)
    return None


def forget_lengths(module: torch.nn.Module) -> None:
    """Has rotary positions depend on the forward at hand alone.

    transformers' `dynamic` ones keep the frequencies of the longest row so far (modeling_rope_utils.py,
    dynamic_frequency_update; seen in 5.23): what a row is would depend on the rows before it and on evaluations, a
    continued run would not know them, and under DDP the processes' buffers would no longer be alike.
    """
    for part in module.modules():
        kinds = getattr(part, "rope_type", None)
        if "dynamic" in (kinds.values() if isinstance(kinds, dict) else [kinds]):
            _forget_after_each_forward(part)


def _forget_after_each_forward(part: torch.nn.Module) -> None:
    kept: dict[str, Any] = {}

    def remember(*_: Any) -> None:
        kept["buffers"] = dict(part._buffers)
        kept["lengths"] = {name: value for name, value in vars(part).items() if name.endswith("max_seq_len_cached")}

    def restore(*_: Any) -> None:
        part._buffers.update(kept["buffers"])
        vars(part).update(kept["lengths"])

    part.register_forward_pre_hook(remember)
    part.register_forward_hook(restore, always_call=True)


def _table_size(module: torch.nn.Module, config: Any) -> int | None:
    """How many positions a table has, of learnt ones or computed once; None for rotary positions, ALiBi and models
    without any."""
    others = _models_beside_text(module, config)
    for name, part in module.named_modules():
        if isinstance(part, torch.nn.Embedding) and _TABLE.search(name) and not name.startswith(others):
            first = int(getattr(part, "offset", 0))
            if type(part) is torch.nn.Embedding and part.padding_idx is not None:  # RoBERTa's begin behind padding's
                first = part.padding_idx + 1
            return part.num_embeddings - first
    tables = {name: buffer for name, buffer in module.named_buffers() if buffer.ndim == 2 and _TABLE.search(name)}
    return next((len(table) for name, table in tables.items() if not name.startswith(others)), None)


def _models_beside_text(module: torch.nn.Module, config: Any) -> tuple[str, ...]:
    """Beginnings of the names of what sees images or hears: their positions are those of patches and frames."""
    from transformers import PreTrainedModel

    kinds = {config.model_type, config.get_text_config().model_type}
    parts = [(name, part) for name, part in module.named_modules() if isinstance(part, PreTrainedModel)]
    return tuple(f"{name}." for name, part in parts if name and part.config.model_type not in kinds)
