"""What ends generation: the tokens that end what was learnt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def end_generation_with(model: Any, token_ids: Sequence[int]) -> bool:
    """Makes `generate` stop at these tokens as well; says whether it did not before.

    The tokenizer's EOS, the template's end of turn and the model's own list can be three different things: a Qwen2.5
    base model stops at <|endoftext|>, while its chats end with <|im_end|>. transformers' Trainer aligns them likewise
    (trainer_utils.align_special_tokens); an adapter's folder holds no generation config.
    """
    generation = getattr(model, "generation_config", None)
    if generation is None or not token_ids:
        return False
    before = generation.eos_token_id
    known = [] if before is None else list(before) if isinstance(before, (list, tuple)) else [before]
    merged = [*known, *(token for token in dict.fromkeys(token_ids) if token not in known)]
    if merged == known:
        return False
    generation.eos_token_id = merged[0] if len(merged) == 1 else merged
    return True
