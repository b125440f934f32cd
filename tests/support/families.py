"""Tiny random models of many families: every setting that could matter is on."""

from __future__ import annotations

from typing import Any
from unittest import SkipTest

import transformers

# Windows are shorter than the documents, weights large enough that an error shows in the logits.
_COMMON: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
_WINDOW: dict[str, Any] = {"sliding_window": 5}
_MIXED = {**_WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_OPTIONAL = {**_MIXED, "use_sliding_window": True, "max_window_layers": 1}
_EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_LOCAL_EXPERTS = {"num_local_experts": 5, "num_experts_per_tok": 2}
_ROUTED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
# Keys are wider than values, and a part of them is rotated.
_LATENT = {
    **_ROUTED,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 4,
    "v_head_dim": 6,
    "num_key_value_heads": 4,
}
_OWN: dict[str, dict[str, Any]] = {
    "afmoe": {**_MIXED, **_EXPERTS, "num_shared_experts": 1, "num_dense_layers": 1},
    "axk1": {**_LATENT, "mlp_layer_types": ["dense", "sparse"]},
    "cohere2": _MIXED,
    "cwm": _MIXED,
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "dots1": {**_OPTIONAL, **_ROUTED, "n_shared_experts": 1},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24},
    "exaone4": _MIXED,
    "flex_olmo": _EXPERTS,
    "gemma2": _MIXED,
    "gemma3_text": _MIXED,
    "glm4_moe": _ROUTED,
    "glm4_moe_lite": _LATENT,
    "gpt2": {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 5},
    "gpt_neox": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    },
    "gpt_oss": {**_MIXED, **_LOCAL_EXPERTS, "rope_parameters": {"rope_type": "default"}},
    "gptj": {"rotary_dim": 4},
    # The published ones scale scores by 1 / head_dim; the default of 1 would magnify roundings.
    "granite_swa": {**_MIXED, "attention_multiplier": 1 / 8},
    "granitemoe": _LOCAL_EXPERTS,
    "granitemoe_swa": {**_MIXED, **_LOCAL_EXPERTS, "attention_multiplier": 1 / 8},
    "granitemoeshared": {**_LOCAL_EXPERTS, "shared_intermediate_size": 24},
    "hunyuan_v1_moe": {"num_experts": 5, "moe_topk": 2},
    "hy_v3": {**_EXPERTS, "mlp_layer_types": ["dense", "sparse"]},
    "jamba": {"num_experts": 4},
    "codegen": {"rotary_dim": 4},
    "longcat_flash": {
        **_LATENT,
        "num_hidden_layers": 4,  # two attentions a block
        "ffn_hidden_size": 48,
        "expert_ffn_hidden_size": 24,
        "moe_topk": 2,
        "zero_expert_num": 2,
    },
    "mimo_v2_flash": {**_MIXED, **_ROUTED, "v_head_dim": 6},
    "minimax_m2": _LOCAL_EXPERTS,
    "ministral": _MIXED,
    "ministral3": _WINDOW,
    "mistral": _WINDOW,
    "mixtral": {**_WINDOW, **_LOCAL_EXPERTS},
    "olmoe": _EXPERTS,
    "olmo3": _MIXED,
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16, "init_std": 0.3, "dropout": 0.0},
    "phi3": _WINDOW,
    "phimoe": {**_WINDOW, **_LOCAL_EXPERTS},
    "qwen2": _OPTIONAL,
    "qwen2_moe": {**_OPTIONAL, **_EXPERTS, "shared_expert_intermediate_size": 24},
    "qwen3": _OPTIONAL,
    "qwen3_moe": {**_OPTIONAL, **_EXPERTS},
    "smollm3": {**_OPTIONAL, "no_rope_layers": [1, 0]},
    "starcoder2": _WINDOW,
    # transformers sets the row of padding to zero as it loads.
    "youtu": {**_LATENT, "pad_token_id": None},
}


# Families whose configuration takes no head_dim of its own.
_WITHOUT_HEAD_DIM = ("falcon",)


def family(model_type: str, **settings: Any) -> Any:
    """The configuration of a tiny model of that family; skips where transformers is older."""
    if model_type not in transformers.CONFIG_MAPPING:
        raise SkipTest(f"transformers {transformers.__version__} has no {model_type}")
    chosen = {**_COMMON, **_OWN.get(model_type, {}), **settings}
    if model_type in _WITHOUT_HEAD_DIM:
        del chosen["head_dim"]
    return transformers.AutoConfig.for_model(model_type, **chosen)
