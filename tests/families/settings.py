"""Settings that config classes share."""

from __future__ import annotations

from .batches import EOS, LABELS, VOCABULARY
from .build import Settings

TOKENS: Settings = {
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": EOS,
}
SIZES: Settings = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
LONG: Settings = {"max_position_embeddings": 128}
WIDE: Settings = {"intermediate_size": 80}
GROUPED: Settings = {"num_key_value_heads": 2}
HEAD: Settings = {"head_dim": 16}
DROP: Settings = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

ROPE: Settings = {"rope_type": "default", "rope_theta": 10000.0}
ALTERNATING: Settings = {
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 8,
}

DECODER = TOKENS | SIZES | WIDE | GROUPED | LONG | {"attention_dropout": 0.0}
GPT = TOKENS | {
    "n_embd": 48,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
MOE = DECODER | {"num_experts_per_tok": 2, "output_router_logits": False}
LOW_RANK: Settings = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
"""Multi-head latent attention."""
ROUTED: Settings = {"n_routed_experts": 4, "n_shared_experts": 1}
EXPERTS: Settings = {"moe_intermediate_size": 40}
LATENT = LOW_RANK | ROUTED | EXPERTS | {"first_k_dense_replace": 1}
DENSE_THEN_SPARSE = EXPERTS | {"mlp_layer_types": ["dense", "sparse"]}
GROUPS: Settings = {"n_group": 2, "topk_group": 1}
INDEX: Settings = {"index_topk": 8, "index_head_dim": 16, "index_n_heads": 2}
"""Attention to 8 tokens, chosen by linears of which the choice has no gradient."""
LINEAR_THEN_FULL: Settings = {"layer_types": ["linear_attention", "full_attention"]}
DELTA: Settings = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
}
"""Linear attention by a gated delta rule."""
SELECTIVE: Settings = {
    "mamba_n_heads": 6,
    "mamba_n_groups": 2,
    "mamba_d_state": 8,
    "mamba_d_head": 16,
    "mamba_chunk_size": 8,
    "mamba_proj_bias": True,
}
"""Mamba 2 beside attention."""
SHARED_EXPERT = EXPERTS | {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "shared_expert_intermediate_size": 56,
    "output_router_logits": False,
}
RELATIVE: Settings = {
    "layer_types": ["hybrid_sliding", "hybrid"],
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 16,
    "sliding_window_size": 8,
    "d_rel": 8,
    "rel_extent": 128,
}
"""Inkling's attention with learned relative positions."""
XLM = (
    TOKENS
    | LONG
    | {
        "emb_dim": 48,
        "n_layers": 2,
        "n_heads": 4,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "summary_first_dropout": 0.0,
    }
)
ENCODER = TOKENS | SIZES | WIDE | LONG | DROP
DEBERTA = ENCODER | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
STACKS: Settings = {
    "d_model": 48,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 80,
    "decoder_ffn_dim": 80,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "decoder_start_token_id": 1,
}
BART = TOKENS | STACKS | LONG
T5 = TOKENS | {
    "d_model": 48,
    "d_kv": 16,
    "d_ff": 80,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}
PICTURE: Settings = {"image_size": 32, "patch_size": 8, "num_labels": LABELS}
VIT = SIZES | DROP | PICTURE
TOWER = SIZES | WIDE | {"image_size": 30, "patch_size": 15, "attention_dropout": 0.0}
"""A vision encoder of 2x2 patches."""
CONVOLUTIONS: Settings = {
    "conv_dim": [24, 32],
    "conv_kernel": [10, 4],
    "conv_stride": [5, 4],
    "conv_bias": True,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
SPEECH = (
    TOKENS
    | SIZES
    | WIDE
    | {
        "hidden_dropout": 0.0,
        "activation_dropout": 0.0,
        "attention_dropout": 0.0,
        "feat_proj_dropout": 0.0,
        "final_dropout": 0.0,
        "layerdrop": 0.0,
        "apply_spec_augment": False,
        "mask_time_prob": 0.0,
        "classifier_proj_size": 40,
        "num_labels": LABELS,
    }
)
CONFORMER: Settings = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "conv_kernel_size": 5,
    "subsampling_conv_channels": 8,
    "num_mel_bins": 20,
    "attention_bias": True,
    "convolution_bias": True,
    "dropout": 0.0,
    "layerdrop": 0.0,
    "activation_dropout": 0.0,
    "attention_dropout": 0.0,
}
MAMBA = TOKENS | {"hidden_size": 48, "num_hidden_layers": 2, "state_size": 8, "use_bias": True}
LLAMA = DECODER | HEAD | {"attention_bias": True, "mlp_bias": True}
OPT = (
    TOKENS
    | SIZES
    | LONG
    | {"ffn_dim": 80, "dropout": 0.0, "attention_dropout": 0.0, "layerdrop": 0.0}
)
BERT = ENCODER | {"model_type": "bert"}
CLIP_VISION = TOWER | {"model_type": "clip_vision_model"}
SIGLIP_VISION = TOWER | {"vision_use_head": False, "model_type": "siglip_vision_model"}
EARS = WIDE | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_mel_bins": 20,
    "max_source_positions": 16,
}
"""A sound encoder: 32 frames become 8 tokens."""
PIXTRAL_VISION = TOWER | HEAD | {"hidden_size": 64, "model_type": "pixtral"}
LLAMA4: Settings = {
    "num_local_experts": 4,
    "intermediate_size": 40,
    "intermediate_size_mlp": 80,
    "interleave_moe_layer_step": 2,
    "router_jitter_noise": 0.0,
}
