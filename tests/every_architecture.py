"""Every causal architecture of transformers that can be made small: for promises about whatever model comes."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB_SIZE = 256
_MAX_PARAMETERS = 20_000_000

_SMALL: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 128,
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "intermediate_size": 48, "sliding_window": 16, "embedding_size": 32, "state_size": 8, "rotary_dim": 8,
    "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "n_inner": 48,
    "d_model": 32, "n_layers": 2, "n_heads": 4, "num_layers": 2, "word_embed_proj_dim": 32, "ffn_dim": 48,
    "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "n_shared_experts": 1, "n_group": 2,
    "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_expand": 2, "mamba_n_groups": 1,
    "mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "mamba_d_ssm": 64, "chunk_size": 8,
    "d_inner": 48, "d_embed": 32, "d_ff": 48, "num_heads": 4, "d_state": 8, "d_kv": 8,
    "dim_model": 32, "dim_ff": 48, "dim_head": 8, "n_langs": 1, "emb_dim": 32,
}  # fmt: skip
_LEFT_OUT: Any = object()
_LATENT = {"num_key_value_heads": 4, "head_dim": 8, "v_head_dim": 8}
_DEEPER = {"num_hidden_layers": 4}
_OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "longcat_flash",
         "minicpm3", "youtu"), _LATENT
    ),
    **dict.fromkeys(
        ("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next", "qwen4_exp_text", "recurrent_gemma", "olmo_hybrid"), _DEEPER
    ),
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 2},
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 16},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"full_attn_idxs": [1], "block_ff_dim": 48, "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "bailing_hybrid": _DEEPER | _LATENT, "kimi_linear": _DEEPER | _LATENT, "lfm3": _DEEPER,
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "xlnet": {"max_position_embeddings": _LEFT_OUT}, "zaya": {"num_experts_per_tok": 1},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "mamba"]},
    "zamba2": {"num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "mamba"], "hybrid_layer_ids": [1]},
    "gemma4_text": {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 256},
    "gemma3n_text": {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 256,
                     "layer_types": ["sliding_attention", "full_attention"], "activation_sparsity_pattern": [0.5, 0.0],
                     "intermediate_size": [48, 48]},
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "attn_layers": ["local", "lsh"], "feed_forward_size": 48,
                 "attention_head_size": 8},
}  # fmt: skip

NAMES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def small_model(kind: str, **fields: Any) -> Any:
    """A tiny one with fixed weights and without dropout; None where it cannot be made so small."""
    try:
        config = _config(kind, fields)
        with torch.device("meta"):
            if sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters()) > _MAX_PARAMETERS:
                return None
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config)
    except Exception:  # whatever a config class or a model says of sizes that it did not expect
        return None


def _config(kind: str, more: dict[str, Any]) -> Any:
    default = AutoConfig.for_model(kind)
    fields = {name: _SMALL[name] for name in _SMALL if _is_settable(default, name)} | _OWN.get(kind, {}) | more
    fields = {name: value for name, value in fields.items() if value is not _LEFT_OUT}
    for name, value in vars(default).items():
        if isinstance(value, float) and ("drop" in name or "jitter" in name):
            fields.setdefault(name, 0.0)
    return AutoConfig.for_model(kind, **fields)


def _is_settable(config: Any, name: str) -> bool:
    own = getattr(type(config), name, None)
    try:
        return hasattr(config, name) and not (isinstance(own, property) and own.fset is None)
    except Exception:  # of an attribute that differs by layer
        return False
