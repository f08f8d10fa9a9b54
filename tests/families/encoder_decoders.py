"""From text to text."""

from __future__ import annotations

from .batches import EOS, IMAGE, VOCABULARY, forced, pairs
from .build import Family, like
from .pictures import answered
from .settings import (
    ALTERNATING,
    BART,
    BERT,
    DECODER,
    HEAD,
    LONG,
    SIGLIP_VISION,
    STACKS,
    T5,
    TOKENS,
)

bart = like("encoder-decoder", BART, pairs)
t5 = like("encoder-decoder", T5, pairs)
GEMMA = DECODER | HEAD | ALTERNATING | {"attention_bias": True, "dropout_rate": 0.0}
UNDROPPED = {"dropout_rate": 0.0, "attention_dropout": 0.0, "classifier_dropout_rate": 0.0}

ENCODER_DECODERS = (
    t5("t5", "T5ForConditionalGeneration", classifier_dropout=0.0),
    t5("mt5", "MT5ForConditionalGeneration", classifier_dropout=0.0),
    t5("umt5", "UMT5ForConditionalGeneration", classifier_dropout=0.0),
    bart("bart", "BartForConditionalGeneration", classifier_dropout=0.0),
    bart("mbart", "MBartForConditionalGeneration", classifier_dropout=0.0),
    bart("pegasus", "PegasusForConditionalGeneration"),
    bart("marian", "MarianMTModel"),
    bart("m2m_100", "M2M100ForConditionalGeneration"),
    t5("longt5", "LongT5ForConditionalGeneration", encoder_attention_type="local"),
    t5(
        "switch_transformers",
        "SwitchTransformersForConditionalGeneration",
        num_experts=4,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        router_jitter_noise=0.0,
    ),
    bart(
        "nllb-moe",
        "NllbMoeForConditionalGeneration",
        num_experts=4,
        encoder_sparse_step=2,
        decoder_sparse_step=2,
        moe_token_dropout=0.0,
        output_router_logits=False,
    ),
    bart("blenderbot", "BlenderbotForConditionalGeneration"),
    # Block-sparse attention needs longer sequences than these.
    bart(
        "bigbird_pegasus",
        "BigBirdPegasusForConditionalGeneration",
        attention_type="original_full",
        use_bias=True,
        classifier_dropout=0.0,
    ),
    bart("blenderbot-small", "BlenderbotSmallForConditionalGeneration"),
    Family(
        "encoder-decoder",
        "encoder-decoder",
        "EncoderDecoderModel",
        {
            "encoder": BERT,
            "decoder": BERT | {"is_decoder": True, "add_cross_attention": True},
            "pad_token_id": 0,
            "decoder_start_token_id": 1,
        },
        pairs,
    ),
    Family(
        "fsmt",
        "encoder-decoder",
        "FSMTForConditionalGeneration",
        STACKS
        | LONG
        | {
            "src_vocab_size": VOCABULARY,
            "tgt_vocab_size": VOCABULARY,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": EOS,
        },
        forced,
    ),
    bart(
        "mvp",
        "MvpForConditionalGeneration",
        use_prompt=True,
        prompt_length=4,
        prompt_mid_dim=16,
        classifier_dropout=0.0,
    ),
    bart("pegasus_x", "PegasusXForConditionalGeneration", block_size=8, num_global_tokens=4),
    bart("plbart", "PLBartForConditionalGeneration", classifier_dropout=0.0),
    Family(
        "prophetnet",
        "encoder-decoder",
        "ProphetNetForConditionalGeneration",
        TOKENS
        | LONG
        | {
            "hidden_size": 48,
            "num_encoder_layers": 2,
            "num_decoder_layers": 2,
            "num_encoder_attention_heads": 4,
            "num_decoder_attention_heads": 4,
            "encoder_ffn_dim": 80,
            "decoder_ffn_dim": 80,
            "num_buckets": 8,
            "relative_max_distance": 32,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "activation_dropout": 0.0,
            "decoder_start_token_id": 1,
        },
        pairs,
    ),
    bart("seamless_m4t", "SeamlessM4TForTextToText", hidden_size=48),
    bart("seamless_m4t_v2", "SeamlessM4Tv2ForTextToText", hidden_size=48),
    Family(
        "t5gemma",
        "encoder-decoder",
        "T5GemmaForConditionalGeneration",
        TOKENS | UNDROPPED | {"encoder": GEMMA, "decoder": GEMMA},
        pairs,
    ),
    Family(
        "t5gemma2",
        "encoder-decoder",
        "T5Gemma2ForConditionalGeneration",
        TOKENS
        | UNDROPPED
        | {
            "encoder": {
                "text_config": GEMMA,
                "vision_config": SIGLIP_VISION,
                "mm_tokens_per_image": 4,
                "image_token_index": IMAGE,
            },
            "decoder": GEMMA,
            "image_token_index": IMAGE,
        },
        answered,
    ),
)
