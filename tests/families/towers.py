"""An encoder or decoder of text beside an encoder of images."""

from __future__ import annotations

from .build import Family, composite
from .pictures import captioned, captions, flat_captions, from_images, regions
from .settings import BERT, CLIP_VISION, ENCODER, LONG, SIZES, TOKENS, TOWER, VIT, WIDE

TEXT = TOKENS | SIZES | WIDE | LONG | {"attention_dropout": 0.0}


TOWERS = (
    Family(
        "clip",
        "vision-language",
        "CLIPModel",
        {
            "text_config": TOKENS | SIZES | WIDE | LONG | {"attention_dropout": 0.0},
            "vision_config": TOWER,
            "projection_dim": 32,
        },
        captions,
    ),
    Family(
        "siglip",
        "vision-language",
        "SiglipModel",
        {
            "text_config": TOKENS | SIZES | WIDE | LONG | {"attention_dropout": 0.0},
            "vision_config": TOWER,
        },
        captions,
    ),
    composite(
        "aimv2",
        "Aimv2Model",
        captions,
        text_config=TEXT | {"qkv_bias": True, "mlp_bias": True},
        vision_config=TOWER | {"qkv_bias": True, "mlp_bias": True},
        projection_dim=32,
    ),
    composite(
        "altclip",
        "AltCLIPModel",
        captions,
        text_config=ENCODER | {"project_dim": 32},
        vision_config=TOWER,
        projection_dim=32,
    ),
    composite(
        "blip",
        "BlipForConditionalGeneration",
        captioned,
        text_config=ENCODER | {"encoder_hidden_size": 48, "projection_dim": 32, "sep_token_id": 2},
        vision_config=TOWER,
        projection_dim=32,
        image_text_hidden_size=32,
    ),
    composite(
        "chinese_clip",
        "ChineseCLIPModel",
        captions,
        text_config=ENCODER,
        vision_config=TOWER,
        projection_dim=32,
    ),
    composite("git", "GitForCausalLM", captioned, **ENCODER, vision_config=TOWER),
    composite(
        "metaclip_2",
        "MetaClip2Model",
        captions,
        text_config=TEXT,
        vision_config=TOWER,
        projection_dim=32,
    ),
    composite(
        "siglip2",
        "Siglip2Model",
        flat_captions,
        text_config=TEXT,
        vision_config=SIZES | WIDE | {"patch_size": 8, "num_patches": 16, "attention_dropout": 0.0},
    ),
    composite(
        "vision-encoder-decoder",
        "VisionEncoderDecoderModel",
        from_images,
        encoder=VIT | WIDE | {"model_type": "vit"},
        decoder=BERT | {"is_decoder": True, "add_cross_attention": True},
        pad_token_id=0,
        decoder_start_token_id=1,
    ),
    composite(
        "vision-text-dual-encoder",
        "VisionTextDualEncoderModel",
        captions,
        text_config=BERT,
        vision_config=CLIP_VISION,
        projection_dim=32,
    ),
    composite(
        "visual_bert", "VisualBertForPreTraining", regions, **ENCODER, visual_embedding_dim=24
    ),
)
