"""Decoders of text with names of their own for their settings."""

from __future__ import annotations

from .batches import VOCABULARY, attended, codes, text, unpadded
from .build import Family, like
from .settings import ALTERNATING, ENCODER, GPT, GROUPED, HEAD, LONG, OPT, SIZES, TOKENS, WIDE, XLM

gpt = like("causal", GPT, text)
decoder = like("causal", TOKENS | SIZES, text)

CAUSAL_OTHERS = (
    gpt("gpt2", "GPT2LMHeadModel", n_inner=80, summary_first_dropout=0.0),
    Family(
        "gpt_neo",
        "causal",
        "GPTNeoForCausalLM",
        TOKENS
        | WIDE
        | LONG
        | {
            "hidden_size": 48,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "resid_dropout": 0.0,
            "embed_dropout": 0.0,
            "attention_dropout": 0.0,
            "classifier_dropout": 0.0,
        },
        text,
    ),
    decoder(
        "gpt_neox",
        "GPTNeoXForCausalLM",
        **LONG,
        hidden_size=64,
        intermediate_size=96,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        classifier_dropout=0.0,
    ),
    gpt("gptj", "GPTJForCausalLM", n_inner=80, rotary_dim=8),
    Family("opt", "causal", "OPTForCausalLM", OPT, text),
    Family(
        "bloom",
        "causal",
        "BloomForCausalLM",
        TOKENS
        | {
            "hidden_size": 48,
            "n_layer": 2,
            "n_head": 4,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
        },
        text,
    ),
    decoder(
        "falcon",
        "FalconForCausalLM",
        **LONG,
        ffn_hidden_size=80,
        bias=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    ),
    Family(
        "xglm",
        "causal",
        "XGLMForCausalLM",
        TOKENS
        | LONG
        | {
            "d_model": 48,
            "ffn_dim": 80,
            "num_layers": 2,
            "attention_heads": 4,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "activation_dropout": 0.0,
            "layerdrop": 0.0,
            "decoder_start_token_id": 1,
        },
        text,
    ),
    Family(
        "biogpt",
        "causal",
        "BioGptForCausalLM",
        ENCODER | {"layerdrop": 0.0, "activation_dropout": 0.0},
        text,
    ),
    gpt("codegen", "CodeGenForCausalLM", n_ctx=128, n_inner=80, rotary_dim=8),
    Family(
        "mpt",
        "causal",
        "MptForCausalLM",
        TOKENS
        | {
            "d_model": 48,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 128,
            "resid_pdrop": 0.0,
            "emb_pdrop": 0.0,
        },
        text,
    ),
    Family(
        "ernie4_5",
        "causal",
        "Ernie4_5ForCausalLM",
        TOKENS | SIZES | WIDE | GROUPED | LONG | HEAD | {"use_bias": True},
        text,
    ),
    gpt("openai-gpt", "OpenAIGPTLMHeadModel", summary_first_dropout=0.0),
    Family(
        "lfm2",
        "causal",
        "Lfm2ForCausalLM",
        TOKENS
        | SIZES
        | WIDE
        | GROUPED
        | LONG
        | {
            "conv_bias": True,
            "block_auto_adjust_ff_dim": False,
            "layer_types": ["conv", "full_attention"],
        },
        text,
    ),
    gpt("gpt_bigcode", "GPTBigCodeForCausalLM", n_inner=80),
    decoder(
        "gpt_neox_japanese",
        "GPTNeoXJapaneseForCausalLM",
        **LONG,
        intermediate_multiple_size=2,
        attention_dropout=0.0,
        hidden_dropout=0.0,
    ),
    decoder(
        "persimmon",
        "PersimmonForCausalLM",
        **LONG,
        hidden_size=64,
        intermediate_size=96,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    ),
    Family(
        "ctrl",
        "causal",
        "CTRLLMHeadModel",
        {
            "vocab_size": VOCABULARY,
            "n_positions": 128,
            "n_embd": 48,
            "dff": 80,
            "n_layer": 2,
            "n_head": 4,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
        },
        text,
    ),
    Family(
        "cpmant",
        "causal",
        "CpmAntForCausalLM",
        SIZES
        | {
            "vocab_size": VOCABULARY,
            "dim_head": 16,
            "dim_ff": 80,
            "prompt_types": 4,
            "prompt_length": 4,
            "segment_types": 4,
            "position_bias_num_buckets": 16,
            "position_bias_max_distance": 64,
            "dropout_p": 0.0,
        },
        unpadded,
    ),
    Family(
        "bert-generation", "causal", "BertGenerationDecoder", ENCODER | {"is_decoder": True}, text
    ),
    Family(
        "modernbert-decoder",
        "causal",
        "ModernBertDecoderForCausalLM",
        TOKENS
        | SIZES
        | WIDE
        | LONG
        | ALTERNATING
        | {
            "cls_token_id": 1,
            "sep_token_id": 1,
            "norm_bias": True,
            "attention_bias": True,
            "mlp_bias": True,
            "classifier_bias": True,
            "attention_dropout": 0.0,
            "embedding_dropout": 0.0,
            "mlp_dropout": 0.0,
            "classifier_dropout": 0.0,
        },
        text,
    ),
    # These three attend to something that is not text, which their batch has.
    Family(
        "mllama_text_model",
        "causal",
        "MllamaForCausalLM",
        TOKENS | SIZES | WIDE | GROUPED | LONG | {"cross_attention_layers": [1]},
        attended("cross_attention_states"),
    ),
    Family(
        "musicgen_decoder",
        "causal",
        "MusicgenForCausalLM",
        TOKENS
        | SIZES
        | LONG
        | {
            "ffn_dim": 80,
            "num_codebooks": 2,
            "layerdrop": 0.0,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "activation_dropout": 0.0,
        },
        codes,
    ),
    Family(
        "trocr",
        "causal",
        "TrOCRForCausalLM",
        TOKENS
        | LONG
        | {
            "d_model": 48,
            "decoder_layers": 2,
            "decoder_attention_heads": 4,
            "decoder_ffn_dim": 80,
            "cross_attention_hidden_size": 48,
            "decoder_start_token_id": 1,
            "decoder_layerdrop": 0.0,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "activation_dropout": 0.0,
        },
        attended("encoder_hidden_states"),
    ),
    Family("xlm", "causal", "XLMWithLMHeadModel", XLM | {"causal": True}, text),
    Family(
        "xlnet",
        "causal",
        "XLNetLMHeadModel",
        TOKENS
        | {
            "d_model": 48,
            "n_layer": 2,
            "n_head": 4,
            "d_inner": 80,
            "dropout": 0.0,
            "summary_last_dropout": 0.0,
        },
        text,
    ),
)
