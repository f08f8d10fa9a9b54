"""Decoders of text and of pictures of any size, whose positions have three axes: Qwen's, and those made like them."""

from __future__ import annotations

from .batches import IMAGE, VIDEO
from .build import Family, Settings, composite
from .pictures import patches
from .settings import (
    DECODER,
    DELTA,
    EXPERTS,
    HEAD,
    LINEAR_THEN_FULL,
    ROPE,
    SHARED_EXPERT,
    WIDE,
)


def axes(*section: int, **changes: float) -> Settings:
    """Rotary positions, so many frequencies of which are an axis's each."""
    return {"rope_parameters": ROPE | {"mrope_section": list(section)} | changes}


THREE_AXES = DECODER | axes(2, 2, 2)
HYBRID = DECODER | HEAD | LINEAR_THEN_FULL | DELTA | axes(2, 2, 2, partial_rotary_factor=0.75)
QWEN_TOKENS: Settings = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": 2,
    "vision_end_token_id": 2,
}
MERGED = WIDE | {
    "depth": 2,
    "hidden_size": 48,
    "out_hidden_size": 48,
    "num_heads": 4,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
GLM_TOKENS: Settings = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "image_start_token_id": 2,
    "image_end_token_id": 2,
    "video_start_token_id": 2,
    "video_end_token_id": 2,
}
TABLE = MERGED | {"image_size": 16}
DEEP = MERGED | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}


PICTURES_OF_ANY_SIZE = (
    Family(
        "qwen2_vl",
        "vision-language",
        "Qwen2VLForConditionalGeneration",
        {
            "text_config": THREE_AXES,
            "vision_config": {
                "depth": 2,
                "embed_dim": 64,
                "hidden_size": 48,
                "num_heads": 4,
                "mlp_ratio": 2,
                "patch_size": 4,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
            },
        }
        | QWEN_TOKENS,
        patches,
    ),
    composite(
        "qwen2_5_vl",
        "Qwen2_5_VLForConditionalGeneration",
        patches,
        text_config=THREE_AXES,
        vision_config=MERGED | {"window_size": 16, "fullatt_block_indexes": [1]},
        **QWEN_TOKENS,
    ),
    composite(
        "qwen3_vl",
        "Qwen3VLForConditionalGeneration",
        patches,
        text_config=THREE_AXES | HEAD,
        vision_config=DEEP,
        **QWEN_TOKENS,
    ),
    composite(
        "qwen3_vl_moe",
        "Qwen3VLMoeForConditionalGeneration",
        patches,
        text_config=THREE_AXES | HEAD | EXPERTS | {"num_experts": 4, "num_experts_per_tok": 2},
        vision_config=DEEP,
        **QWEN_TOKENS,
    ),
    composite(
        "qwen3_5",
        "Qwen3_5ForConditionalGeneration",
        patches,
        text_config=HYBRID,
        vision_config=MERGED | {"num_position_embeddings": 16},
        **QWEN_TOKENS,
    ),
    composite(
        "qwen3_5_moe",
        "Qwen3_5MoeForConditionalGeneration",
        patches,
        text_config=HYBRID | SHARED_EXPERT,
        vision_config=MERGED | {"num_position_embeddings": 16},
        **QWEN_TOKENS,
    ),
    composite(
        "glm4v",
        "Glm4vForConditionalGeneration",
        patches,
        text_config=DECODER | axes(2, 2, 2),
        vision_config=TABLE,
        **GLM_TOKENS,
    ),
    composite(
        "glm46v",
        "Glm46VForConditionalGeneration",
        patches,
        text_config=DECODER | axes(2, 2, 2) | {"model_type": "glm4v_text"},
        vision_config=TABLE | {"model_type": "glm4v_vision"},
        **GLM_TOKENS,
    ),
    composite(
        "glm4v_moe",
        "Glm4vMoeForConditionalGeneration",
        patches,
        text_config=DECODER
        | HEAD
        | EXPERTS
        | axes(2, 3, 3, partial_rotary_factor=1.0)
        | {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2}
        | {"first_k_dense_replace": 1},
        vision_config=TABLE,
        **GLM_TOKENS,
    ),
    composite(
        "glm_ocr",
        "GlmOcrForConditionalGeneration",
        patches,
        text_config=DECODER | HEAD | axes(2, 3, 3),
        vision_config=TABLE,
        **GLM_TOKENS,
    ),
)
