"""Any family's default configuration, made tiny (for `tests.distributed.families`)."""

from __future__ import annotations

from typing import Any

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

# Names of settings, and what they become where they are greater.
_TINY: dict[int, str] = {
    2: """
    num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_blocks
    num_decoder_layers num_encoder_layers num_key_value_heads num_kv_heads num_query_groups
    mamba_n_groups n_groups linear_num_key_heads swa_num_key_value_heads num_experts_per_tok
    moe_topk moe_k index_n_heads index_topk_blocks num_local_experts_per_tok o_groups n_group
    topk_group num_layers_per_stack depth max_window_layers index_kv_heads mamba_ngroups
    encoder_hash_byte_group_nb_functions""",
    4: """
    num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads
    encoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads
    swa_num_attention_heads num_experts n_routed_experts num_local_experts moe_num_experts
    zero_expert_num mamba_n_heads linear_num_value_heads linear_num_heads num_codebooks
    time_step_rank mamba_dt_rank rotary_dim num_hash_layers mamba_num_heads
    sliding_window_pattern mamba_d_conv conv_kernel prompt_length prompt_types segment_types""",
    8: """
    head_dim d_head kv_channels attention_head_size qk_rope_head_dim v_head_dim qk_nope_head_dim
    mamba_d_head mamba_head_dim linear_head_dim linear_key_head_dim linear_value_head_dim
    dim_head swa_head_dim index_head_dim kv_lora_rank q_lora_rank o_lora_rank gated_norm_rank
    state_size ssm_state_size mamba_d_state chunk_size mamba_chunk_size adapter_rank
    laurel_rank hidden_size_per_layer_input router_hidden_size hc_lowrank d_rel rel_extent
    index_block_size sliding_window window_size local_attention attention_window_size
    sliding_window_size index_topk block_size keep_window_size attention_chunk_size
    num_kv_shared_layers block_multiple_of ffn_round_up_to_multiple_of query_pre_attn_scalar
    global_head_dim local_attention_window_len ple_embed_dim num_mel_bins
    original_max_position_embeddings classifier_proj_size prompt_mid_dim backbone_hidden_size_
    local_attn_chunk_length lsh_attn_chunk_length""",
    16: "qk_head_dim attention_head_dim mamba_headdim",
    32: """
    hidden_size d_model n_embd emb_dim embedding_size embedding_dim word_embed_proj_dim
    input_embedding_size output_embedding_size lru_width pronunciation_embed_dim
    shape_embed_dim attention_hidden_size""",
    48: """
    intermediate_size moe_intermediate_size shared_expert_intermediate_size ffn_dim decoder_ffn_dim
    encoder_ffn_dim ffn_hidden_size expert_ffn_hidden_size dim_ff dff d_inner feed_forward_size
    shared_intermediate_size dense_intermediate_size intermediate_size_mlp
    moe_shared_expert_intermediate_size shared_experts_intermediate_size n_inner""",
    128: """
    max_position_embeddings n_positions n_ctx max_seq_len context_length max_target_positions
    max_source_positions model_max_length position_bias_num_buckets position_bias_max_distance
    relative_max_distance""",
    640: """
    vocab_size decoder_vocab_size vocab_size_per_layer_input unpadded_vocab_size
    pronunciation_vocab_size shape_vocab_size encoder_hash_byte_group_vocab""",
}
_LIMITS = {name: size for size, names in _TINY.items() for name in names.split()}
# Where a size depends on others, or the default configuration builds no model.
_HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
# Rotary positions along three axes (time, height, width), of four pairs of channels.
_AXES = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
# Scores are not scaled: with the default's wide heads softmax would magnify roundings.
_GEMMA4 = {"per_layer_config": {1: {"head_dim": 4}}, "final_logit_softcapping": 4.0}
_OWN: dict[str, dict[str, Any]] = {
    "bailing_hybrid": _HYBRID,
    "bamba": {"mamba_n_heads": 8, "attn_layer_indices": [1]},
    "cohere_compass_text": {
        "layer_types": ["full_attention", "full_attention"],
        "rope_parameters": {
            "full_attention": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [2, 1, 1],
            }
        },
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4}, "rope_parameters": None},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "dots3_note_text": {"num_key_value_heads": 4},
    "gemma3n_text": {"num_kv_shared_layers": 0, "intermediate_size": 48},
    "gemma4_text": _GEMMA4,
    "gemma4_unified_text": _GEMMA4,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"mamba_n_heads": 8, "layer_types": ["mamba", "attention"]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "nemotron": {"num_key_value_heads": 2},
    "rwkv": {"rescale_every": 0},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "reformer": {"axial_pos_embds": False, "vocab_size": 640},
    "qwen4_exp_text": {
        **_HYBRID,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "qwen2_5_vl_text": _AXES,
    "qwen2_vl_text": _AXES,
    "qwen3_5_text": _HYBRID,
    "qwen3_5_moe_text": _HYBRID,
    "qwen3_next": _HYBRID,
    "olmo_hybrid": _HYBRID,
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 3, "layer_types": ["linear_attention", "hybrid", "hybrid"]},
    "zamba2": {"layer_types": ["mamba", "hybrid"], "layers_block_type": ["mamba", "hybrid"]},
}


def model_types() -> list[str]:
    """Every type of model that transformers' `AutoModelForCausalLM` builds."""
    return [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name in CONFIG_MAPPING]


def shrunk(model_type: str) -> Any:
    """The family's default configuration with small sizes, and no dropout."""
    kind = CONFIG_MAPPING[model_type]
    settings = {**_small(kind()), **_OWN.get(model_type, {})}
    return transformers.AutoConfig.for_model(model_type, **settings)


def _small(default: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, kind in default.sub_configs.items():
        part = getattr(default, name, None)
        if part is None and kind is not transformers.AutoConfig:  # Gemma 4's towers
            part = kind()
        if part is not None:
            own = _OWN.get(part.model_type, {})
            found[name] = {**_small(part), **own, "model_type": part.model_type}
    for name, value in vars(default).items():
        if name in _LIMITS and isinstance(value, int) and value > _LIMITS[name]:
            found[name] = _LIMITS[name]
        elif "drop" in name and isinstance(value, float) and value:
            found[name] = 0.0
        elif name == "is_decoder":
            found[name] = True
        elif name in ("initializer_range", "init_std"):
            found[name] = 0.1
        elif name.endswith("token_id") and isinstance(value, int) and value > 2:
            found[name] = 2
    if "kv_lora_rank" in vars(default):  # latent attention gives every head its own keys
        found["num_key_value_heads"] = found["num_attention_heads"]
    return found
