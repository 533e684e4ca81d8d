"""Embeddings that grow with the tokenizer, and what the rows of new tokens hold at first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from launcher.base import _deepspeed
from launcher.base.errors import ConfigError
from launcher.config.settings import RunConfig


@dataclass(frozen=True)
class NewRows:
    """Rows of parameters (by name in memory) that the pretrained model did not have, all with the same content."""

    ids: tuple[int, ...]
    content: dict[str, Tensor]
    """A row each: the mean of the rows before the first new one."""


def num_rows(tokenizer: Any) -> int:
    """Rows that an embedding needs for every id of a tokenizer; ids may have gaps."""
    return int(max(tokenizer.get_vocab().values(), default=-1)) + 1


def refuse_small_vocabulary(fields: Mapping[str, Any], tokenizer: Any) -> None:
    """For `model.config`, before a model is made of it: transformers fails on a pad token beyond the vocabulary.

    Raises:
        ConfigError: it names a vocabulary that is smaller than the tokenizer.
    """
    size, needed = fields.get("vocab_size"), num_rows(tokenizer)
    if isinstance(size, int) and size < needed:
        raise ConfigError(
            [
                f"model.config.vocab_size must be at least {needed}, as many as the tokenizer has (got {size}). "
                f"Set model.config.vocab_size={needed}, or leave it out: it is set from the tokenizer then"
            ]
        )


def grow(model: Any, config: RunConfig, tokenizer: Any, new_token_ids: Sequence[int]) -> NewRows:
    """Makes room for every token, and sets the rows of new ones to the mean of the old ones. Collective under ZeRO-3.

    transformers (`mean_resizing`) draws them around that mean with 1e-9 of the covariance. Here they are the mean
    itself, rounded to `model.dtype`: the same under every strategy and on every process, and without the covariance of
    the whole embedding. In bf16 the two are the same numbers.

    Args:
        new_token_ids: of `model.add_tokens`. They also get the mean where the embedding had a row to spare for them,
            which nothing has trained.

    Raises:
        ConfigError: the tokenizer was larger than the embedding before, and `model.resize_embeddings` is not set; or
            transformers cannot resize the embedding of this architecture (xLSTM).
    """
    num_before = _deepspeed.full_shape(model.get_input_embeddings().weight)[0]
    needed = num_rows(tokenizer)
    _refuse_larger_tokenizer(config, tokenizer, num_before, new_token_ids)
    ids = tuple(sorted({*new_token_ids, *range(num_before, needed)}))
    if not ids:
        return NewRows((), {})
    if needed > num_before:
        try:
            model.resize_token_embeddings(needed, mean_resizing=False)
        except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
            raise ConfigError([
                f"the embedding of {model.config.model_type} cannot grow from {num_before} to {needed} tokens "
                f"({error}). Leave out what asks for more: model.add_tokens=[], and no tokenizer but the model's"
            ]) from error  # fmt: skip
    dtype: torch.dtype = getattr(torch, config.model.dtype)
    return NewRows(ids, _fill(model, ids, dtype))


def _refuse_larger_tokenizer(config: RunConfig, tokenizer: Any, num_before: int, new_token_ids: Sequence[int]) -> None:
    settings, vocabulary = config.model, tokenizer.get_vocab()
    old = max((i for i in vocabulary.values() if i not in set(new_token_ids)), default=-1) + 1
    needed = num_rows(tokenizer)
    if settings.config and needed > num_before:
        mend = f"Set model.config.vocab_size={needed}, or leave it out"
    elif old > num_before and not settings.resize_embeddings and not _is_adapters_own(config):
        mend = (
            "To let its embeddings grow: model.resize_embeddings=true; else leave model.tokenizer_name_or_path out: "
            "the model's own tokenizer is used then"
        )
    else:
        return
    raise ConfigError([f"the tokenizer has {needed} tokens, the model's vocabulary only {num_before}. {mend}"])


def _is_adapters_own(config: RunConfig) -> bool:
    """An adapter that brings its tokenizer was trained on embeddings that had grown to it."""
    return bool(config.model.adapter_name_or_path) and not config.model.tokenizer_name_or_path


@torch.no_grad()
def _fill(model: Any, ids: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    found = {}
    index = torch.tensor(ids)
    with _deepspeed.gathered(_of_tokens(model)):
        for param in _of_tokens(model):
            old = param[: ids[0]]
            mean = (old.sum(0, dtype=torch.float64) / max(1, len(old))).to(dtype)
            param.index_copy_(0, index.to(param.device), mean.to(param.dtype).expand(len(ids), *mean.shape))
            found[next(name for name, other in model.named_parameters() if other is param)] = mean.cpu()
    return found


def _of_tokens(model: Any) -> list[nn.Parameter]:
    """The parameters with a row for each token: embedding, head and the head's bias; tied ones once."""
    head = model.get_output_embeddings()
    params = [model.get_input_embeddings().weight, getattr(head, "weight", None), getattr(head, "bias", None)]
    unique = {id(param): param for param in params if param is not None}
    return list(unique.values())
