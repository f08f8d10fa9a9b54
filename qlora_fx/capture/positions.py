"""How long a row may be: learned positions are a table, and an index past its end would end the process."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import InputError
from .arguments import is_encoder_decoder

SETTINGS = ("max_position_embeddings", "max_target_positions", "max_source_positions")
"""Of a config: how many positions a table has, give or take what some models leave free at its beginning."""


def longest_rows(model: nn.Module) -> dict[str, int]:
    """Tokens that the table of learned positions has room for, of ``input_ids`` and of ``decoder_input_ids``.

    Models with rotary or relative positions have no such table and no such end.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    sizes = {getattr(text, name, None) for name in SETTINGS} - {None}
    found: dict[str, int] = {}
    for path, module in model.named_modules():
        leaf = path.rpartition(".")[2]
        if not isinstance(module, nn.Embedding) or not ("position" in leaf or leaf == "wpe"):
            continue
        padding = 0 if module.padding_idx is None else module.padding_idx + 1
        offset = int(getattr(module, "offset", padding))
        rows = module.num_embeddings
        if rows in sizes or rows - offset in sizes:
            target = is_encoder_decoder(model) and "decoder" in path.split(".")
            name = "decoder_input_ids" if target else "input_ids"
            found[name] = min(rows - offset, found.get(name, rows))
    return found


def check_length(name: str, ids: Any, longest: int, past: int = 0) -> None:
    """Raise ``InputError`` if rows, behind ``past`` tokens in a cache, are longer than that."""
    if isinstance(ids, torch.Tensor) and ids.dim() == 2 and ids.shape[1] + past > longest:
        behind = f" behind {past} in the cache" if past else ""
        raise InputError(
            f"{name} has rows of {ids.shape[1]} tokens{behind}; accepted: at most {longest}, the positions that the model has learned"
        )


def check_positions(values: Any, longest: dict[str, int], past: int) -> None:
    """Raise ``InputError`` if rows, behind ``past`` tokens in a cache, are longer than the model's learned positions."""
    cached = "decoder_input_ids" if "decoder_input_ids" in longest else "input_ids"
    for name, most in longest.items():
        check_length(name, values.get(name), most, past if name == cached else 0)
        if name == "decoder_input_ids":
            check_length("labels", values.get("labels"), most)
