"""A real encoder and a real encoder-decoder: transformed, right from the start, and they learn."""

from __future__ import annotations

import copy
from typing import Any

import qlora_fx
import numpy as np
import pytest
import torch
from peft import LoraConfig
from qlora_fx.testing.check import Oracle, compare, randomize_adapter, relative_error
from real_models import minilm, whisper

pytestmark = pytest.mark.slow

LORA: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
PAIRS = [
    ("Which gift suits a seventh anniversary?", "wool and copper"),
    ("What did the lighthouse keeper collect?", "blue glass bottles"),
    ("Who painted the station ceiling?", "two students from Ghent"),
    ("When does the last ferry leave?", "at a quarter past nine"),
    ("Where is the spare key hidden?", "under the third flowerpot"),
    ("Why was the concert moved indoors?", "hail was forecast"),
    ("How many bells hang in the tower?", "eleven and a half"),
    ("What powers the old mill now?", "a tidal turbine"),
]


def pooled(model: Any, tokens: Any) -> torch.Tensor:
    """Sentence embeddings: mean over the tokens, unit length."""
    inputs = {k: tokens[k] for k in ("input_ids", "attention_mask")}
    states = model(**inputs).last_hidden_state
    mask = tokens["attention_mask"].unsqueeze(-1)
    mean = (states * mask).sum(1) / mask.sum(1)
    return torch.nn.functional.normalize(mean, dim=-1)


def test_minilm_agrees_with_its_nf4_baseline_and_learns_pairs() -> None:
    model, tokenizer = minilm()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    questions, answers = (
        tokenizer([p[i] for p in PAIRS], padding=True, return_tensors="pt") for i in range(2)
    )
    torch.manual_seed(0)
    qmodel = qlora_fx.transform(
        copy.deepcopy(model), LoraConfig(**LORA), compute_dtype=torch.float32
    )
    baseline = Oracle(model, qmodel.base, dtype=torch.float32, adapter=False)
    inputs = {k: questions[k] for k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        ours, dense = qmodel(**inputs).last_hidden_state, model(**inputs).last_hidden_state
        assert relative_error(ours, baseline(inputs).last_hidden_state) < 1e-5
        assert 1e-3 < relative_error(ours, dense) < 0.3, "4 bits cost something, but not much"
    optimizer = qmodel.paged_optimizer(lr=1e-3)
    losses = []
    for _ in range(12):
        scores = pooled(qmodel, questions) @ pooled(qmodel, answers).T
        loss = torch.nn.functional.cross_entropy(scores * 20, torch.arange(len(PAIRS)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0], losses


def clip(pattern: int) -> np.ndarray:
    """Three seconds of tones in one of four patterns, 16 kHz."""
    t = np.arange(48000) / 16000
    pitch = [220 + 0 * t, 220 + 200 * t, 820 - 200 * t, 440 + 220 * np.sign(np.sin(6 * t))][pattern]
    return (0.3 * np.sin(2 * np.pi * np.cumsum(pitch) / 16000)).astype(np.float32)


def test_whisper_agrees_with_its_nf4_baseline_and_learns_sounds() -> None:
    model, tokenizer, extractor = whisper()
    features = extractor(
        [clip(i) for i in range(4)], sampling_rate=16000, return_tensors="pt"
    ).input_features
    texts = ["a low steady tone", "a rising tone", "a falling tone", "a siren"]
    ids = [
        [50257, 50362, *tokenizer(t, add_special_tokens=False)["input_ids"], 50256] for t in texts
    ]
    length = max(map(len, ids))
    labels = torch.tensor([i + [-100] * (length - len(i)) for i in ids])
    batch = {"input_features": features, "labels": labels}
    torch.manual_seed(0)
    qmodel = qlora_fx.transform(
        copy.deepcopy(model), LoraConfig(**LORA), compute_dtype=torch.float32
    )
    baseline = Oracle(model, qmodel.base, dtype=torch.float32, adapter=False)
    with torch.no_grad():
        assert relative_error(qmodel(**batch).logits, baseline(batch).logits) < 1e-4
    optimizer = qmodel.paged_optimizer(lr=1e-3)
    losses = []
    for _ in range(8):
        loss = qmodel(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0], losses


def test_minilms_gradients_are_right() -> None:
    model, tokenizer = minilm()
    model.eval()
    tokens = tokenizer([p[0] for p in PAIRS], padding=True, return_tensors="pt")
    qmodel = qlora_fx.transform(model=copy.deepcopy(model), compute_dtype=torch.float32).eval()
    randomize_adapter(qmodel, scale=0.02)
    report = compare(model.eval(), qmodel, {k: tokens[k] for k in ("input_ids", "attention_mask")})
    assert report.passed, str(report)
