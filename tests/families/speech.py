"""From sound to classes or text."""

from __future__ import annotations

from .batches import (
    IMAGE,
    LABELS,
    VOCABULARY,
    fixed_speech,
    frames,
    long_waves,
    spectra,
    speech,
    transcribed,
    waves,
)
from .build import Family, like
from .pictures import heard, listened
from .settings import (
    CONFORMER,
    CONVOLUTIONS,
    DROP,
    EARS,
    LLAMA,
    LONG,
    SIZES,
    SPEECH,
    STACKS,
    TOKENS,
    WIDE,
)

wav2vec2 = like("speech", SPEECH | CONVOLUTIONS, waves)

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
    wav2vec2(
        "data2vec-audio",
        "Data2VecAudioForSequenceClassification",
        num_conv_pos_embeddings=2,
        conv_pos_kernel_size=5,
    ),
    wav2vec2("sew", "SEWForSequenceClassification", squeeze_factor=2),
    wav2vec2(
        "sew-d",
        "SEWDForSequenceClassification",
        squeeze_factor=2,
        position_buckets=16,
        max_position_embeddings=64,
    ),
    wav2vec2("unispeech", "UniSpeechForSequenceClassification", feat_quantizer_dropout=0.0),
    wav2vec2("unispeech-sat", "UniSpeechSatForSequenceClassification", feat_quantizer_dropout=0.0),
    wav2vec2(
        "wav2vec2-conformer",
        "Wav2Vec2ConformerForSequenceClassification",
        conv_depthwise_kernel_size=5,
        conformer_conv_dropout=0.0,
        feat_quantizer_dropout=0.0,
    ),
    Family(
        "lasr_ctc",
        "speech",
        "LasrForCTC",
        {
            "vocab_size": VOCABULARY,
            "pad_token_id": 0,
            "encoder_config": CONFORMER,
            "ctc_loss_reduction": "mean",
        },
        transcribed,
    ),
    Family(
        "moonshine",
        "speech",
        "MoonshineForConditionalGeneration",
        TOKENS
        | WIDE
        | LONG
        | {
            "hidden_size": 48,
            "encoder_num_hidden_layers": 2,
            "decoder_num_hidden_layers": 2,
            "encoder_num_attention_heads": 4,
            "decoder_num_attention_heads": 4,
            "encoder_num_key_value_heads": 4,
            "decoder_num_key_value_heads": 4,
            "attention_bias": True,
            "attention_dropout": 0.0,
            "decoder_start_token_id": 1,
        },
        long_waves,
    ),
    Family(
        "voxtral",
        "speech",
        "VoxtralForConditionalGeneration",
        {
            "text_config": LLAMA | {"model_type": "llama"},
            "audio_config": EARS | {"model_type": "voxtral_encoder"},
            "audio_token_id": IMAGE,
        },
        listened,
    ),
    Family(
        "audioflamingo3",
        "speech",
        "AudioFlamingo3ForConditionalGeneration",
        {
            "text_config": LLAMA | {"model_type": "qwen2"},
            "audio_config": EARS | {"model_type": "audioflamingo3_encoder"},
            "audio_token_id": IMAGE,
        },
        heard("input_features_mask"),
    ),
    Family(
        "qwen2_audio",
        "speech",
        "Qwen2AudioForConditionalGeneration",
        {
            "text_config": LLAMA | {"model_type": "qwen2"},
            "audio_config": EARS
            | {
                "d_model": 64,
                "encoder_layers": 2,
                "encoder_attention_heads": 4,
                "encoder_ffn_dim": 128,
                "model_type": "qwen2_audio_encoder",
            },
            "audio_token_index": IMAGE,
        },
        heard("feature_attention_mask"),
    ),
    Family(
        "parakeet_ctc",
        "speech",
        "ParakeetForCTC",
        {
            "vocab_size": VOCABULARY,
            "pad_token_id": 0,
            "encoder_config": CONFORMER | {"subsampling_factor": 4},
            "ctc_loss_reduction": "mean",
        },
        transcribed,
    ),
    Family(
        "speecht5",
        "speech",
        "SpeechT5ForSpeechToText",
        TOKENS
        | STACKS
        | CONVOLUTIONS
        | {
            "hidden_size": 48,
            "encoder_max_relative_position": 16,
            "positional_dropout": 0.0,
            "hidden_dropout": 0.0,
            "feat_proj_dropout": 0.0,
            "apply_spec_augment": False,
            "mask_time_prob": 0.0,
        },
        long_waves,
    ),
)
