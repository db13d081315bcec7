"""Tiny configurations of every architecture: general shrinking rules, and per architecture what they cannot guess.

Owns sizes only. A rule applies to a configuration that has a field of that name, at any depth; everything else keeps
the library's own default, so that a test model differs from a real one in size and in nothing else.
"""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

SMALL: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "shared_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 24,
    "shared_experts_intermediate_size": 24,
    "dense_intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 6,
    "num_local_experts": 6,
    "n_routed_experts": 6,
    "moe_num_experts": 6,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_group": 1,
    "num_expert_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "index_topk": 16,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "mlp_layer_types": ["dense", "sparse"],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "sliding_window": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # the towers of multimodal models, which no test runs
    "depth": 1,
    "num_heads": 2,
    "patch_size": 4,
    "image_size": 16,
    "out_hidden_size": 32,
    "text_hidden_size": 32,
    "n_layers": 1,
    "n_mel_bins": 8,
    "mel_vocab_size": 8,
    "d_model": 32,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "output_dim": 32,
    "downsample_hidden_size": 8,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
    "output_channels": 16,
    "mlp_dim": 32,
    "window_size": 4,
    "global_attn_indexes": [0],
    "downsample_channels": [16, 32],
    "projection_hidden_dim": 32,
    "projection_intermediate_size": 32,
    "projector_hidden_size": 32,
}

_HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
_INKLING = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 16,
    "d_rel": 4,
    "rel_extent": 16,
    "unpadded_vocab_size": 120,
}

SPECIAL: dict[str, dict[str, Any]] = {
    "bailing_hybrid": _HYBRID,
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 128,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 24, "moe_num_experts": 6, "moe_top_k": 2},
    },
    "deepseek_v4": {"mlp_layer_types": ["hash_moe", "moe"], "head_dim": 16, "o_groups": 2, "o_lora_rank": 8},
    "diffusion_gemma": {"canvas_length": 8},
    "diffusion_gemma_text": {"top_k_experts": 2},
    "dots1": {"n_shared_experts": 1},
    "dots3_note_audio_encoder": {"adapter_input_size": 32, "adapter_out_dim": 32},
    "dots3_note_vision_encoder": {"adapter_in_dim": 32, "adapter_out_dim": 32},
    "ernie4_5_vl_moe_text": {
        "moe_intermediate_size": [24, 16],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
    },
    "flint": {"mlp_only_layers": [0]},
    "gemma4_text": {
        "enable_moe_block": True,
        "top_k_experts": 2,
        "vocab_size_per_layer_input": 128,
        "hidden_size_per_layer_input": 8,
    },
    "glm4v_moe_text": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 1.0,
            "mrope_section": [2, 1, 1],
        },
    },
    "glm5_next_text": {"qk_rope_head_dim": 0, **_HYBRID},
    "granitemoehybrid": {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, **_HYBRID},
    "inkling2_text": _INKLING,
    "inkling_text": _INKLING,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4, "use_mamba_kernels": False},
    "kimi_linear": _HYBRID,
    "lfm2_moe": {"num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
    "jetmoe": {"kv_channels": 16, "num_key_value_heads": 2},
    "llama4_text": {"intermediate_size": 24, "intermediate_size_mlp": 48, "attention_chunk_size": 8},
    "longcat_flash": {
        "num_layers": 2,
        "ffn_hidden_size": 48,
        "expert_ffn_hidden_size": 24,
        "zero_expert_num": 4,
        "head_dim": 8,
        "moe_topk": 4,
    },
    "muse_spark_audio": {"hidden_sizes": [8, 8], "depths": [1, 1], "patch_sizes": [4, 2]},
    "muse_spark_text": {"moe_hidden_size": 24},
    "nllb-moe": {
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 24,
        "decoder_ffn_dim": 24,
        "encoder_sparse_step": 1,
        "decoder_sparse_step": 1,
        "encoder_layerdrop": 0.0,
        "decoder_layerdrop": 0.0,
        "init_std": 0.2,
        "decoder_start_token_id": 2,
        "moe_token_dropout": 0.2,
    },
    "nemotron_h": {
        "ssm_state_size": 8,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "moe_latent_size": 16,
    },
    "qwen3_5_moe_text": _HYBRID,
    "qwen3_next": _HYBRID,
    "qwen3_omni_moe_thinker": {
        "vision_start_token_id": 121,
        "image_token_id": 122,
        "audio_token_id": 123,
        "video_token_id": 124,
    },
    "qwen4_exp_text": {
        "hc_lowrank": 8,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        **_HYBRID,
    },
    "switch_transformers": {
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 24,
        "num_heads": 4,
        "num_layers": 2,
        "num_sparse_encoder_layers": 1,
        "num_decoder_layers": 2,
        "num_sparse_decoder_layers": 1,
        "expert_capacity": 3,
        "decoder_start_token_id": 0,
    },
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(model_type: str, **overrides: Any) -> PreTrainedConfig:
    """A configuration of `model_type` with 2 or 3 layers, at least one of them with experts."""
    return CONFIG_MAPPING[model_type](**{**_overrides(model_type), **overrides})


def _overrides(model_type: str) -> dict[str, Any]:
    config_class = CONFIG_MAPPING[model_type]
    defaults = config_class().to_dict()
    overrides = {name: value for name, value in SMALL.items() if name in defaults}
    if "qk_rope_head_dim" in overrides:  # latent attention derives its head size
        overrides.pop("head_dim", None)
        if "num_key_value_heads" in overrides:
            overrides["num_key_value_heads"] = overrides["num_attention_heads"]
    for name, value in defaults.items():
        if isinstance(value, dict) and value.get("model_type"):
            overrides[name] = {**_overrides(value["model_type"]), "model_type": value["model_type"]}
    return overrides | SPECIAL.get(model_type, {})
