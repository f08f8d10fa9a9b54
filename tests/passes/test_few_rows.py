"""The pass ``few_rows``, and ``attention`` over a cache: goldens, what they leave alone, and that twice is once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from qlora_fx.capture.dynamic_shapes import resized
from qlora_fx.config import DENSE, Config, Quantization
from qlora_fx.passes.adapt import adapt
from qlora_fx.passes.attention import attention
from qlora_fx.passes.few_rows import few_rows
from qlora_fx.passes.graph.nodes import FEW_ROWS, Emitter, arguments, aten
from small_models import excerpt, graph
from torch import nn

NAMES = ("past_key_values_0_keys", "past_key_values_0_values")
INPUTS = {
    "inputs_embeds": torch.zeros(2, 3, 8),
    **{name: torch.zeros(6, 2, 1, 4) for name in NAMES},
    "seen": torch.ones(2, 1, 3, 9, dtype=torch.bool),
}


class Continued(nn.Module):
    """Attention of two query heads over a cache of one key head, between two linears, and a head for the last token."""

    def __init__(self, dropout: float = 0.0, features: int = 6) -> None:
        super().__init__()
        self.config = SimpleNamespace()
        self.q = nn.Linear(8, 8)
        self.o = nn.Linear(8, features, bias=False)
        self.head = nn.Linear(features, 5, bias=False)
        self.dropout = dropout

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        past_key_values_0_keys: torch.Tensor,
        past_key_values_0_values: torch.Tensor,
        seen: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        batch = inputs_embeds.shape[0]
        q = self.q(inputs_embeds).view(batch, -1, 2, 4).transpose(1, 2)
        new = q[:, :1]
        k, v = (
            torch.cat([past.permute(1, 2, 0, 3), new], dim=-2)
            for past in (past_key_values_0_keys, past_key_values_0_values)
        )
        k, v = (t[:, :, None].expand(-1, -1, 2, -1, -1).reshape(batch, 2, -1, 4) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, seen, self.dropout)
        y = self.o(y.transpose(1, 2).reshape(batch, -1, 8))
        return {"y": self.head(y[:, -1:])}


def test_golden_of_products(config: Config) -> None:
    gm = graph(Continued(), INPUTS, config, few_rows)
    assert few_rows(gm, config=config).modified
    gm.recompile()
    assert_expected_inline(
        excerpt(gm, "%q:", "%o:", "%head", "dequant", "scaled"),
        """\
%head_weight: f32[5, 6] = stored[head.weight]
%q: f32[B, S, 8] = qlora_fx.linear_4bit(%inputs_embeds, %q_weight_packed, %q_weight_absmax, %q_weight_nested_absmax, %q_weight_offset, %nested_quant_map, %q_bias, %q_lora_A_weight, %q_lora_B_weight, 2.0, [8, 8], 64, nf4)  # site q: quantize, adapt r=2
%scaled_dot_product_attention: f32[B, 2, S, 4] = aten.scaled_dot_product_attention(%transpose, %reshape, %reshape_1, %seen)
%transpose_1: f32[B, S, 2, 4] = aten.transpose(%scaled_dot_product_attention, 1, 2)
%o: f32[B, S, 6] = qlora_fx.linear_4bit(%reshape_2, %o_weight_packed, %o_weight_absmax, %o_weight_nested_absmax, %o_weight_offset, %nested_quant_map, None, %o_lora_A_weight, %o_lora_B_weight, 2.0, [6, 8], 64, nf4)  # site o: quantize, adapt r=2
%head_rows: f32[B, 6] = aten.reshape(%slice_6, [-1, 6])
%head: f32[B, 5] = aten.linear(%head_rows, %head_weight)  # site head: output head stays dense; not adapted: 'all-linear' leaves the output head out
%head_tokens: f32[B, 1, 5] = aten.reshape(%head, [-1, 1, 5])
return (%head_tokens)
""",
    )
    assert not few_rows(gm, config=config).modified


HEAD_OF_16 = """\
%head_weight: f32[5, 16] = stored[head.weight]
%head: f32[B, 1, 5] = qlora_fx.linear_dense(%slice_6, %head_weight, None, None, None, 0.0)  # site head: output head stays dense; not adapted: 'all-linear' leaves the output head out
return (%head)
"""


def test_golden_of_a_dense_weight(config: Config) -> None:
    gm = graph(Continued(features=16), INPUTS, config, few_rows)
    assert few_rows(gm, config=config).modified
    gm.recompile()
    assert_expected_inline(excerpt(gm, "%head"), HEAD_OF_16)
    assert not few_rows(gm, config=config).modified


def test_branches_of_dense_weights_are_added_inside(config: Config) -> None:
    """Plain LoRA: all weights are dense."""
    plain = config.with_(quantization=Quantization(quant_type=DENSE))
    gm = graph(Continued(features=16), INPUTS, plain, few_rows)
    assert few_rows(gm, config=plain).modified
    products = {n.name: arguments(n) for n in gm.graph.nodes if n.target in FEW_ROWS}
    assert products.keys() == {"head"}, "rows of 8 are left alone"
    gm = graph(Wide(), WIDE, plain, few_rows)
    assert few_rows(gm, config=plain).modified
    products = {n.name: arguments(n) for n in gm.graph.nodes if n.target in FEW_ROWS}
    assert [a["lora_b"].name for a in products.values()] == ["up_lora_B_weight"]
    assert not any("scaled" in n.name for n in gm.graph.nodes)
    assert not adapt(gm, config=plain).modified, "the branch is seen inside"


WIDE = {
    "inputs_embeds": torch.zeros(2, 3, 16),
    **{name: torch.zeros(6, 2, 1, 4) for name in NAMES},
}


class Wide(nn.Module):
    """One linear, in a graph that takes a cache."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace()
        self.up = nn.Linear(16, 8)

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        past_key_values_0_keys: torch.Tensor,
        past_key_values_0_values: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        return {"y": self.up(inputs_embeds), "past": past_key_values_0_keys + 1.0}


def test_on_a_gpu_branches_stay(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora_fx.passes.few_rows.branches_stay", lambda node: True)
    gm = graph(Continued(), INPUTS, config, few_rows)
    assert few_rows(gm, config=config).modified
    gm.recompile()
    assert_expected_inline(
        excerpt(gm, "%q:", "lora", "%q_", "scaled:"),
        """\
%q_bias: f32[8] = stored[q.bias]
%q_weight_packed: u8[32, 1] = stored[q.weight]
%q_weight_absmax: u8[1] = stored[q.weight.absmax]
%q_weight_nested_absmax: f32[1] = stored[q.weight.nested_absmax]
%q_weight_offset: f32[] = stored[q.weight.offset]
%q_lora_A_weight: f32[2, 8] = adapter[q.lora_A.weight]
%q_lora_B_weight: f32[8, 2] = adapter[q.lora_B.weight]
%o_lora_A_weight: f32[2, 8] = adapter[o.lora_A.weight]
%o_lora_B_weight: f32[6, 2] = adapter[o.lora_B.weight]
%q: f32[B, S, 8] = qlora_fx.linear_4bit(%inputs_embeds, %q_weight_packed, %q_weight_absmax, %q_weight_nested_absmax, %q_weight_offset, %nested_quant_map, %q_bias, None, None, 0.0, [8, 8], 64, nf4)  # site q: quantize, adapt r=2
%q_lora_a: f32[B, S, 2] = aten.linear(%inputs_embeds, %q_lora_A_weight)
%q_lora_b: f32[B, S, 8] = aten.linear(%q_lora_a, %q_lora_B_weight)
%q_scaled: f32[B, S, 8] = aten.mul(%q_lora_b, 2.0)
%q_adapted: f32[B, S, 8] = aten.add(%q, %q_scaled)
%view: f32[B, S, 2, 4] = aten.view(%q_adapted, [%sym_size, -1, 2, 4])
%o: f32[B, S, 6] = qlora_fx.linear_4bit(%reshape_2, %o_weight_packed, %o_weight_absmax, %o_weight_nested_absmax, %o_weight_offset, %nested_quant_map, None, None, None, 0.0, [6, 8], 64, nf4)  # site o: quantize, adapt r=2
%o_lora_a: f32[B, S, 2] = aten.linear(%reshape_2, %o_lora_A_weight)
%o_lora_b: f32[B, S, 6] = aten.linear(%o_lora_a, %o_lora_B_weight)
%o_scaled: f32[B, S, 6] = aten.mul(%o_lora_b, 2.0)
""",
    )


def test_golden_of_attention(config: Config) -> None:
    gm = graph(Continued(), INPUTS, config, attention)
    assert attention(gm, config=config).modified
    gm.recompile()
    assert_expected_inline(
        excerpt(gm, "%past", "_cached", "aten.cat"),
        """\
def Continued(%inputs_embeds: f32[B, S, 8], %past_key_values_0_keys: f32[D2, B, 1, 4], %past_key_values_0_values: f32[D2, B, 1, 4], %seen: bool[B, 1, S, D2 + S]):
%sym_size: int(B) = aten.sym_size(%past_key_values_0_values, 1)
%scaled_dot_product_attention_cached: f32[B, 2, S, 4] = qlora_fx.cached_attention(%transpose, %past_key_values_0_keys, %slice_2, %past_key_values_0_values, %slice_2, %seen, 0.5)
%transpose_1: f32[B, S, 2, 4] = aten.transpose(%scaled_dot_product_attention_cached, 1, 2)
""",
    )
    assert not attention(gm, config=config).modified


def test_without_a_cache_nothing_changes(config: Config) -> None:
    class Alone(Continued):
        def forward(self, inputs_embeds: torch.Tensor) -> Any:  # type: ignore[override]
            return {"y": self.head(self.o(self.q(inputs_embeds)))}

    gm = graph(Alone(), {"inputs_embeds": INPUTS["inputs_embeds"]}, config, few_rows)
    assert not few_rows(gm, config=config).modified


def test_dropout_and_keys_from_elsewhere_are_left_alone(config: Config) -> None:
    gm = graph(Continued(dropout=0.1), INPUTS, config, attention)
    assert not attention(gm, config=config).modified

    class Elsewhere(Continued):
        def forward(  # type: ignore[override]
            self,
            inputs_embeds: torch.Tensor,
            other: torch.Tensor,
            past_key_values_0_values: torch.Tensor,
            seen: torch.Tensor,
        ) -> Any:
            return super().forward(inputs_embeds, other, past_key_values_0_values, seen)

    inputs = {("other" if n == NAMES[0] else n): v for n, v in INPUTS.items()}
    gm = graph(Elsewhere(), inputs, config, attention)
    assert not attention(gm, config=config).modified


def test_a_branch_of_another_input_and_a_product_that_is_read_twice_stay_apart(
    config: Config,
) -> None:
    gm = graph(Continued(), INPUTS, config, few_rows)
    low = next(n for n in gm.graph.nodes if n.name == "q_lora_a")
    with gm.graph.inserting_before(low):
        other = Emitter(gm.graph, low)(aten.neg.default, low.args[0], suffix="other")
    low.args = (other, low.args[1])
    product = next(n for n in gm.graph.nodes if n.name == "o")
    with gm.graph.inserting_after(product):
        again = Emitter(gm.graph, product)(aten.neg.default, product, suffix="again")
    output = next(n for n in gm.graph.nodes if n.op == "output")
    output.args = ((*output.args[0], again),)
    assert few_rows(gm, config=config).modified
    factors = {n.name: arguments(n)["lora_a"] for n in gm.graph.nodes if n.name in ("q", "o")}
    assert factors == {"q": None, "o": None}
    assert {"q_adapted", "o_adapted"} <= {n.name for n in gm.graph.nodes}


def test_a_cache_is_traced_with_a_length_that_no_other_size_has() -> None:
    inputs = {
        "input_ids": torch.zeros(2, 1, dtype=torch.int64),
        "attention_mask": torch.ones(2, 3, dtype=torch.int64),
        **{name: torch.zeros(2, 2, 2, 4) for name in NAMES},
    }
    shapes = {name: list(t.shape) for name, t in resized(inputs).items()}
    assert shapes == {
        "input_ids": [2, 2],
        "attention_mask": [2, 7],
        **{name: [5, 2, 2, 4] for name in NAMES},
    }
