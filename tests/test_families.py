"""Model types of every kind: captured, transformed, all their FLOPs in rows of the explanation.

The default run takes some, and compares them with float64 at two shapes. The slow run takes all of ``families.FAMILIES``;
what is compiled of them is compared in test_default_path.py.
"""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import qlora_fx
import pytest
import sharing
import torch
from default_path import ours
from families import FAMILIES, Family, build
from families.exceptions import REFUSED, SAID
from peft import LoraConfig
from qlora_fx.testing.check import compare, randomize_adapter
from slow import only_slow_but
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

BY_TYPE = {f.model_type: f for f in FAMILIES}
ONE_OF_EACH = (
    *("gemma2", "gpt_oss", "deberta-v2", "t5", "vit", "wav2vec2", "paligemma", "mamba"),
    "switch_transformers",
)
ROWS_BY_DATA = {
    *("switch_transformers", "nllb-moe", "dbrx", "jetmoe", "deberta", "idefics2", "idefics3"),
    *("smolvlm", "xmod"),
}
"""How many rows some linears get is not known before the call: experts in loops, spans in tensors, chosen images."""
DEAD_LINEARS = {
    *("big_bird", "bros", "canine", "encoder-decoder", "fnet", "layoutlm", "lilt", "luke"),
    *("pegasus_x", "squeezebert", "vision-encoder-decoder"),
}
"""Compute what nothing reads (a pooled output, a stream beside the text in the last layer); the graph does not."""
COPIED = {"xlnet"}
"""Multiply with a copy of a weight, which this file's counter does not see."""
NAMED = (
    "output head stays dense",
    "router stays dense",
    "convolutions stay dense",
    "the weight is also read by embedding",
)

aten = torch.ops.aten


class ParameterFlops(TorchDispatchMode):
    """Counts multiplications with parameters in eager PyTorch; knows nothing of graphs."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.parameters = {
            p.untyped_storage().data_ptr() for p in model.parameters() if p.dim() >= 2
        }
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [a for a in pytree.tree_leaves(args) if isinstance(a, torch.Tensor)]
        if any(t.untyped_storage().data_ptr() in self.parameters for t in tensors if t.dim() >= 2):
            self.flops += self.count(str(func).rsplit(".", 1)[0], args, out)
        return out

    def count(self, name: str, args: Any, out: Any) -> int:
        if name in ("aten.mm", "aten.bmm", "aten._grouped_mm", "transformers.grouped_mm_fallback"):
            return 2 * out.numel() * args[0].shape[-1]  # type: ignore[no-any-return]
        if name in ("aten.addmm", "aten.baddbmm"):
            return 2 * out.numel() * args[1].shape[-1]  # type: ignore[no-any-return]
        if name == "aten.convolution":
            return 2 * out.numel() * math.prod(args[1].shape[1:])  # type: ignore[no-any-return]
        return 0


@pytest.fixture(autouse=True)
def flops_of_these_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A capture that other tests made with other sizes has their FLOPs."""
    monkeypatch.setattr(sharing, "inputs_of_any_size", lambda values, _: sharing.inputs_of(values))


def transformed(family: Family, model: Any) -> tuple[Any, list[str]]:
    """The model, uncompiled, and the warnings that were given."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        qmodel = qlora_fx.transform(
            copy.deepcopy(model),
            LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"),
            compute_dtype=torch.float32,
            example_inputs=family.batch(3, 21),
            backend="eager",
        )
    return qmodel, [str(w.message) for w in caught if "qlora_fx" in w.filename or ours(w)]


def assert_whole(family: Family, model: Any, qmodel: Any) -> None:
    """Each linear is quantized and adapted or has a reason, and the FLOPs of all are those that eager PyTorch counts."""
    explanation = qmodel.explain()
    for row in explanation:
        assert (row.quantized and row.adapted) or row.reason, row
    linears = [r for r in explanation if not r.reason.startswith(NAMED)]
    size = sum(math.prod(r.shape) for r in linears)
    assert sum(math.prod(r.shape) for r in linears if r.quantized) >= 0.95 * size
    if family.model_type in ROWS_BY_DATA:
        return
    with ParameterFlops(model) as counter, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers' to its users
        model(**family.batch(3, 21))
    in_rows = sum(verdict.flops for verdict in qmodel.base.verdicts.values())
    if family.model_type not in DEAD_LINEARS:
        assert in_rows >= 0.9999 * counter.flops, (in_rows, counter.flops)
    seen = ("computed", "unrecognised")  # by the graph alone
    if family.model_type not in COPIED and not any(
        w in r.reason for r in explanation for w in seen
    ):
        assert in_rows <= 1.0001 * counter.flops, (in_rows, counter.flops)


@pytest.mark.parametrize("model_type", only_slow_but(("gpt_oss", "vit", "mamba"), ONE_OF_EACH))
def test_a_model_of_each_kind(model_type: str) -> None:
    family = BY_TYPE[model_type]
    model = build(family).train()
    qmodel, _ = transformed(family, model)
    randomize_adapter(qmodel)
    for batch in (family.batch(3, 21), family.batch(2, 17)):
        report = compare(model, qmodel, batch, all_outputs=False)
        assert report.passed, str(report)
        assert sum(line.norm > 0 for line in report.sites) >= len(report.sites) / 2
    assert_whole(family, model, qmodel)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [t for t in BY_TYPE if t not in REFUSED])
def test_every_linear_of_a_model_type(model_type: str) -> None:
    family = BY_TYPE[model_type]
    model = build(family).train()
    qmodel, said = transformed(family, model)
    expected = SAID.get(model_type, ())
    assert all(any(part in message for part in expected) for message in said), said
    assert_whole(family, model, qmodel)


def test_the_table_covers_every_kind() -> None:
    assert len(BY_TYPE) == len(FAMILIES) >= 40
    assert {f.kind for f in FAMILIES} == {
        *("causal", "encoder", "encoder-decoder", "vision", "speech", "vision-language"),
        *("state-space", "mixture-of-experts"),
    }
