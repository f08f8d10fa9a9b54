"""Encoders of images and of videos with one width."""

from __future__ import annotations

from .batches import LABELS
from .build import Family, like
from .pictures import flat_images, images, labelled_images, masked_images, pixels, videos
from .settings import DROP, GPT, SIZES, TOWER, VIT, WIDE

vit = like("vision", VIT, labelled_images)

VISION = (
    vit("vit", "ViTForImageClassification", **WIDE, qkv_bias=True),
    vit("deit", "DeiTForImageClassification", **WIDE, qkv_bias=True),
    vit(
        "beit",
        "BeitForImageClassification",
        **WIDE,
        use_absolute_position_embeddings=True,
        layer_scale_init_value=1.0,
        drop_path_rate=0.0,
    ),
    vit("dinov2", "Dinov2ForImageClassification", mlp_ratio=2, qkv_bias=True, drop_path_rate=0.0),
    Family(
        "siglip_vision_model",
        "vision",
        "SiglipVisionModel",
        TOWER | {"vision_use_head": False},
        images(3, 30, 30),
    ),
    Family("clip_vision_model", "vision", "CLIPVisionModel", TOWER, images(3, 30, 30)),
    vit(
        "data2vec-vision",
        "Data2VecVisionForImageClassification",
        **WIDE,
        use_absolute_position_embeddings=True,
        layer_scale_init_value=1.0,
        drop_path_rate=0.0,
    ),
    vit(
        "dinov2_with_registers",
        "Dinov2WithRegistersForImageClassification",
        mlp_ratio=2,
        num_register_tokens=2,
        drop_path_rate=0.0,
    ),
    vit("ijepa", "IJepaForImageClassification", **WIDE, qkv_bias=True),
    vit("vit_msn", "ViTMSNForImageClassification", **WIDE, qkv_bias=True),
    Family(
        "vit_mae",
        "vision",
        "ViTMAEForPreTraining",
        SIZES
        | DROP
        | WIDE
        | {
            "image_size": 32,
            "patch_size": 8,
            "decoder_hidden_size": 32,
            "decoder_num_hidden_layers": 1,
            "decoder_num_attention_heads": 4,
            "decoder_intermediate_size": 64,
        },
        masked_images,
    ),
    Family(
        "dinov3_vit",
        "vision",
        "DINOv3ViTModel",
        SIZES
        | WIDE
        | {
            "image_size": 32,
            "patch_size": 8,
            "num_register_tokens": 2,
            "key_bias": True,
            "attention_dropout": 0.0,
            "drop_path_rate": 0.0,
            "pos_embed_rescale": None,  # otherwise drawn at random
        },
        images(3, 32, 32),
    ),
    Family(
        "pixio",
        "vision",
        "PixioModel",
        SIZES
        | DROP
        | {
            "image_size": 32,
            "patch_size": 8,
            "mlp_ratio": 2,
            "n_cls_tokens": 2,
            "drop_path_rate": 0.0,
        },
        images(3, 32, 32),
    ),
    Family(
        "yolos",
        "vision",
        "YolosModel",
        SIZES | WIDE | DROP | {"image_size": [32, 32], "patch_size": 8, "num_detection_tokens": 4},
        images(3, 32, 32),
    ),
    Family(
        "aimv2_vision_model",
        "vision",
        "Aimv2VisionModel",
        TOWER | {"qkv_bias": True, "mlp_bias": True, "use_head": False},
        images(3, 30, 30),
    ),
    Family(
        "mlcd_vision_model",
        "vision",
        "MLCDVisionModel",
        TOWER | {"hidden_size": 64},
        images(3, 30, 30),
    ),
    Family(
        "siglip2_vision_model",
        "vision",
        "Siglip2VisionModel",
        SIZES
        | WIDE
        | {"patch_size": 8, "num_patches": 16, "attention_dropout": 0.0, "vision_use_head": False},
        flat_images,
    ),
    Family(
        "imagegpt",
        "vision",
        "ImageGPTForImageClassification",
        GPT | {"n_inner": 80, "num_labels": LABELS},
        pixels,
    ),
    Family(
        "timesformer",
        "vision",
        "TimesformerForVideoClassification",
        VIT | WIDE | {"num_frames": 4},
        videos,
    ),
    Family(
        "videomae",
        "vision",
        "VideoMAEForVideoClassification",
        VIT | WIDE | {"num_frames": 4},
        videos,
    ),
    Family(
        "vivit",
        "vision",
        "VivitForVideoClassification",
        SIZES
        | DROP
        | WIDE
        | {"image_size": 32, "num_frames": 4, "tubelet_size": [2, 8, 8], "num_labels": LABELS},
        videos,
    ),
)
