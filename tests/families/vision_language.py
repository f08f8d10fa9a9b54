"""Decoders of text that images are put into."""

from __future__ import annotations

from .batches import IMAGE, VOCABULARY
from .build import Family, composite
from .pictures import (
    TILES,
    attended_tiles,
    described,
    frames,
    image_rows,
    image_text,
    pictures_in_tiles,
    prefixed,
    questioned,
    slots,
    tiles,
    typed,
)
from .settings import (
    ALTERNATING,
    BART,
    CLIP_VISION,
    DECODER,
    DENSE_THEN_SPARSE,
    DROP,
    HEAD,
    INDEX,
    LLAMA,
    LLAMA4,
    LONG,
    LOW_RANK,
    MOE,
    OPT,
    PIXTRAL_VISION,
    ROUTED,
    SIGLIP_VISION,
    SIZES,
    TOKENS,
    TOWER,
    WIDE,
)

COHERE = LLAMA | ALTERNATING | {"model_type": "cohere2"}


VISION_LANGUAGE = (
    Family(
        "llava",
        "vision-language",
        "LlavaForConditionalGeneration",
        {
            "text_config": LLAMA | {"model_type": "llama"},
            "vision_config": TOWER | {"model_type": "clip_vision_model"},
            "image_token_index": IMAGE,
            "image_seq_length": 4,
            "vision_feature_layer": -1,  # by default the last layer is not used
        },
        image_text(3, 30, 30),
    ),
    Family(
        "paligemma",
        "vision-language",
        "PaliGemmaForConditionalGeneration",
        {
            "text_config": DECODER | HEAD | {"attention_bias": True, "model_type": "gemma"},
            "vision_config": TOWER
            | {"vision_use_head": False, "model_type": "siglip_vision_model"},
            "image_token_index": IMAGE,
            "vocab_size": VOCABULARY,
            "projection_dim": 48,
            "hidden_size": 48,
        },
        prefixed,
    ),
    Family(
        "idefics3",
        "vision-language",
        "Idefics3ForConditionalGeneration",
        {
            "text_config": LLAMA | {"model_type": "llama"},
            "vision_config": TOWER | {"image_size": 60},
            "image_token_id": IMAGE,
            "pad_token_id": 0,
            "scale_factor": 2,
        },
        image_text(1, 3, 60, 60),
    ),
    Family(
        "blip-2",
        "vision-language",
        "Blip2ForConditionalGeneration",
        {
            "text_config": OPT | {"model_type": "opt"},
            "vision_config": TOWER | {"initializer_range": 0.02, "qkv_bias": True},
            "qformer_config": SIZES
            | WIDE
            | LONG
            | DROP
            | {"vocab_size": VOCABULARY, "pad_token_id": 0},
            "num_query_tokens": 4,
            "image_token_index": IMAGE,
        },
        image_text(3, 30, 30),
    ),
    composite(
        "aria",
        "AriaForConditionalGeneration",
        image_text(3, 30, 30),
        text_config=DECODER
        | HEAD
        | {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
        vision_config=TOWER | {"model_type": "idefics3_vision"},
        image_token_index=IMAGE,
        projector_patch_to_query_dict={4: 4},
        vision_feature_layer=-1,
    ),
    composite(
        "aya_vision",
        "AyaVisionForConditionalGeneration",
        image_text(3, 60, 60),
        text_config=COHERE,
        vision_config=SIGLIP_VISION | {"image_size": 60},
        image_token_index=IMAGE,
        downsample_factor=2,
        vision_feature_layer=-1,
    ),
    composite(
        "cohere2_vision",
        "Cohere2VisionForConditionalGeneration",
        image_text(3, 60, 60),
        text_config=COHERE,
        vision_config=SIGLIP_VISION | {"image_size": 60},
        image_token_id=IMAGE,
        downsample_factor=2,
        alignment_intermediate_size=64,
    ),
    composite(
        "deepseek_vl",
        "DeepseekVLForConditionalGeneration",
        image_text(3, 30, 30),
        text_config=LLAMA | {"model_type": "llama"},
        vision_config=SIGLIP_VISION,
        image_token_id=IMAGE,
    ),
    composite(
        "fuyu",
        "FuyuForCausalLM",
        image_rows,
        text_config=TOKENS | SIZES | WIDE | LONG | {"hidden_size": 64, "model_type": "persimmon"},
        image_size=8,
        patch_size=4,
        image_token_id=IMAGE,
    ),
    composite(
        "gemma3",
        "Gemma3ForConditionalGeneration",
        typed,
        text_config=DECODER | HEAD | ALTERNATING | {"attention_bias": True},
        vision_config=SIGLIP_VISION,
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
    ),
    composite(
        "gemma4",
        "Gemma4ForConditionalGeneration",
        slots,
        text_config=DECODER
        | HEAD
        | ALTERNATING
        | {
            "attention_bias": True,
            "per_layer_config": {},
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8,
            "use_bidirectional_attention": "vision",
        },
        vision_config=SIZES
        | WIDE
        | {
            "num_key_value_heads": 4,
            "head_dim": 12,
            "patch_size": 4,
            "position_embedding_size": 64,
            "pooling_kernel_size": 2,
        },
        audio_config=None,
        image_token_id=IMAGE,
    ),
    composite(
        "got_ocr2",
        "GotOcr2ForConditionalGeneration",
        image_text(3, 64, 64),
        text_config=DECODER | {"model_type": "qwen2"},
        vision_config=SIZES
        | {
            "image_size": 64,
            "patch_size": 8,
            "output_channels": 16,
            "window_size": 4,
            "global_attn_indexes": [1],
            "mlp_dim": 80,
            "attention_dropout": 0.0,
        },
        image_token_index=IMAGE,
        image_seq_length=4,
    ),
    composite(
        "idefics2",
        "Idefics2ForConditionalGeneration",
        image_text(1, 3, 30, 30),
        text_config=DECODER | HEAD | {"model_type": "mistral"},
        vision_config=TOWER,
        image_token_id=IMAGE,
        perceiver_config={
            "hidden_size": 48,
            "resampler_n_latents": 4,
            "resampler_depth": 1,
            "resampler_n_heads": 4,
            "resampler_head_dim": 12,
            "num_key_value_heads": 2,
        },
    ),
    composite(
        "instructblip",
        "InstructBlipForConditionalGeneration",
        questioned,
        text_config=OPT | {"model_type": "opt"},
        vision_config=TOWER | {"qkv_bias": True},
        qformer_config=SIZES | WIDE | LONG | DROP | {"vocab_size": VOCABULARY, "pad_token_id": 0},
        num_query_tokens=4,
        image_token_index=IMAGE,
    ),
    composite(
        "internvl",
        "InternVLForConditionalGeneration",
        image_text(3, 60, 60),
        text_config=DECODER | {"model_type": "qwen2"},
        vision_config=TOWER
        | {
            "image_size": [60, 60],
            "patch_size": [15, 15],
            "attention_bias": True,
            "layer_scale_init_value": 1.0,
            "use_mean_pooling": False,
        },
        image_token_id=IMAGE,
        image_seq_length=4,
        vision_feature_layer=-1,
    ),
    composite(
        "mistral3",
        "Mistral3ForConditionalGeneration",
        frames,
        text_config=DECODER | HEAD | {"model_type": "mistral"},
        vision_config=PIXTRAL_VISION,
        image_token_index=IMAGE,
        spatial_merge_size=2,
        vision_feature_layer=-1,
    ),
    *(
        composite(
            model_type,
            model,
            pictures_in_tiles,
            text_config=LLAMA | {"model_type": "llama"},
            vision_config=CLIP_VISION,
            image_token_index=IMAGE,
            vision_feature_layer=-1,
            **TILES,
        )
        for model_type, model in (
            ("llava_next", "LlavaNextForConditionalGeneration"),
            ("llava_next_video", "LlavaNextVideoForConditionalGeneration"),
        )
    ),
    composite(
        "florence2",
        "Florence2ForConditionalGeneration",
        described,
        text_config=BART | {"model_type": "bart"},
        vision_config={
            "depths": [1, 1],
            "patch_size": [7, 3],
            "patch_stride": [4, 2],
            "patch_padding": [3, 1],
            "patch_prenorm": [False, True],
            "embed_dim": [24, 48],
            "num_heads": [2, 4],
            "num_groups": [2, 4],
            "window_size": 3,
            "drop_path_rate": 0.0,
            "projection_dim": 48,
        },
        image_token_id=IMAGE,
    ),
    composite(
        "llava_onevision",
        "LlavaOnevisionForConditionalGeneration",
        pictures_in_tiles,
        text_config=LLAMA | {"model_type": "qwen2"},
        vision_config=SIGLIP_VISION,
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_aspect_ratio="anyres_max_2",  # larger pictures shrink
        **TILES,
    ),
    composite(
        "llama4",
        "Llama4ForConditionalGeneration",
        tiles,
        text_config=MOE | HEAD | LLAMA4,
        vision_config=SIZES
        | {
            "intermediate_size": 192,
            "image_size": 32,
            "patch_size": 8,
            "projector_input_dim": 48,
            "projector_output_dim": 48,
            "vision_output_dim": 48,
        },
        image_token_index=IMAGE,
    ),
    composite(
        "mllama",
        "MllamaForConditionalGeneration",
        attended_tiles,
        text_config=DECODER | {"cross_attention_layers": [1], "pad_token_id": 0},
        vision_config={
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "attention_heads": 4,
            "image_size": 32,
            "patch_size": 8,
            "vision_output_dim": 96,
            "intermediate_layers_indices": [1],
            "max_num_tiles": 2,
            "supported_aspect_ratios": [[1, 1], [1, 2]],
        },
        image_token_index=IMAGE,
    ),
    composite(
        "mistral_large4",
        "MistralLarge4ForConditionalGeneration",
        frames,
        text_config=MOE
        | LOW_RANK
        | ROUTED
        | DENSE_THEN_SPARSE
        | INDEX
        | {
            "model_type": "mistral_large4_text",
            "attention_bias": True,
            "num_hidden_layers": 3,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "max_position_embeddings": 2**20,
            "no_rope_layers": [1, 0, 0],
            "kv_source_layers": [0, 1, 1],
        },
        vision_config=PIXTRAL_VISION,
        image_token_index=IMAGE,
        spatial_merge_size=2,
        vision_feature_layer=-1,
    ),
    composite(
        "lighton_ocr",
        "LightOnOcrForConditionalGeneration",
        frames,
        text_config=DECODER | HEAD | {"model_type": "qwen3"},
        vision_config=PIXTRAL_VISION,
        image_token_id=IMAGE,
        spatial_merge_size=2,
    ),
    composite(
        "smolvlm",
        "SmolVLMForConditionalGeneration",
        image_text(1, 3, 60, 60),
        text_config=LLAMA | {"model_type": "llama"},
        vision_config=TOWER | {"image_size": 60},
        image_token_id=IMAGE,
        pad_token_id=0,
        scale_factor=2,
    ),
    composite(
        "vipllava",
        "VipLlavaForConditionalGeneration",
        image_text(3, 30, 30),
        text_config=LLAMA | {"model_type": "llama"},
        vision_config=CLIP_VISION,
        image_token_index=IMAGE,
        image_seq_length=4,
        vision_feature_layers=[-2, -1],
    ),
)
