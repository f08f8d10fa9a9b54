"""The passes of the stage *fuse*: goldens, when they decline, and that each can be left out without a trace."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import qlora_fx
import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from oracle import Float64, random_adapter, step, truth
from peft import LoraConfig
from qlora_fx.compiler import pipeline, printer
from qlora_fx.config import Config
from qlora_fx.errors import ConfigError
from qlora_fx.passes.attention import attention
from qlora_fx.passes.loss_head import loss_head
from qlora_fx.passes.masked_rows import masked_rows
from qlora_fx.passes.siblings import siblings
from qlora_fx.testing.check import relative_error
from small_models import batch, excerpt, graph, tiny_llama
from torch import fx, nn
from transformers.utils.import_utils import torch_compilable_check

X = {"x": torch.zeros(2, 3, 8)}


class Siblings(nn.Module):
    """Two linears of one input and a third of another."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace()
        self.q = nn.Linear(8, 6, bias=False)
        self.k = nn.Linear(8, 4, bias=False)
        self.o = nn.Linear(6, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.o(self.q(x)) * self.k(x).sum(-1, keepdim=True)
        return y


class Attention(nn.Module):
    """Two query heads that share a key head, behind an explicit mask."""

    def __init__(self, causal: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        self.config = SimpleNamespace()
        self.causal, self.dropout = causal, dropout
        self.q = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        at = torch.arange(x.shape[1])
        order = at[:, None] >= at if self.causal else at[:, None] + at != 3
        mask = order[None, None].expand(x.shape[0], 1, -1, -1)
        q = self.q(x).view(x.shape[0], -1, 2, 4).transpose(1, 2)
        k = q[:, :1]
        k = k[:, :, None].expand(-1, -1, 2, -1, -1).reshape(q.shape)
        dropout = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, k, mask, dropout)


class Pictures(nn.Module):
    """Features of pictures in the places of their placeholders; ``spelling`` is how their mask is made."""

    def __init__(self, spelling: str = "unsqueezed") -> None:
        super().__init__()
        self.config = SimpleNamespace()
        self.q = nn.Linear(8, 8, bias=False)
        self.v = nn.Linear(8, 8, bias=False)
        self.spelling = spelling

    def forward(self, x: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        x = self.q(x)
        first = x[..., 0]
        mask = (first > 0)[..., None]
        if self.spelling == "expanded":
            mask = mask.expand_as(x)
        if self.spelling == "per element":
            mask = x > 0
        if self.spelling == "picked":
            picked = x[first > 0]
            torch_compilable_check(picked.shape[0] <= features.shape[0], "more")
            features = features + picked.mean(dim=0)
        if self.spelling == "counted":
            torch_compilable_check(mask.sum() * 8 == features.numel(), "not as many")
        if self.spelling == "counted anew":
            torch_compilable_check((first > 0).sum() == len(features), "not as many")
        if self.spelling == "picked and counted":
            mask = mask.expand_as(x)
            features = features[features[:, 0] == 0]
            torch_compilable_check(x[mask].numel() == features.numel(), "not as many")
        return x.masked_scatter(mask, self.v(features))


class Loss(nn.Module):
    """A head and the loss that transformers' causal models have, with what some put between."""

    def __init__(self, cap: float = 0.0, kind: str = "mean") -> None:
        super().__init__()
        self.config = SimpleNamespace()
        self.up = nn.Linear(8, 8, bias=False)
        self.head = nn.Linear(8, 5, bias=False)
        self.cap, self.kind = cap, kind

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.head(self.up(x))
        if self.cap:
            logits = self.cap * torch.tanh(logits / self.cap)
        if self.kind == "divided twice":
            logits = torch.tanh(logits / 3.0) / 3.0
        if self.kind == "some words":
            return {"loss": F.cross_entropy(logits[:, :, :4].reshape(-1, 4), labels.view(-1))}
        if self.kind == "weighted":
            return {"loss": F.cross_entropy(logits.view(-1, 5), labels.view(-1), torch.ones(5))}
        if self.kind == "penalty":
            return {"loss": F.cross_entropy(logits.view(-1, 5), labels.view(-1)) + logits.mean()}
        kind = "mean" if self.kind == "divided twice" else self.kind
        loss = F.cross_entropy(logits.float().view(-1, 5), labels.view(-1), reduction=kind)
        return {"loss": loss, "logits": logits}


LABELS = X | {"labels": torch.zeros(2, 3, dtype=torch.int64)}


def applied(run: Any, model: nn.Module, inputs: Any, config: Config) -> fx.GraphModule:
    """The graph after the pass, which must say that it changed something, and nothing the second time."""
    result = run(graph(model, inputs, config, run), config=config)
    assert result.modified
    gm: fx.GraphModule = result.graph_module
    gm.graph.lint()
    before = printer.text(gm)
    again = run(gm, config=config)
    assert not again.modified
    assert printer.text(again.graph_module) == before
    return gm


def unchanged(run: Any, model: nn.Module, inputs: Any, config: Config) -> bool:
    gm = graph(model, inputs, config, run)
    before = printer.text(gm)
    result = run(gm, config=config)
    return not result.modified and printer.text(result.graph_module) == before


def test_siblings_share_the_first_product_of_their_adapters(config: Config) -> None:
    gm = applied(siblings, Siblings(), X, config)
    assert_expected_inline(
        excerpt(gm, "lora_a", "lora_stack", "lora_b:"),
        """\
%q_lora_stack: f32[4, 8] = aten.cat([%q_lora_A_weight, %k_lora_A_weight])
%q_lora_a_all: f32[B, S, 4] = aten.linear(%x, %q_lora_stack)
%q_lora_a_part: f32[B, S, 2] = aten.slice(%q_lora_a_all, -1, 0, 2)
%k_lora_a_part: f32[B, S, 2] = aten.slice(%q_lora_a_all, -1, 2, 4)
%q_lora_b: f32[B, S, 6] = aten.linear(%q_lora_a_part, %q_lora_B_weight)
%o_lora_a: f32[B, S, 2] = aten.linear(%q_adapted, %o_lora_A_weight)
%o_lora_b: f32[B, S, 8] = aten.linear(%o_lora_a, %o_lora_B_weight)
%k_lora_b: f32[B, S, 4] = aten.linear(%k_lora_a_part, %k_lora_B_weight)
""",
    )


def test_siblings_go_by_the_mark_and_not_by_the_name(config: Config) -> None:
    gm = graph(Siblings(), X, config, siblings)
    for node in gm.graph.nodes:
        if node.meta.pop("lora_a", False):
            assert node.name.endswith("_lora_a")
    assert not siblings(gm, config=config).modified


def test_dropout_leaves_no_siblings(config: Config) -> None:
    config.lora.lora_dropout = 0.5
    assert unchanged(siblings, Siblings(), X, config)


def test_attention_over_a_causal_mask_is_told_what_the_mask_is(config: Config) -> None:
    gm = applied(attention, Attention(), X, config)
    assert_expected_inline(
        excerpt(gm, "kind", "attention", "return"),
        """\
%expand_kind: i64[] = qlora_fx.mask_kind(%expand)
%scaled_dot_product_attention_causal: (f32[B, 2, S, 4], f32[B, 2, S]) = qlora_fx.attention(%transpose, %slice_3, %slice_3, %expand, %expand_kind, 0.5)
%scaled_dot_product_attention_result: f32[B, 2, S, 4] = getitem(%scaled_dot_product_attention_causal, 0)
return (%scaled_dot_product_attention_result)
""",
    )


def test_where_a_kernel_asks_for_it_sequences_are_told_from_the_mask(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU."""
    from qlora_fx.passes import attention as module

    monkeypatch.setattr(module, "take_sequences", lambda: {"cpu"})
    gm = applied(attention, Attention(), X, config)
    assert_expected_inline(
        excerpt(gm, "kind", "cu_seqlens", "attention", "return"),
        """\
%expand_kind: i64[] = getitem(%expand_seen, 0)
%expand_cu_seqlens: i32[4, 3, B, S] = getitem(%expand_seen, 1)
%scaled_dot_product_attention_causal: (f32[B, 2, S, 4], f32[B, 2, S]) = qlora_fx.attention(%transpose, %slice_3, %slice_3, %expand, %expand_kind, 0.5, %expand_cu_seqlens)
%scaled_dot_product_attention_result: f32[B, 2, S, 4] = getitem(%scaled_dot_product_attention_causal, 0)
return (%scaled_dot_product_attention_result)
""",
    )


FEATURES = {"x": torch.ones(2, 3, 8), "features": torch.zeros(6, 8)}


@pytest.mark.parametrize("spelling", ["unsqueezed", "expanded", "picked"])
def test_features_are_put_in_the_places_of_their_placeholders(
    config: Config, spelling: str
) -> None:
    gm = applied(masked_rows, Pictures(spelling), FEATURES, config)
    assert_expected_inline(
        excerpt(gm, "masked_rows", "return"),
        """\
%masked_scatter_rows: f32[B, S, 8] = qlora_fx.masked_rows(%q_adapted, %masked_scatter_mask, %v_adapted, False)
return (%masked_scatter_rows)
""",
    )


@pytest.mark.parametrize("spelling", ["counted", "counted anew", "picked and counted"])
def test_where_a_model_asserts_that_there_are_as_many_as_features_so_does_the_operator(
    config: Config, spelling: str
) -> None:
    gm = applied(masked_rows, Pictures(spelling), FEATURES, config)
    assert_expected_inline(
        excerpt(gm, "masked_rows", "return"),
        """\
%masked_scatter_rows: f32[B, S, 8] = qlora_fx.masked_rows(%q_adapted, %masked_scatter_mask, %v_adapted, True)
return (%masked_scatter_rows)
""",
    )


def test_a_mask_per_element_stays(config: Config) -> None:
    assert unchanged(masked_rows, Pictures("per element"), FEATURES, config)


@pytest.mark.parametrize("options", [{"causal": False}, {"dropout": 0.5}])
def test_other_attention_stays(config: Config, options: Any) -> None:
    assert unchanged(attention, Attention(**options), X, config)


def test_the_loss_of_a_head_takes_no_logits(config: Config) -> None:
    config = config.with_(return_logits=False)
    gm = applied(loss_head, Loss(), LABELS, config)
    assert_expected_inline(
        excerpt(gm, "head", "return"),
        """\
%head_weight: f32[5, 8] = stored[head.weight]
%head_rows: f32[B*S, 8] = aten.reshape(%up_adapted, [-1, 8])
%head_loss: (f32[], f32[], f32[B*S, 8]) = qlora_fx.linear_cross_entropy(%head_rows, [%head_weight], None, %view_1, -100, 1.0, 0.0, [5, 8], 64, , True)  # site head: output head stays dense; not adapted: 'all-linear' leaves the output head out
%head_total: f32[] = getitem(%head_loss, 0)
%head_count: f32[] = getitem(%head_loss, 1)
%head_mean: f32[] = aten.div(%head_total, %head_count)
return (%head_mean, None)
""",
    )


def test_a_softcap_is_taken_along(config: Config) -> None:
    config = config.with_(return_logits=False)
    gm = applied(loss_head, Loss(cap=30.0, kind="sum"), LABELS, config)
    (node,) = gm.graph.find_nodes(
        op="call_function", target=torch.ops.qlora_fx.linear_cross_entropy.default
    )
    scale, cap = node.args[5:7]
    assert (scale, cap) == (pytest.approx(1.0), 30.0)
    assert not list(gm.graph.find_nodes(op="call_function", target=torch.ops.aten.div.Tensor))


@pytest.mark.parametrize("kind", ["weighted", "penalty", "some words", "divided twice"])
def test_a_loss_that_needs_its_logits_keeps_them(config: Config, kind: str) -> None:
    assert unchanged(loss_head, Loss(kind=kind), LABELS, config.with_(return_logits=False))


def test_asked_for_logits_are_there(config: Config) -> None:
    assert unchanged(loss_head, Loss(), LABELS, config)


def test_an_unknown_name_lists_what_can_be_left_out() -> None:
    with pytest.raises(
        ConfigError, match="disable has 'atention'; accepted: 'few_rows', 'siblings', "
    ):
        qlora_fx.transform(tiny_llama(), disable=["atention"])


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)]
)
def test_each_pass_can_be_left_out_and_all_of_them(dtype: torch.dtype) -> None:
    """Uncompiled, padded: logits and gradients beside float64; in bfloat16 with all passes."""
    model = tiny_llama()
    for p in model.parameters():
        if p.dim() == 2:
            nn.init.normal_(p, std=0.15)  # large enough for attention to choose
    model = model.to(dtype)
    adapter = random_adapter(model, 2, scale=0.05)
    dense, true_params = truth(model, adapter, 2.0)
    with Float64():
        true_logits, true_grads = step(dense, true_params, batch())
    limit = 5e-6 if dtype == torch.float32 else 6e-2
    from oracle import ours

    for count in (0, 1, len(pipeline.OPTIONAL)) if dtype == torch.float32 else (0,):
        for left_out in itertools.combinations(pipeline.OPTIONAL, count):
            config = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear")
            qmodel, params = ours(
                model, adapter, config, compute_dtype=dtype, backend="eager", disable=left_out
            )
            logits, grads = step(qmodel, params, batch())
            assert relative_error(logits, true_logits) < limit, left_out
            for name, grad in grads.items():
                assert relative_error(grad, true_grads[name]) < limit, (left_out, name)
