"""Real configs with random weights, and packed rows of documents of uneven lengths: speed needs nothing learnt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

_NUM_WORDS = 30_000
_MEDIAN_TOKENS, _SPREAD = 600, 1.0
"""Of a document: lognormal, as long as chats with reasoning are."""

CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": {
        "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
        "tie_word_embeddings": True, "max_position_embeddings": 40960,
    },
    "llama-3.2-1b": {
        "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256,
        "tie_word_embeddings": True, "max_position_embeddings": 131072,
    },
    "llama-3-8b": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
        "tie_word_embeddings": False, "max_position_embeddings": 8192,
    },
    "tiny": {  # to try the benchmarks on a CPU
        "model_type": "qwen3", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 32000,
        "tie_word_embeddings": True, "max_position_embeddings": 40960,
    },
}  # fmt: skip


def make_model(name: str, folder: Path, device: str) -> Path:
    """A folder that from_pretrained reads: config, bf16 weights made on the device, a tokenizer of numbered words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    path = folder / name
    if path.is_dir():
        return path
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i + 3 for i in range(_NUM_WORDS)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    config = AutoConfig.for_model(**CONFIGS[name], pad_token_id=0, bos_token_id=1, eos_token_id=2)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(path)
    fast.save_pretrained(path)
    del model
    if device == "cuda":
        torch.cuda.empty_cache()  # what this process keeps, no contender has
    return path


def write_documents(path: Path, num_tokens: int, max_length: int) -> dict[str, float]:
    """Texts of random words, none longer than a row. Returns what the count of operations needs."""
    source = np.random.default_rng(0)
    lengths = []
    with path.open("w") as file:
        while sum(lengths) < num_tokens:
            length = int(np.clip(source.lognormal(np.log(_MEDIAN_TOKENS), _SPREAD), 16, max_length - 1))
            words = (source.zipf(1.3, length) - 1) % _NUM_WORDS
            file.write(json.dumps({"text": " ".join(f"w{i}" for i in words)}) + "\n")
            lengths.append(length + 1)
    counted = np.asarray(lengths, dtype=float)
    return {"mean_length": float(counted.mean()), "mean_attended": float((counted**2).mean() / counted.mean() / 2)}


def flops_per_token(name: str, mean_attended: float, *, is_lora: bool = False) -> float:
    """Of forward and backward: 6 per weight of a matrix product, or 4 where the weight is frozen (no gradient of its
    own); attention by how many tokens of its own row a token attends to on average (12 per layer, width and token)."""
    c = CONFIGS[name]
    width = c["num_attention_heads"] * c["head_dim"]
    kv_width = c["num_key_value_heads"] * c["head_dim"]
    attention = c["hidden_size"] * (2 * width + 2 * kv_width)
    layer = attention + 3 * c["hidden_size"] * c["intermediate_size"]
    weights = c["num_hidden_layers"] * layer + c["hidden_size"] * c["vocab_size"]
    return (4 if is_lora else 6) * weights + 12.0 * c["num_hidden_layers"] * width * mean_attended
