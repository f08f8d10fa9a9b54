"""Decoders of text and of images whose positions have three axes."""

from __future__ import annotations

from .batches import IMAGE
from .build import Family, Settings, composite
from .pictures import patches
from .settings import DECODER, EXPERTS, HEAD, WIDE

THREE_AXES = DECODER | {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 2]}}
QWEN_TOKENS: Settings = {
    "image_token_id": IMAGE,
    "video_token_id": 3,
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
DEEP = MERGED | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}


VISION_LANGUAGE_QWEN = (
    Family(
        "qwen2_vl",
        "vision-language",
        "Qwen2VLForConditionalGeneration",
        {
            "text_config": DECODER
            | {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 2]}},
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
            "image_token_id": IMAGE,
            "video_token_id": 3,
            "vision_start_token_id": 2,
            "vision_end_token_id": 2,
        },
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
)
