"""Classifiers that choose their loss by looking at their labels."""

from __future__ import annotations

import copy

import qlora_fx
import pytest
import torch
from qlora_fx.testing import compare, randomize_adapter
from transformers import DebertaV2Config, DebertaV2ForSequenceClassification


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_debertas_classifier_is_captured_with_labels(backend: str) -> None:
    """``label_index.size(0) > 0`` in its forward depends on the labels; cross-entropy is what it then computes."""
    torch.manual_seed(0)
    config = DebertaV2Config(
        vocab_size=101,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=80,
        max_position_embeddings=64,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pooler_dropout=0.0,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
    )
    model = DebertaV2ForSequenceClassification(config).train()
    batch = {
        "input_ids": torch.randint(5, 101, (3, 21)),
        "attention_mask": torch.ones(3, 21, dtype=torch.long),
        "labels": torch.tensor([0, 2, 1]),
    }
    qmodel = qlora_fx.transform(
        copy.deepcopy(model), compute_dtype=torch.float32, example_inputs=batch, backend=backend
    )
    randomize_adapter(qmodel)
    report = compare(model, qmodel, batch)
    assert report.passed, str(report)
    assert sum(line.norm > 0 for line in report.sites) > len(report.sites) / 2
