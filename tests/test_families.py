"""Model types of every kind: captured, transformed, compared with float64 at two shapes, all their FLOPs in rows.

The default run takes one of each kind, uncompiled. The slow run takes all of ``families.FAMILIES`` through
AOTAutograd, and one of each kind through Inductor.
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
from conftest import only_slow_but
from families import FAMILIES, Family, build
from families.exceptions import CAPTURED_AGAIN
from peft import LoraConfig
from qlora_fx.testing.check import compare, randomize_adapter
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

BY_TYPE = {f.model_type: f for f in FAMILIES}
ONE_OF_EACH = (
    *("gemma2", "gpt_oss", "deberta-v2", "t5", "vit", "wav2vec2", "paligemma", "mamba"),
    "switch_transformers",
)
COMPILED = (
    *("gpt2", "qwen2_moe", "modernbert", "bart", "dinov2", "whisper", "llava", "bamba"),
    *("switch_transformers", "llama4_text"),
)
ROWS_BY_DATA = {
    *("switch_transformers", "nllb-moe", "dbrx", "jetmoe", "deberta", "idefics3"),
}
"""How many rows some linears get is not known before the call: experts in loops, spans in tensors, chosen images."""
DEAD_LINEARS = {"squeezebert"}
"""Compute a pooled output that nothing reads; the graph does not."""
UNCOMPILED = {"swin"}
"""Takes many minutes through AOTAutograd."""
NOT_INDUCTOR = {"bamba"}
"""Inductor refuses a body (said in a warning); PyTorch's own kernels run it."""
NAMED = ("output head stays dense", "router stays dense", "convolutions stay dense")

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


def assert_right(family: Family, backend: str) -> list[str]:
    """Check one model; returns the warnings that were given."""
    model = build(family).train()
    first, second = family.batch(3, 21), family.batch(2, 17)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        qmodel = qlora_fx.transform(
            copy.deepcopy(model),
            lora,
            compute_dtype=torch.float32,
            example_inputs=first,
            backend=backend,
        )
        randomize_adapter(qmodel)
        for batch in (first, second):
            report = compare(model, qmodel, batch, all_outputs=False)
            assert report.passed, str(report)
            assert sum(line.norm > 0 for line in report.sites) >= len(report.sites) / 2
    said = [str(w.message) for w in caught if w.category is UserWarning]
    again = [m for m in said if m.startswith("capturing")]
    expected = family.model_type in CAPTURED_AGAIN
    assert bool(again) is expected, again
    assert not [m for m in said if "unrecognised" in m or "computed" in m], said

    explanation = qmodel.explain()
    for row in explanation:
        assert (row.quantized and row.adapted) or row.reason, row
    linears = [r for r in explanation if not r.reason.startswith(NAMED)]
    size = sum(math.prod(r.shape) for r in linears)
    assert sum(math.prod(r.shape) for r in linears if r.quantized) >= 0.95 * size
    if family.model_type not in ROWS_BY_DATA | DEAD_LINEARS:
        with ParameterFlops(model) as counter, torch.no_grad():
            model(**first)
        in_rows = sum(verdict.flops for verdict in qmodel.base.verdicts.values())
        assert in_rows >= 0.9999 * counter.flops, (in_rows, counter.flops)
        if not any("computed" in r.reason for r in explanation):
            assert in_rows <= 1.0001 * counter.flops, (in_rows, counter.flops)
    return said


@pytest.mark.parametrize("model_type", only_slow_but(("gpt_oss", "vit", "mamba"), ONE_OF_EACH))
def test_a_model_of_each_kind(model_type: str) -> None:
    assert_right(BY_TYPE[model_type], "eager")


@pytest.mark.slow
@pytest.mark.parametrize("model_type", BY_TYPE)
def test_a_model_type(model_type: str) -> None:
    assert_right(BY_TYPE[model_type], "eager" if model_type in UNCOMPILED else "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("model_type", COMPILED)
def test_a_compiled_model_of_each_kind(model_type: str) -> None:
    said = assert_right(BY_TYPE[model_type], "inductor")
    refused = any("Inductor cannot compile" in message for message in said)
    assert refused is (model_type in NOT_INDUCTOR)


def test_the_table_covers_every_kind() -> None:
    assert len(BY_TYPE) == len(FAMILIES) >= 40
    assert {f.kind for f in FAMILIES} == {
        *("causal", "encoder", "encoder-decoder", "vision", "speech", "vision-language"),
        *("state-space", "mixture-of-experts"),
    }
