"""Tiny models of the architectures on which promises about models are tested: fields of `model.config`."""

from __future__ import annotations

from typing import Any

_COMMON: dict[str, Any] = {
    "vocab_size": 264, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "intermediate_size": 48, "max_position_embeddings": 128, "eos_token_id": 257, "pad_token_id": 256,
    "bos_token_id": None,
}  # fmt: skip
_PLAIN = {name: value for name, value in _COMMON.items() if name != "head_dim"}
_MIXTURE: dict[str, Any] = {
    **_COMMON, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True,
}  # fmt: skip

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": _COMMON,
    "llama_tied": {**_COMMON, "model_type": "llama", "tie_word_embeddings": True},
    "qwen3": _COMMON,
    "qwen3_moe": _MIXTURE,
    "mixtral": {**_COMMON, "num_local_experts": 4},
    "olmoe": {**_MIXTURE, "intermediate_size": 16},
    "deepseek_v3": {
        **_MIXTURE, "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 2, "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
        "v_head_dim": 8, "n_shared_experts": 1,
    },
    "ernie4_5_moe": {**_MIXTURE, "moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1},
    "gpt_oss": {**_COMMON, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16},
    "gemma3_text": {**_COMMON, "sliding_window": 16},
    "qwen2_moe": {**_MIXTURE, "shared_expert_intermediate_size": 16, "decoder_sparse_step": 1},
    "granite": _COMMON,
    "falcon": {**_PLAIN, "new_decoder_architecture": True, "num_kv_heads": 2},
    "olmo2": _COMMON,
    "starcoder2": _COMMON,
    "cohere2": {**_COMMON, "sliding_window": 16},
    "glm4": _COMMON,
    "smollm3": _COMMON,
    "nemotron": _COMMON,
    "deepseek_v2": {
        **_COMMON, "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 16, "first_k_dense_replace": 1,
        "q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
        "v_head_dim": 8, "n_shared_experts": 1,
    },
    "bloom": {"vocab_size": 264, "hidden_size": 32, "n_layer": 2, "n_head": 4, "eos_token_id": 257, "pad_token_id": 256,
              "bos_token_id": None},
    "opt": {"vocab_size": 264, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "word_embed_proj_dim": 32, "max_position_embeddings": 128, "eos_token_id": 257, "pad_token_id": 256,
            "bos_token_id": None},
    "gpt_neox": _COMMON,
    "phi3": {**_COMMON, "num_key_value_heads": 4},
    "gpt2": {
        "vocab_size": 264, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "eos_token_id": 257,
        "bos_token_id": 257, "pad_token_id": 256,
    },
    "lfm2": {**_COMMON, "full_attn_idxs": [1], "block_ff_dim": 48, "block_auto_adjust_ff_dim": False},
    "mamba2": {
        "vocab_size": 264, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "num_heads": 8, "head_dim": 8,
        "n_groups": 2, "eos_token_id": 257, "pad_token_id": 256, "bos_token_id": 257,
    },
}  # fmt: skip
"""deepseek_v3 has a persistent buffer, ernie4_5_moe a frozen parameter, both some that stay fp32; gpt2, gemma3 and
lfm2 are tied; the mixtures' experts are one parameter in memory; mamba2 has neither attention nor positions."""


def model_config(name: str) -> dict[str, Any]:
    return {"model_type": name, **ARCHITECTURES[name]}
