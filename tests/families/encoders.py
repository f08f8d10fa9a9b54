"""Encoders of text."""

from __future__ import annotations

from .batches import LABELS, VOCABULARY, on_a_page, tagged, text, unlabelled, unpadded
from .build import Family, like
from .settings import ALTERNATING, DEBERTA, DECODER, ENCODER, LLAMA, LONG, SIZES, TOKENS, WIDE, XLM

encoder = like("encoder", ENCODER, text)

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
    # Block-sparse attention needs longer sequences than these.
    encoder(
        "big_bird", "BigBirdForMaskedLM", attention_type="original_full", classifier_dropout=0.0
    ),
    Family(
        "bros",
        "encoder",
        "BrosForTokenClassification",
        ENCODER | {"hidden_size": 64, "classifier_dropout_prob": 0.0, "num_labels": LABELS},
        on_a_page(tagged),
    ),
    encoder("camembert", "CamembertForMaskedLM", classifier_dropout=0.0),
    Family(
        "canine",
        "encoder",
        "CanineForTokenClassification",
        ENCODER
        | {
            "num_hash_buckets": 64,
            "num_hash_functions": 4,
            "local_transformer_stride": 32,
            "num_labels": LABELS,
        },
        tagged,
    ),
    encoder("data2vec-text", "Data2VecTextForMaskedLM", classifier_dropout=0.0),
    Family("dpr", "encoder", "DPRQuestionEncoder", ENCODER | {"projection_dim": 32}, unlabelled),
    encoder("ernie", "ErnieForMaskedLM", use_task_id=True, classifier_dropout=0.0),
    encoder(
        "esm",
        "EsmForMaskedLM",
        position_embedding_type="rotary",
        token_dropout=True,
        mask_token_id=2,
    ),
    Family(
        "esmc",
        "encoder",
        "EsmcForMaskedLM",
        DECODER
        | {
            "num_key_value_heads": 4,
            "attention_bias": True,
            "mlp_bias": True,
            "mask_token_id": 2,
            "classifier_dropout": 0.0,
        },
        text,
    ),
    Family("eurobert", "encoder", "EuroBertForMaskedLM", LLAMA, text),
    Family("flaubert", "encoder", "FlaubertWithLMHeadModel", XLM, text),
    Family(
        "fnet",
        "encoder",
        "FNetForMaskedLM",
        TOKENS
        | WIDE
        | LONG
        | {"hidden_size": 48, "num_hidden_layers": 2, "hidden_dropout_prob": 0.0},
        unpadded,
    ),
    Family(
        "funnel",
        "encoder",
        "FunnelForMaskedLM",
        TOKENS
        | {
            "d_model": 48,
            "n_head": 4,
            "d_head": 12,
            "d_inner": 80,
            "block_sizes": [1, 1],
            "num_decoder_layers": 1,
            "initializer_std": 0.02,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
        },
        text,
    ),
    encoder("gte", "GteForMaskedLM", classifier_dropout=0.0),
    encoder("ibert", "IBertForMaskedLM"),
    encoder("jina_embeddings_v3", "JinaEmbeddingsV3ForMaskedLM", classifier_dropout=0.0),
    Family(
        "layoutlm",
        "encoder",
        "LayoutLMForMaskedLM",
        ENCODER | {"max_2d_position_embeddings": 64},
        on_a_page(text),
    ),
    Family(
        "layoutlmv3",
        "encoder",
        "LayoutLMv3ForTokenClassification",
        ENCODER
        | {
            "visual_embed": False,
            "coordinate_size": 8,
            "shape_size": 8,
            "max_2d_position_embeddings": 64,
            "has_relative_attention_bias": False,
            "has_spatial_attention_bias": False,
            "classifier_dropout": 0.0,
            "num_labels": LABELS,
        },
        on_a_page(tagged),
    ),
    Family(
        "lilt",
        "encoder",
        "LiltForTokenClassification",
        ENCODER
        | {
            "channel_shrink_ratio": 2,
            "max_2d_position_embeddings": 64,
            "classifier_dropout": 0.0,
            "num_labels": LABELS,
        },
        on_a_page(tagged),
    ),
    encoder(
        "luke",
        "LukeForMaskedLM",
        entity_vocab_size=16,
        entity_emb_size=16,
        use_entity_aware_attention=False,
    ),
    Family(
        "markuplm",
        "encoder",
        "MarkupLMForTokenClassification",
        ENCODER
        | {
            "max_depth": 4,
            "xpath_unit_hidden_size": 8,
            "max_xpath_tag_unit_embeddings": 16,
            "max_xpath_subs_unit_embeddings": 16,
            "tag_pad_id": 15,
            "subs_pad_id": 15,
            "classifier_dropout": 0.0,
            "num_labels": LABELS,
        },
        tagged,
    ),
    encoder("megatron-bert", "MegatronBertForMaskedLM"),
    encoder(
        "mobilebert",
        "MobileBertForMaskedLM",
        embedding_size=32,
        intra_bottleneck_size=32,
        true_hidden_size=32,
        num_feedforward_networks=2,
    ),
    encoder(
        "nystromformer",
        "NystromformerForMaskedLM",
        num_landmarks=64,
        segment_means_seq_len=64,
        conv_kernel_size=5,
    ),
    encoder(
        "rembert",
        "RemBertForMaskedLM",
        input_embedding_size=32,
        output_embedding_size=40,
        classifier_dropout_prob=0.0,
    ),
    encoder("roberta-prelayernorm", "RobertaPreLayerNormForMaskedLM", classifier_dropout=0.0),
    encoder(
        "roc_bert",
        "RoCBertForMaskedLM",
        pronunciation_embed_dim=16,
        pronunciation_vocab_size=VOCABULARY,
        shape_embed_dim=16,
        shape_vocab_size=VOCABULARY,
        classifier_dropout=0.0,
    ),
    encoder("roformer", "RoFormerForMaskedLM", embedding_size=32, rotary_value=True),
    encoder("tapas", "TapasForMaskedLM"),
    Family(
        "ultrabert",
        "encoder",
        "UltrabertForMaskedLM",
        LLAMA | ALTERNATING | {"prediction_head_size": 32},
        text,
    ),
    encoder("xlm-roberta-xl", "XLMRobertaXLForMaskedLM", classifier_dropout=0.0),
    encoder("xmod", "XmodForMaskedLM", default_language="en_XX", classifier_dropout=0.0),
    # Attention in expectation; the hashing that it stands for draws at random.
    encoder("yoso", "YosoForMaskedLM", use_expectation=True, num_hash=4, hash_code_len=4),
)
