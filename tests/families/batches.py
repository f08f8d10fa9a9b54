"""Batches by `(rows, tokens)`, the same each time, with labels where the model takes them."""

from __future__ import annotations

import torch

from .build import Batch, Tensors

VOCABULARY, LABELS = 101, 5
EOS, VIDEO, IMAGE = 1, 3, 4
"""Ids of special tokens; random text uses 5 and above."""


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


def unlabelled(rows: int, tokens: int) -> Tensors:
    inputs = text(rows, tokens)
    del inputs["labels"]
    return inputs


def tagged(rows: int, tokens: int) -> Tensors:
    """A class per token; padding has none."""
    inputs = text(rows, tokens)
    labels = inputs["labels"]
    return inputs | {"labels": labels.where(labels < 0, labels % LABELS)}


def on_a_page(batch: Batch) -> Batch:
    """Adds a box per token, with corners in 0..63."""

    def with_boxes(rows: int, tokens: int) -> Tensors:
        generator = torch.Generator().manual_seed(0)
        boxes = torch.randint(0, 32, (rows, tokens, 4), generator=generator)
        boxes[..., 2:] += boxes[..., :2]
        return batch(rows, tokens) | {"bbox": boxes}

    return with_boxes


def attended(name: str) -> Batch:
    """Text that also sees 9 vectors, given as ``name``."""
    return lambda rows, tokens: text(rows, tokens) | {name: floats(rows, 9, 48)}


def codes(rows: int, tokens: int) -> Tensors:
    """Two streams of sound codes per row."""
    return {
        "input_ids": ids(rows * 2, tokens),
        "labels": ids(rows, tokens * 2, seed=1).view(rows, tokens, 2),
        "encoder_hidden_states": floats(rows, 9, 48),
    }


def pairs(rows: int, tokens: int) -> Tensors:
    return text(rows, tokens) | {"labels": targets(rows, tokens)}


def forced(rows: int, tokens: int) -> Tensors:
    """For a model that does not shift the labels itself."""
    inputs = pairs(rows, tokens)
    return inputs | {"decoder_input_ids": ids(rows, inputs["labels"].shape[1], seed=2)}


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


def long_waves(rows: int, tokens: int) -> Tensors:
    """Sound for convolutions of stride 384 in all, to be written down."""
    return {"input_values": floats(rows, 400 * tokens), "labels": targets(rows, tokens)}


def transcribed(rows: int, tokens: int) -> Tensors:
    """Four frames per token and a text shorter than the frames that are left of them."""
    return {
        "input_features": floats(rows, 4 * tokens, 20),
        "attention_mask": torch.ones(rows, 4 * tokens, dtype=torch.long),
        "labels": ids(rows, 3),
    }
