"""How far a merged model's logits are from those of the model with its adapter, without holding the merged model.

The merged weights go through an ordinary eager copy of the model, module by module: each module's own parameters
are made when its forward begins and let go when it ends.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..capture.skeleton import Skeleton
from ..errors import InputError
from .values import Merged

SAMPLE = (
    "The harbour was quiet at dawn. Boats rocked against the pier while gulls argued over scraps, and an old "
    "man mended his nets, counting knots as he had done every morning for forty years. What will you do, a "
    "child asked him, when 3 + 4 nets are finished? He laughed: then I shall go fishing."
)
LONGEST = 256
"""Tokens of sample text that are used."""


@dataclass(frozen=True)
class Drift:
    """Differences of logits over all positions that are not masked.

    Attributes:
        sample: what they were computed on.
        largest, mean: of ``|merged - adapter|``.
        relative: ``|merged - adapter| / |adapter|``, Frobenius.
        kl: mean Kullback-Leibler divergence of the merged from the adapter's next-token distribution, in nats.
        agreement: share of positions where both have the same largest logit.
    """

    sample: str
    largest: float
    mean: float
    relative: float
    kl: float
    agreement: float

    def __str__(self) -> str:
        return (
            f"logits on {self.sample}: largest difference {self.largest:.2g}, mean {self.mean:.2g}, relative "
            f"{self.relative:.2g}; KL {self.kl:.2g} nats, same top token at {100 * self.agreement:.1f} % of positions"
        )


def sample_inputs(
    skeleton: Skeleton, sample: Any, folder: Path | None
) -> tuple[dict[str, Any], str]:
    """The model's arguments for a sample, and what it is in words.

    Raises:
        InputError: there is none, and none can be made.
    """
    if isinstance(sample, Mapping):
        inputs = {k: v for k, v in sample.items() if k != "labels"}
        return inputs, "the given inputs"
    main = getattr(skeleton.model, "main_input_name", "input_ids")
    if main != "input_ids" or skeleton.vocabulary is None:
        raise InputError(
            f"sample={sample!r}; accepted for a model that takes {main}: a dict of its arguments"
        )
    tokenizer = read_tokenizer(folder)
    if tokenizer is None:
        if sample is not None:
            raise InputError(
                "sample text needs a tokenizer beside the checkpoint; accepted: a dict with input_ids"
            )
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(skeleton.vocabulary, (1, 64), generator=generator)
        words = "64 random tokens (no tokenizer beside the checkpoint)"
    else:
        ids = tokenizer(sample or SAMPLE, return_tensors="pt")["input_ids"][:, :LONGEST]
        words = f"{ids.shape[1]} tokens of sample text"
    ids = ids.to(skeleton.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, words


def read_tokenizer(folder: Path | None) -> Any:
    """The folder's tokenizer; None if it has none."""
    from transformers import AutoTokenizer

    if folder is None or not any(
        (folder / n).is_file()
        for n in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
    ):
        return None
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def measure(run: Callable[..., Any], merged: Merged, inputs: dict[str, Any], words: str) -> Drift:
    """Run both models in eval mode on ``inputs``.

    Args:
        run: the model with its adapter, in eval mode.
        words: what the inputs are.

    Raises:
        InputError: the model has no logits.
    """
    with torch.no_grad():
        before = logits_of(run(**inputs))
        after = logits_of(run_merged(merged, inputs))
    mask = inputs.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.shape == before.shape[:2]:
        before, after = before[mask.bool()], after[mask.bool()]
    difference = (after - before).abs()
    p, q = before.log_softmax(-1), after.log_softmax(-1)
    return Drift(
        words,
        float(difference.max()),
        float(difference.mean()),
        float(difference.norm() / before.norm()),
        max(float((p.exp() * (p - q)).sum(-1).mean()), 0.0),
        float((before.argmax(-1) == after.argmax(-1)).float().mean()),
    )


def logits_of(output: Any) -> torch.Tensor:
    logits = getattr(output, "logits", None)
    if not isinstance(logits, torch.Tensor):
        raise InputError(
            f"{type(output).__name__} has no logits to compare; accepted: sample=False"
        )
    return logits.detach().float()


def run_merged(merged: Merged, inputs: Mapping[str, Any]) -> Any:
    """The merged model's own output, in eager PyTorch, one module's parameters at a time."""
    skeleton, store = merged.base.skeleton, merged.base.store
    model = copy.deepcopy(skeleton.model)
    for name, buffer in list(model.named_buffers(remove_duplicate=False)):
        path, _, leaf = name.rpartition(".")
        if buffer.device.type == "meta":
            model.get_submodule(path)._buffers[leaf] = store[skeleton.keys[name]]
    for path, module in model.named_modules(remove_duplicate=False):
        units = [path] if module._parameters else []
        if isinstance(module, nn.MultiheadAttention):  # reads its child's weight
            units = [path, *(f"{path}.{p}" for p, _ in module.named_children())]
        if units:
            attach(model, module, units, merged)
    return model.eval()(**skeleton.bind((), inputs).values)


def attach(model: nn.Module, module: nn.Module, units: list[str], merged: Merged) -> None:
    """Make the parameters of ``units`` when ``module`` begins, and let them go when it ends."""
    empty = {
        f"{path}.{leaf}".removeprefix("."): tensor
        for path in units
        for leaf, tensor in model.get_submodule(path)._parameters.items()
        if tensor is not None
    }

    def put(values: Mapping[str, torch.Tensor]) -> None:
        for name, value in values.items():
            path, _, leaf = name.rpartition(".")
            model.get_submodule(path)._parameters[leaf] = nn.Parameter(value, requires_grad=False)

    def begin(*_: Any) -> None:
        put({name: merged.parameter(name) for name in empty})

    def end(*_: Any) -> None:
        put(empty)

    module.register_forward_pre_hook(begin)
    module.register_forward_hook(end, always_call=True)
