"""Decoders with mixtures of experts."""

from __future__ import annotations

from .batches import text
from .build import Family, like
from .settings import (
    DENSE_THEN_SPARSE,
    EXPERTS,
    GROUPED,
    GROUPS,
    HEAD,
    LLAMA4,
    LONG,
    MOE,
    ROPE,
    ROUTED,
    SIZES,
    TOKENS,
    WIDE,
)

mixture = like("mixture-of-experts", MOE, text)

MIXTURES = (
    mixture(
        "mixtral",
        "MixtralForCausalLM",
        **HEAD,
        intermediate_size=40,
        num_local_experts=4,
        router_jitter_noise=0.0,
    ),
    mixture(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        num_experts=4,
        moe_intermediate_size=40,
        shared_expert_intermediate_size=56,
        qkv_bias=True,
    ),
    mixture(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        **HEAD,
        num_experts=4,
        moe_intermediate_size=40,
        attention_bias=True,
    ),
    mixture("olmoe", "OlmoeForCausalLM", num_experts=4, intermediate_size=40, attention_bias=True),
    mixture(
        "gpt_oss",
        "GptOssForCausalLM",
        **HEAD,
        num_local_experts=4,
        intermediate_size=40,
        attention_bias=True,
    ),
    mixture(
        "granitemoe",
        "GraniteMoeForCausalLM",
        num_local_experts=4,
        intermediate_size=40,
        attention_bias=True,
    ),
    mixture(
        "llama4_text",
        "Llama4ForCausalLM",
        **HEAD,
        **LLAMA4,
        attention_bias=True,
    ),
    mixture(
        "phimoe",
        "PhimoeForCausalLM",
        num_local_experts=4,
        intermediate_size=40,
        attention_bias=True,
        lm_head_bias=True,
        router_jitter_noise=0.0,
        input_jitter_noise=0.0,
    ),
    Family(
        "dbrx",
        "mixture-of-experts",
        "DbrxForCausalLM",
        TOKENS
        | {
            "d_model": 48,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 128,
            "resid_pdrop": 0.0,
            "emb_pdrop": 0.0,
            "output_router_logits": False,
            # The attention reads rope_theta and needs a clip: neither has a usable default.
            "attn_config": {
                "kv_n_heads": 2,
                "attn_pdrop": 0.0,
                "clip_qkv": 8.0,
                "rope_theta": 10000.0,
            },
            "ffn_config": {"ffn_hidden_size": 40, "moe_num_experts": 4, "moe_top_k": 2},
        },
        text,
    ),
    mixture(
        "jetmoe", "JetMoeForCausalLM", kv_channels=16, num_local_experts=4, intermediate_size=40
    ),
    mixture(
        "glm4_moe",
        "Glm4MoeForCausalLM",
        n_routed_experts=4,
        n_shared_experts=1,
        moe_intermediate_size=40,
        first_k_dense_replace=1,
        attention_bias=True,
    ),
    Family(
        "ernie4_5_moe",
        "mixture-of-experts",
        "Ernie4_5_MoeForCausalLM",
        TOKENS
        | SIZES
        | WIDE
        | GROUPED
        | LONG
        | {
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_num_shared_experts": 1,
            "moe_intermediate_size": 40,
            "moe_layer_start_index": 1,
            "use_bias": True,
            "output_router_logits": False,
        },
        text,
    ),
    mixture(
        "aria_text",
        "AriaTextForCausalLM",
        **HEAD,
        moe_num_experts=4,
        moe_topk=2,
        moe_num_shared_experts=1,
        attention_bias=True,
        mlp_bias=True,
    ),
    mixture(
        "dots1",
        "Dots1ForCausalLM",
        **HEAD,
        **ROUTED,
        **EXPERTS,
        **GROUPS,
        first_k_dense_replace=1,
        attention_bias=True,
    ),
    mixture(
        "flex_olmo", "FlexOlmoForCausalLM", num_experts=4, intermediate_size=40, attention_bias=True
    ),
    mixture(
        "granitemoeshared",
        "GraniteMoeSharedForCausalLM",
        num_local_experts=4,
        intermediate_size=40,
        shared_intermediate_size=56,
        attention_bias=True,
    ),
    mixture(
        "hunyuan_v1_moe",
        "HunYuanMoEV1ForCausalLM",
        **HEAD,
        num_experts=4,
        moe_topk=2,
        intermediate_size=40,
        attention_bias=True,
    ),
    mixture(
        "hy_v3",
        "HYV3ForCausalLM",
        **HEAD,
        **DENSE_THEN_SPARSE,
        num_experts=4,
        num_shared_experts=1,
        attention_bias=True,
        mlp_bias=True,
    ),
    mixture(
        "minimax_m2",
        "MiniMaxM2ForCausalLM",
        **HEAD,
        num_local_experts=4,
        intermediate_size=40,
        rope_parameters=ROPE,
    ),
    mixture("solar_open", "SolarOpenForCausalLM", **HEAD, **ROUTED, **EXPERTS, attention_bias=True),
)
