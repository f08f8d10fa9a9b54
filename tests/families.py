"""Tiny models of many Hugging Face model types, built from their configs, and a batch for each.

What is random in train mode is off: dropout, dropped layers and paths, router noise, masked spectra.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

VOCABULARY, LABELS = 101, 5
EOS, IMAGE = 1, 4
"""Ids of special tokens; random text uses 5 and above."""

Tensors = dict[str, torch.Tensor]
Settings = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """A tiny model of one type.

    Attributes:
        model_type: transformers' name of the type, unique in ``FAMILIES``.
        kind: what the model does, for example ``"causal"`` or ``"vision"``.
        model: class name in ``transformers``.
        config: settings of its config class.
        batch: from ``(rows, tokens)``, tokens 12 to 60, to arguments of ``forward``; the same each time.
    """

    model_type: str
    kind: str
    model: str
    config: Settings
    batch: Callable[[int, int], Tensors]


def build(family: Family) -> PreTrainedModel:
    """The family's model with seeded weights; transformers itself picks sdpa where it is supported."""
    torch.manual_seed(0)
    settings = copy.deepcopy(family.config)  # configs write into nested dictionaries
    config = transformers.AutoConfig.for_model(family.model_type, **settings)
    model: PreTrainedModel = getattr(transformers, family.model)(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter, std=0.1)  # zero biases would hide a lost one
    return model


# -- batches --------------------------------------------------------------------------------------


def ids(rows: int, tokens: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, VOCABULARY, (rows, tokens), generator=generator)


def floats(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def classes(rows: int) -> torch.Tensor:
    return torch.randint(0, LABELS, (rows,), generator=torch.Generator().manual_seed(0))


def targets(rows: int, tokens: int) -> torch.Tensor:
    """Labels of a decoder, of another length than its source; the last of row 1 does not count."""
    labels = ids(rows, tokens // 2 + 3, seed=1)
    labels[1:2, -1:] = -100
    return labels


def text(rows: int, tokens: int) -> Tensors:
    """Ids with labels; the last 3 positions of row 1 are padding."""
    input_ids = ids(rows, tokens)
    mask = torch.ones_like(input_ids)
    mask[1:2, -3:] = 0
    labels = input_ids.masked_fill(mask == 0, -100)
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}


def unpadded(rows: int, tokens: int) -> Tensors:
    return {"input_ids": ids(rows, tokens), "labels": ids(rows, tokens)}


def pairs(rows: int, tokens: int) -> Tensors:
    return text(rows, tokens) | {"labels": targets(rows, tokens)}


def images(*shape: int) -> Callable[[int, int], Tensors]:
    """Images of a fixed shape, without labels."""
    return lambda rows, tokens: {"pixel_values": floats(rows, *shape)}


def labelled_images(rows: int, tokens: int) -> Tensors:
    return {"pixel_values": floats(rows, 3, 32, 32), "labels": classes(rows)}


def captions(rows: int, tokens: int) -> Tensors:
    """An image and a text that ends with EOS, in every row."""
    inputs = text(rows, tokens)
    del inputs["labels"]
    last = inputs["attention_mask"].sum(dim=1, keepdim=True) - 1
    inputs["input_ids"].scatter_(1, last, EOS)
    return inputs | {"pixel_values": floats(rows, 3, 30, 30)}


def placeholders(rows: int, tokens: int) -> Tensors:
    """Text with 4 image tokens per row, on which there is no loss."""
    inputs = text(rows, tokens)
    for name, value in (("input_ids", IMAGE), ("labels", -100)):
        inputs[name][:, 1:5] = value
    return inputs


def image_text(*shape: int) -> Callable[[int, int], Tensors]:
    return lambda rows, tokens: placeholders(rows, tokens) | {"pixel_values": floats(rows, *shape)}


def prefixed(rows: int, tokens: int) -> Tensors:
    """Image and prompt see each other in full; only what follows them is predicted."""
    inputs = image_text(3, 30, 30)(rows, tokens)
    types = torch.zeros_like(inputs["input_ids"])
    types[:, tokens // 2 :] = 1
    labels = inputs["labels"].masked_fill(types == 0, -100)
    return inputs | {"token_type_ids": types, "labels": labels}


def patches(rows: int, tokens: int) -> Tensors:
    """One image of 4x4 patches per row, flattened as Qwen2-VL's processor does."""
    inputs = placeholders(rows, tokens)
    return inputs | {
        "pixel_values": floats(rows * 16, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 4, 4]]).repeat(rows, 1),
        "mm_token_type_ids": (inputs["input_ids"] == IMAGE).long(),
        # Left out, the model computes them from image_grid_thw in Python.
        "position_ids": torch.arange(inputs["input_ids"].shape[1]).repeat(3, rows, 1),
    }


def waves(rows: int, tokens: int) -> Tensors:
    """Sound of ``tokens`` frames."""
    return {"input_values": floats(rows, 20 * tokens + 20), "labels": classes(rows)}


def frames(rows: int, tokens: int) -> Tensors:
    return {"input_features": floats(rows, tokens, 24), "labels": classes(rows)}


def spectra(rows: int, tokens: int) -> Tensors:
    return {"input_values": floats(rows, 32, 16), "labels": classes(rows)}


def speech(rows: int, tokens: int) -> Tensors:
    return {"input_features": floats(rows, 4 * tokens, 20), "labels": targets(rows, tokens)}


def fixed_speech(rows: int, tokens: int) -> Tensors:
    """The one length that Whisper takes."""
    return {"input_features": floats(rows, 20, 32), "labels": targets(rows, tokens)}


# -- settings -------------------------------------------------------------------------------------

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
LATENT: Settings = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "moe_intermediate_size": 40,
    "first_k_dense_replace": 1,
}
"""Multi-head latent attention; layer 0 is dense."""
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
MAMBA = TOKENS | {"hidden_size": 48, "num_hidden_layers": 2, "state_size": 8, "use_bias": True}
LLAMA = DECODER | HEAD | {"attention_bias": True, "mlp_bias": True}
OPT = (
    TOKENS
    | SIZES
    | LONG
    | {"ffn_dim": 80, "dropout": 0.0, "attention_dropout": 0.0, "layerdrop": 0.0}
)


def like(kind: str, base: Settings, batch: Callable[[int, int], Tensors]) -> Callable[..., Family]:
    """Makes families of one kind from ``(model_type, model, **changes to the settings)``."""
    return lambda model_type, model, **changes: Family(
        model_type, kind, model, base | changes, batch
    )


causal = like("causal", DECODER, text)
gpt = like("causal", GPT, text)
decoder = like("causal", TOKENS | SIZES, text)
mixture = like("mixture-of-experts", MOE, text)
encoder = like("encoder", ENCODER, text)
bart = like("encoder-decoder", BART, pairs)
t5 = like("encoder-decoder", T5, pairs)
vit = like("vision", VIT, labelled_images)
pyramid = like("vision", {"image_size": 32, "num_labels": LABELS}, labelled_images)
wav2vec2 = like("speech", SPEECH | CONVOLUTIONS, waves)
mamba = like("state-space", MAMBA, text)
hybrid = like("state-space", DECODER, text)

CAUSAL = (
    causal("llama", "LlamaForCausalLM", **HEAD, attention_bias=True, mlp_bias=True),
    causal("qwen2", "Qwen2ForCausalLM"),
    causal("qwen3", "Qwen3ForCausalLM", **HEAD, attention_bias=True),
    causal("mistral", "MistralForCausalLM", **HEAD),
    causal("gemma", "GemmaForCausalLM", **HEAD, attention_bias=True),
    causal("gemma2", "Gemma2ForCausalLM", **HEAD, attention_bias=True),
    causal(
        "gemma3_text",
        "Gemma3ForCausalLM",
        **HEAD,
        attention_bias=True,
        layer_types=["sliding_attention", "full_attention"],
    ),
    causal("phi", "PhiForCausalLM", resid_pdrop=0.0, embd_pdrop=0.0),
    causal(
        "phi3",
        "Phi3ForCausalLM",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        original_max_position_embeddings=128,
    ),
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
    causal("olmo2", "Olmo2ForCausalLM", attention_bias=True),
    causal("smollm3", "SmolLM3ForCausalLM", attention_bias=True, mlp_bias=True),
    causal(
        "stablelm",
        "StableLmForCausalLM",
        hidden_size=64,
        intermediate_size=96,
        use_qkv_bias=True,
        hidden_dropout=0.0,
    ),
    causal(
        "starcoder2",
        "Starcoder2ForCausalLM",
        use_bias=True,
        residual_dropout=0.0,
        embedding_dropout=0.0,
    ),
    causal("cohere", "CohereForCausalLM", attention_bias=True),
    causal("granite", "GraniteForCausalLM", attention_bias=True, mlp_bias=True),
    causal("glm", "GlmForCausalLM", **HEAD, attention_bias=True),
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
)

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
    mixture("deepseek_v2", "DeepseekV2ForCausalLM", **LATENT, attention_bias=True, mlp_bias=True),
    mixture(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        **LATENT,
        n_group=2,
        topk_group=1,
        attention_bias=True,
    ),
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
        num_local_experts=4,
        intermediate_size=40,
        intermediate_size_mlp=80,
        interleave_moe_layer_step=2,
        attention_bias=True,
        router_jitter_noise=0.0,
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
)

ENCODERS = (
    encoder("bert", "BertForMaskedLM", classifier_dropout=0.0),
    encoder("roberta", "RobertaForMaskedLM", classifier_dropout=0.0),
    Family(
        "distilbert",
        "encoder",
        "DistilBertForMaskedLM",
        TOKENS
        | LONG
        | {
            "dim": 48,
            "hidden_dim": 80,
            "n_layers": 2,
            "n_heads": 4,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "qa_dropout": 0.0,
            "seq_classif_dropout": 0.0,
        },
        text,
    ),
    encoder(
        "electra",
        "ElectraForMaskedLM",
        embedding_size=32,
        classifier_dropout=0.0,
        summary_last_dropout=0.0,
    ),
    encoder("albert", "AlbertForMaskedLM", embedding_size=32, classifier_dropout_prob=0.0),
    encoder("mpnet", "MPNetForMaskedLM"),
    Family(
        "modernbert",
        "encoder",
        "ModernBertForMaskedLM",
        TOKENS
        | SIZES
        | WIDE
        | LONG
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
    encoder("xlm-roberta", "XLMRobertaForMaskedLM", classifier_dropout=0.0),
    Family("deberta-v2", "encoder", "DebertaV2ForMaskedLM", DEBERTA, text),
    Family("deberta", "encoder", "DebertaForMaskedLM", DEBERTA, text),
    encoder("squeezebert", "SqueezeBertForMaskedLM", embedding_size=48),
    encoder("convbert", "ConvBertForMaskedLM", embedding_size=32, classifier_dropout=0.0),
    encoder("nomic_bert", "NomicBertForMaskedLM", classifier_dropout=0.0),
)

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
)

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
    pyramid(
        "swin",
        "SwinForImageClassification",
        **DROP,
        patch_size=4,
        embed_dim=32,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
        mlp_ratio=2.0,
        qkv_bias=True,
        drop_path_rate=0.0,
    ),
    pyramid(
        "convnext",
        "ConvNextForImageClassification",
        num_stages=2,
        depths=[2, 2],
        hidden_sizes=[24, 48],
        layer_scale_init_value=1.0,  # the default, 1e-6, would hide every linear
        drop_path_rate=0.0,
    ),
    Family(
        "segformer",
        "vision",
        "SegformerForImageClassification",
        DROP
        | {
            "num_encoder_blocks": 2,
            "depths": [2, 2],
            "sr_ratios": [4, 2],
            "hidden_sizes": [32, 48],
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "num_attention_heads": [2, 4],
            "mlp_ratios": [2, 2],
            "classifier_dropout_prob": 0.0,
            "drop_path_rate": 0.0,
            "num_labels": LABELS,
        },
        labelled_images,
    ),
    Family(
        "siglip_vision_model",
        "vision",
        "SiglipVisionModel",
        TOWER | {"vision_use_head": False},
        images(3, 30, 30),
    ),
    Family("clip_vision_model", "vision", "CLIPVisionModel", TOWER, images(3, 30, 30)),
)

SPEECHES = (
    Family(
        "whisper",
        "speech",
        "WhisperForConditionalGeneration",
        TOKENS
        | STACKS
        | {
            "num_mel_bins": 20,
            "max_source_positions": 16,
            "max_target_positions": 64,
            "apply_spec_augment": False,
            "mask_time_prob": 0.0,
            "begin_suppress_tokens": None,
        },
        fixed_speech,
    ),
    wav2vec2("wav2vec2", "Wav2Vec2ForSequenceClassification", feat_quantizer_dropout=0.0),
    wav2vec2("hubert", "HubertForSequenceClassification"),
    wav2vec2("wavlm", "WavLMForSequenceClassification"),
    Family(
        "speech_to_text",
        "speech",
        "Speech2TextForConditionalGeneration",
        TOKENS
        | STACKS
        | {
            "input_feat_per_channel": 20,
            "conv_channels": 32,
            "max_source_positions": 256,
            "max_target_positions": 64,
        },
        speech,
    ),
    Family(
        "wav2vec2-bert",
        "speech",
        "Wav2Vec2BertForSequenceClassification",
        SPEECH
        | {
            "feature_projection_input_dim": 24,
            "conv_depthwise_kernel_size": 5,
            "conformer_conv_dropout": 0.0,
        },
        frames,
    ),
    Family(
        "audio-spectrogram-transformer",
        "speech",
        "ASTForAudioClassification",
        SIZES
        | WIDE
        | DROP
        | {
            "patch_size": 8,
            "frequency_stride": 8,
            "time_stride": 8,
            "max_length": 32,
            "num_mel_bins": 16,
            "num_labels": LABELS,
        },
        spectra,
    ),
)

VISION_LANGUAGE = (
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
)

STATE_SPACE = (
    mamba("mamba", "MambaForCausalLM"),
    mamba("mamba2", "Mamba2ForCausalLM", num_heads=6, head_dim=16, n_groups=2, chunk_size=8),
    mamba("falcon_mamba", "FalconMambaForCausalLM"),
    hybrid(
        "jamba",
        "JambaForCausalLM",
        num_experts=4,
        num_experts_per_tok=2,
        expert_layer_period=2,
        expert_layer_offset=1,
        attn_layer_period=2,
        attn_layer_offset=1,
        mamba_d_state=8,
        mamba_proj_bias=True,
        output_router_logits=False,
    ),
    hybrid(
        "bamba",
        "BambaForCausalLM",
        attn_layer_indices=[1],
        mamba_n_heads=6,
        mamba_n_groups=2,
        mamba_d_state=8,
        mamba_chunk_size=8,
        mamba_proj_bias=True,
        attention_bias=True,
        mlp_bias=True,
    ),
    Family(
        "recurrent_gemma",
        "state-space",
        "RecurrentGemmaForCausalLM",
        TOKENS
        | SIZES
        | GROUPED
        | {
            "intermediate_size": 160,
            "lru_width": 64,
            "block_types": ["recurrent", "attention"],
            "attention_bias": True,
            "attention_dropout": 0.0,
            "use_cache": False,  # otherwise one call's state enters the next
        },
        text,
    ),
    Family(
        "rwkv",
        "state-space",
        "RwkvForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "bos_token_id": 1,
            "eos_token_id": EOS,
            "context_length": 128,
            "hidden_size": 48,
            "attention_hidden_size": 64,
            "intermediate_size": 80,
            "num_hidden_layers": 2,
        },
        unpadded,
    ),
)

FAMILIES: tuple[Family, ...] = (
    *CAUSAL,
    *MIXTURES,
    *ENCODERS,
    *ENCODER_DECODERS,
    *VISION,
    *SPEECHES,
    *VISION_LANGUAGE,
    *STATE_SPACE,
)
