"""Decoders with linear attention or short convolutions beside attention."""

from __future__ import annotations

from .batches import text
from .build import Family, like
from .settings import (
    DECODER,
    DELTA,
    DENSE_THEN_SPARSE,
    EXPERTS,
    GROUPED,
    HEAD,
    LINEAR_THEN_FULL,
    LONG,
    LOW_RANK,
    SHARED_EXPERT,
    SIZES,
    TOKENS,
    WIDE,
)

hybrid = like("state-space", DECODER, text)

LINEAR_ATTENTION = (
    hybrid(
        "bailing_hybrid",
        "BailingHybridForCausalLM",
        **LOW_RANK | {"q_lora_rank": None},
        **LINEAR_THEN_FULL,
        **DENSE_THEN_SPARSE,
        linear_num_heads=4,
        linear_head_dim=12,
        num_experts=4,
        num_experts_per_token=2,
        num_shared_experts=1,
        num_expert_group=2,
        topk_group=1,
        attention_bias=True,
    ),
    hybrid(
        "kimi_linear",
        "KimiLinearForCausalLM",
        **LOW_RANK,
        **LINEAR_THEN_FULL,
        **DENSE_THEN_SPARSE,
        linear_num_heads=4,
        linear_head_dim=12,
        num_experts=4,
        num_experts_per_token=2,
        num_shared_experts=1,
        attention_bias=True,
    ),
    Family(
        "lfm2_moe",
        "state-space",
        "Lfm2MoeForCausalLM",
        TOKENS
        | SIZES
        | WIDE
        | GROUPED
        | LONG
        | EXPERTS
        | {
            "conv_bias": True,
            "layer_types": ["conv", "full_attention"],
            "num_dense_layers": 1,
            "num_experts": 4,
            "num_experts_per_tok": 2,
        },
        text,
    ),
    hybrid(
        "lfm3",
        "Lfm3ForCausalLM",
        **HEAD,
        num_hidden_layers=3,
        layer_types=["conv", "sliding_attention", "full_attention"],
        sliding_window=8,
        conv_bias=True,
        attention_bias=True,
    ),
    hybrid(
        "minimax",
        "MiniMaxForCausalLM",
        **HEAD,
        **LINEAR_THEN_FULL,
        block_size=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        intermediate_size=40,
        output_router_logits=False,
    ),
    hybrid(
        "olmo_hybrid",
        "OlmoHybridForCausalLM",
        **LINEAR_THEN_FULL,
        **DELTA | {"linear_num_key_heads": 4},
        attention_bias=True,
    ),
    hybrid(
        "qwen3_5_moe_text",
        "Qwen3_5MoeForCausalLM",
        **HEAD,
        **LINEAR_THEN_FULL,
        **DELTA,
        **SHARED_EXPERT,
        attention_bias=True,
    ),
    hybrid(
        "qwen3_5_text",
        "Qwen3_5ForCausalLM",
        **HEAD,
        **LINEAR_THEN_FULL,
        **DELTA,
        attention_bias=True,
    ),
    hybrid(
        "qwen3_next",
        "Qwen3NextForCausalLM",
        **HEAD,
        **LINEAR_THEN_FULL,
        **DELTA,
        **SHARED_EXPERT,
        mlp_only_layers=[0],
        attention_bias=True,
    ),
    hybrid(
        "qwen4_exp_text",
        "Qwen4ExpForCausalLM",
        **HEAD,
        **DELTA,
        **SHARED_EXPERT,
        layer_types=["linear_attention", "indexed_attention"],
        indexer_n_heads=2,
        indexer_kv_heads=1,
        indexer_head_dim=16,
        indexer_budget=8,
        indexer_compress_ratio=2,
        hc_count=2,
        hc_lowrank=8,
        attention_bias=True,
    ),
)
