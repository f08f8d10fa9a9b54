"""Each pass: its golden Before/After in our printer's text, idempotence, honest ``modified``."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from qlora_fx.compiler import printer
from qlora_fx.compiler.pipeline import PIPELINE
from qlora_fx.config import Config, Quantization, default_lora
from qlora_fx.errors import ConfigError
from qlora_fx.passes.adapt import adapt
from qlora_fx.passes.graph.nodes import sites
from qlora_fx.passes.normalize import normalize
from qlora_fx.passes.outline import outline
from qlora_fx.passes.quantize import quantize
from qlora_fx.passes.select import select
from small_models import Toy, captured
from torch import fx, nn
from transformers.pytorch_utils import Conv1D

PASSES = tuple(stage.run for stage in PIPELINE)


def after(
    last: object, config: Config, model: nn.Module | None = None, **options: object
) -> fx.GraphModule:
    """The toy's graph after all passes up to ``last``."""
    gm = captured(model, **options).gm
    for run in PASSES:
        gm = run(gm, config=config).graph_module
        gm.recompile()
        if run is last:
            return gm
    raise AssertionError(last)


class ConvToy(nn.Module):
    """A Conv1D (weight ``[in, out]``), a needless cast and a whole slice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.c_attn = Conv1D(24, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.c_attn(x.to(torch.float32))[:]
        return y


def test_normalize_turns_addmm_into_linear_and_drops_noops(config: Config) -> None:
    gm = after(normalize, config, ConvToy())
    assert_expected_inline(
        printer.text(gm),
        """\
def ConvToy(%x: f32[B, S, 8]):
    %c_attn_weight: f32[8, 24] = stored[c_attn.weight]
    %c_attn_bias: f32[24] = stored[c_attn.bias]
    %sym_size: int(B) = aten.sym_size(%x, 0)
    %sym_size_1: int(S) = aten.sym_size(%x, 1)
    %c_attn_sym_size: int(8) = aten.sym_size(%x, 2)
    %c_attn_view: f32[B*S, 8] = aten.view(%x, [-1, %c_attn_sym_size])
    %c_attn_weight_t: f32[24, 8] = aten.t(%c_attn_weight)
    %c_attn: f32[B*S, 24] = aten.linear(%c_attn_view, %c_attn_weight_t, %c_attn_bias)
    %c_attn_view_1: f32[B, S, 24] = aten.view(%c_attn, [%sym_size, %sym_size_1, 24])
    return (%c_attn_view_1)
""",
    )


def test_select_marks_every_linear(config: Config) -> None:
    gm = after(select, config)
    assert_expected_inline(
        printer.text(gm),
        """\
def Toy(%x: f32[B, S, 8]):
    %layers_0_up_weight: f32[6, 8] = stored[layers.0.up.weight]
    %layers_0_down_weight: f32[8, 6] = stored[layers.0.down.weight]
    %layers_1_up_weight: f32[6, 8] = stored[layers.1.up.weight]
    %layers_1_down_weight: f32[8, 6] = stored[layers.1.down.weight]
    %head_weight: f32[5, 8] = stored[head.weight]
    %layers_0_up: f32[B, S, 6] = aten.linear(%x, %layers_0_up_weight)  # site layers.0.up: quantize, adapt r=2
    %layers_0_relu: f32[B, S, 6] = aten.relu(%layers_0_up)
    %layers_0_down: f32[B, S, 8] = aten.linear(%layers_0_relu, %layers_0_down_weight)  # site layers.0.down: quantize, adapt r=2
    %layers_1_up: f32[B, S, 6] = aten.linear(%layers_0_down, %layers_1_up_weight)  # site layers.1.up: quantize, adapt r=2
    %layers_1_relu: f32[B, S, 6] = aten.relu(%layers_1_up)
    %layers_1_down: f32[B, S, 8] = aten.linear(%layers_1_relu, %layers_1_down_weight)  # site layers.1.down: quantize, adapt r=2
    %head: f32[B, S, 5] = aten.linear(%layers_1_down, %head_weight)  # site head: output head stays dense; not adapted: 'all-linear' leaves the output head out
    return (%head)
""",
    )


def test_quantize_reads_selected_weights_from_storage(config: Config) -> None:
    gm = after(quantize, config, Toy(blocks=1, bias=True))
    assert_expected_inline(
        printer.text(gm),
        """\
def Toy(%x: f32[B, S, 8]):
    %layers_0_up_bias: f32[6] = stored[layers.0.up.bias]
    %layers_0_down_bias: f32[8] = stored[layers.0.down.bias]
    %head_weight: f32[5, 8] = stored[head.weight]
    %layers_0_up_weight_packed: u8[24, 1] = stored[layers.0.up.weight]
    %layers_0_up_weight_absmax: u8[1] = stored[layers.0.up.weight.absmax]
    %layers_0_up_weight_nested_absmax: f32[1] = stored[layers.0.up.weight.nested_absmax]
    %layers_0_up_weight_offset: f32[] = stored[layers.0.up.weight.offset]
    %nested_quant_map: f32[256] = stored[nested_quant_map]
    %layers_0_down_weight_packed: u8[24, 1] = stored[layers.0.down.weight]
    %layers_0_down_weight_absmax: u8[1] = stored[layers.0.down.weight.absmax]
    %layers_0_down_weight_nested_absmax: f32[1] = stored[layers.0.down.weight.nested_absmax]
    %layers_0_down_weight_offset: f32[] = stored[layers.0.down.weight.offset]
    %layers_0_up_absmax: f32[1] = bitsandbytes.dequantize_blockwise(%layers_0_up_weight_absmax, %layers_0_up_weight_nested_absmax, %nested_quant_map, 256, f32)
    %layers_0_up_absmax_offset: f32[1] = aten.add(%layers_0_up_absmax, %layers_0_up_weight_offset)
    %layers_0_up_dequant: f32[1, 48] = bitsandbytes.dequantize_4bit(%layers_0_up_weight_packed, %layers_0_up_absmax_offset, 64, nf4, [1, 48], f32)
    %layers_0_up_dequant_matrix: f32[6, 8] = aten.view(%layers_0_up_dequant, [6, 8])
    %layers_0_up: f32[B, S, 6] = aten.linear(%x, %layers_0_up_dequant_matrix, %layers_0_up_bias)  # site layers.0.up: quantize, adapt r=2
    %layers_0_relu: f32[B, S, 6] = aten.relu(%layers_0_up)
    %layers_0_down_absmax: f32[1] = bitsandbytes.dequantize_blockwise(%layers_0_down_weight_absmax, %layers_0_down_weight_nested_absmax, %nested_quant_map, 256, f32)
    %layers_0_down_absmax_offset: f32[1] = aten.add(%layers_0_down_absmax, %layers_0_down_weight_offset)
    %layers_0_down_dequant: f32[1, 48] = bitsandbytes.dequantize_4bit(%layers_0_down_weight_packed, %layers_0_down_absmax_offset, 64, nf4, [1, 48], f32)
    %layers_0_down_dequant_matrix: f32[8, 6] = aten.view(%layers_0_down_dequant, [8, 6])
    %layers_0_down: f32[B, S, 8] = aten.linear(%layers_0_relu, %layers_0_down_dequant_matrix, %layers_0_down_bias)  # site layers.0.down: quantize, adapt r=2
    %head: f32[B, S, 5] = aten.linear(%layers_0_down, %head_weight)  # site head: output head stays dense; not adapted: 'all-linear' leaves the output head out
    return (%head)
""",
    )


def test_adapt_adds_a_branch_to_each_site(config: Config) -> None:
    gm = after(adapt, config, Toy(blocks=1))
    assert_expected_inline(
        printer.text(gm),
        """\
def Toy(%x: f32[B, S, 8]):
    %head_weight: f32[5, 8] = stored[head.weight]
    %layers_0_up_weight_packed: u8[24, 1] = stored[layers.0.up.weight]
    %layers_0_up_weight_absmax: u8[1] = stored[layers.0.up.weight.absmax]
    %layers_0_up_weight_nested_absmax: f32[1] = stored[layers.0.up.weight.nested_absmax]
    %layers_0_up_weight_offset: f32[] = stored[layers.0.up.weight.offset]
    %nested_quant_map: f32[256] = stored[nested_quant_map]
    %layers_0_down_weight_packed: u8[24, 1] = stored[layers.0.down.weight]
    %layers_0_down_weight_absmax: u8[1] = stored[layers.0.down.weight.absmax]
    %layers_0_down_weight_nested_absmax: f32[1] = stored[layers.0.down.weight.nested_absmax]
    %layers_0_down_weight_offset: f32[] = stored[layers.0.down.weight.offset]
    %layers_0_up_lora_A_weight: f32[2, 8] = adapter[layers.0.up.lora_A.weight]
    %layers_0_up_lora_B_weight: f32[6, 2] = adapter[layers.0.up.lora_B.weight]
    %layers_0_down_lora_A_weight: f32[2, 6] = adapter[layers.0.down.lora_A.weight]
    %layers_0_down_lora_B_weight: f32[8, 2] = adapter[layers.0.down.lora_B.weight]
    %layers_0_up_absmax: f32[1] = bitsandbytes.dequantize_blockwise(%layers_0_up_weight_absmax, %layers_0_up_weight_nested_absmax, %nested_quant_map, 256, f32)
    %layers_0_up_absmax_offset: f32[1] = aten.add(%layers_0_up_absmax, %layers_0_up_weight_offset)
    %layers_0_up_dequant: f32[1, 48] = bitsandbytes.dequantize_4bit(%layers_0_up_weight_packed, %layers_0_up_absmax_offset, 64, nf4, [1, 48], f32)
    %layers_0_up_dequant_matrix: f32[6, 8] = aten.view(%layers_0_up_dequant, [6, 8])
    %layers_0_up: f32[B, S, 6] = aten.linear(%x, %layers_0_up_dequant_matrix)  # site layers.0.up: quantize, adapt r=2
    %layers_0_up_lora_a: f32[B, S, 2] = aten.linear(%x, %layers_0_up_lora_A_weight)
    %layers_0_up_lora_b: f32[B, S, 6] = aten.linear(%layers_0_up_lora_a, %layers_0_up_lora_B_weight)
    %layers_0_up_scaled: f32[B, S, 6] = aten.mul(%layers_0_up_lora_b, 2.0)
    %layers_0_up_adapted: f32[B, S, 6] = aten.add(%layers_0_up, %layers_0_up_scaled)
    %layers_0_relu: f32[B, S, 6] = aten.relu(%layers_0_up_adapted)
    %layers_0_down_absmax: f32[1] = bitsandbytes.dequantize_blockwise(%layers_0_down_weight_absmax, %layers_0_down_weight_nested_absmax, %nested_quant_map, 256, f32)
    %layers_0_down_absmax_offset: f32[1] = aten.add(%layers_0_down_absmax, %layers_0_down_weight_offset)
    %layers_0_down_dequant: f32[1, 48] = bitsandbytes.dequantize_4bit(%layers_0_down_weight_packed, %layers_0_down_absmax_offset, 64, nf4, [1, 48], f32)
    %layers_0_down_dequant_matrix: f32[8, 6] = aten.view(%layers_0_down_dequant, [8, 6])
    %layers_0_down: f32[B, S, 8] = aten.linear(%layers_0_relu, %layers_0_down_dequant_matrix)  # site layers.0.down: quantize, adapt r=2
    %layers_0_down_lora_a: f32[B, S, 2] = aten.linear(%layers_0_relu, %layers_0_down_lora_A_weight)
    %layers_0_down_lora_b: f32[B, S, 8] = aten.linear(%layers_0_down_lora_a, %layers_0_down_lora_B_weight)
    %layers_0_down_scaled: f32[B, S, 8] = aten.mul(%layers_0_down_lora_b, 2.0)
    %layers_0_down_adapted: f32[B, S, 8] = aten.add(%layers_0_down, %layers_0_down_scaled)
    %head: f32[B, S, 5] = aten.linear(%layers_0_down_adapted, %head_weight)  # site head: output head stays dense; not adapted: 'all-linear' leaves the output head out
    return (%head)
""",
    )


def test_outline_calls_one_body_per_kind_of_block(config: Config) -> None:
    gm = after(outline, config)
    assert_expected_inline(
        printer.text(gm),
        """\
def Toy(%x: f32[B, S, 8]):
    %head_weight: f32[5, 8] = stored[head.weight]
    %layers_0_up_weight_packed: u8[24, 1] = stored[layers.0.up.weight]
    %layers_0_up_weight_absmax: u8[1] = stored[layers.0.up.weight.absmax]
    %layers_0_up_weight_nested_absmax: f32[1] = stored[layers.0.up.weight.nested_absmax]
    %layers_0_up_weight_offset: f32[] = stored[layers.0.up.weight.offset]
    %nested_quant_map: f32[256] = stored[nested_quant_map]
    %layers_0_down_weight_packed: u8[24, 1] = stored[layers.0.down.weight]
    %layers_0_down_weight_absmax: u8[1] = stored[layers.0.down.weight.absmax]
    %layers_0_down_weight_nested_absmax: f32[1] = stored[layers.0.down.weight.nested_absmax]
    %layers_0_down_weight_offset: f32[] = stored[layers.0.down.weight.offset]
    %layers_1_up_weight_packed: u8[24, 1] = stored[layers.1.up.weight]
    %layers_1_up_weight_absmax: u8[1] = stored[layers.1.up.weight.absmax]
    %layers_1_up_weight_nested_absmax: f32[1] = stored[layers.1.up.weight.nested_absmax]
    %layers_1_up_weight_offset: f32[] = stored[layers.1.up.weight.offset]
    %layers_1_down_weight_packed: u8[24, 1] = stored[layers.1.down.weight]
    %layers_1_down_weight_absmax: u8[1] = stored[layers.1.down.weight.absmax]
    %layers_1_down_weight_nested_absmax: f32[1] = stored[layers.1.down.weight.nested_absmax]
    %layers_1_down_weight_offset: f32[] = stored[layers.1.down.weight.offset]
    %layers_0_up_lora_A_weight: f32[2, 8] = adapter[layers.0.up.lora_A.weight]
    %layers_0_up_lora_B_weight: f32[6, 2] = adapter[layers.0.up.lora_B.weight]
    %layers_0_down_lora_A_weight: f32[2, 6] = adapter[layers.0.down.lora_A.weight]
    %layers_0_down_lora_B_weight: f32[8, 2] = adapter[layers.0.down.lora_B.weight]
    %layers_1_up_lora_A_weight: f32[2, 8] = adapter[layers.1.up.lora_A.weight]
    %layers_1_up_lora_B_weight: f32[6, 2] = adapter[layers.1.up.lora_B.weight]
    %layers_1_down_lora_A_weight: f32[2, 6] = adapter[layers.1.down.lora_A.weight]
    %layers_1_down_lora_B_weight: f32[8, 2] = adapter[layers.1.down.lora_B.weight]
    %layers_0: f32[B, S, 8] = ToyBlock(%x, <13 stored>)
    %layers_1: f32[B, S, 8] = ToyBlock(%layers_0, <13 stored>)
    %epilogue: f32[B, S, 5] = epilogue(%layers_1, <1 stored>)
    return (%epilogue)

def ToyBlock(%x: f32[B, S, 8]):
    %up_weight_absmax: u8[1] = stored[up.weight.absmax]
    %up_weight_nested_absmax: f32[1] = stored[up.weight.nested_absmax]
    %nested_quant_map: f32[256] = stored[nested_quant_map]
    %up_weight_offset: f32[] = stored[up.weight.offset]
    %up_weight_packed: u8[24, 1] = stored[up.weight]
    %up_lora_A_weight: f32[2, 8] = adapter[up.lora_A.weight]
    %up_lora_B_weight: f32[6, 2] = adapter[up.lora_B.weight]
    %down_weight_absmax: u8[1] = stored[down.weight.absmax]
    %down_weight_nested_absmax: f32[1] = stored[down.weight.nested_absmax]
    %down_weight_offset: f32[] = stored[down.weight.offset]
    %down_weight_packed: u8[24, 1] = stored[down.weight]
    %down_lora_A_weight: f32[2, 6] = adapter[down.lora_A.weight]
    %down_lora_B_weight: f32[8, 2] = adapter[down.lora_B.weight]
    %up_absmax: f32[1] = bitsandbytes.dequantize_blockwise(%up_weight_absmax, %up_weight_nested_absmax, %nested_quant_map, 256, f32)
    %up_absmax_offset: f32[1] = aten.add(%up_absmax, %up_weight_offset)
    %up_dequant: f32[1, 48] = bitsandbytes.dequantize_4bit(%up_weight_packed, %up_absmax_offset, 64, nf4, [1, 48], f32)
    %up_dequant_matrix: f32[6, 8] = aten.view(%up_dequant, [6, 8])
    %up: f32[B, S, 6] = aten.linear(%x, %up_dequant_matrix)  # site layers.0.up: quantize, adapt r=2
    %up_lora_a: f32[B, S, 2] = aten.linear(%x, %up_lora_A_weight)
    %up_lora_b: f32[B, S, 6] = aten.linear(%up_lora_a, %up_lora_B_weight)
    %up_scaled: f32[B, S, 6] = aten.mul(%up_lora_b, 2.0)
    %up_adapted: f32[B, S, 6] = aten.add(%up, %up_scaled)
    %relu: f32[B, S, 6] = aten.relu(%up_adapted)
    %down_absmax: f32[1] = bitsandbytes.dequantize_blockwise(%down_weight_absmax, %down_weight_nested_absmax, %nested_quant_map, 256, f32)
    %down_absmax_offset: f32[1] = aten.add(%down_absmax, %down_weight_offset)
    %down_dequant: f32[1, 48] = bitsandbytes.dequantize_4bit(%down_weight_packed, %down_absmax_offset, 64, nf4, [1, 48], f32)
    %down_dequant_matrix: f32[8, 6] = aten.view(%down_dequant, [8, 6])
    %down: f32[B, S, 8] = aten.linear(%relu, %down_dequant_matrix)  # site layers.0.down: quantize, adapt r=2
    %down_lora_a: f32[B, S, 2] = aten.linear(%relu, %down_lora_A_weight)
    %down_lora_b: f32[B, S, 8] = aten.linear(%down_lora_a, %down_lora_B_weight)
    %down_scaled: f32[B, S, 8] = aten.mul(%down_lora_b, 2.0)
    %down_adapted: f32[B, S, 8] = aten.add(%down, %down_scaled)
    return %down_adapted

def epilogue(%layers_1_down_adapted: f32[B, S, 8]):
    %head_weight: f32[5, 8] = stored[head.weight]
    %head: f32[B, S, 5] = aten.linear(%layers_1_down_adapted, %head_weight)  # site head: output head stays dense; not adapted: 'all-linear' leaves the output head out
    return %head
""",
    )


@pytest.mark.parametrize("model", [Toy, ConvToy])
def test_a_pass_run_twice_changes_nothing_the_second_time(
    config: Config, model: type[nn.Module]
) -> None:
    gm = captured(model()).gm
    for run in PASSES:
        gm = run(gm, config=config).graph_module
        once = printer.text(gm)
        again = run(gm, config=config)
        assert not again.modified, run.__name__
        assert printer.text(again.graph_module) == once


@pytest.mark.parametrize("model", [Toy, ConvToy])
def test_modified_is_true_exactly_when_the_graph_changed(
    config: Config, model: type[nn.Module]
) -> None:
    gm = captured(model()).gm
    for run in PASSES:
        before = printer.text(gm)
        result = run(gm, config=config)
        gm = result.graph_module
        assert result.modified == (printer.text(gm) != before), run.__name__


def test_passes_leave_a_graph_without_linears_alone(config: Config) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.scale

    gm = captured(Plain()).gm
    before = printer.text(gm)
    for run in PASSES:
        if run is not select:
            result = run(gm, config=config)
            assert not result.modified, run.__name__
    assert printer.text(gm) == before
    with pytest.raises(ConfigError, match="matches no linear"):
        select(gm, config=config)


def test_compute_dtype_casts_stand_around_the_linear_only(config: Config) -> None:
    gm = after(adapt, config.with_(compute_dtype=torch.bfloat16), Toy(blocks=1, bias=True))
    text = printer.text(gm)
    assert (
        "%layers_0_up: bf16[B, S, 6] = aten.linear(%layers_0_up_x, %layers_0_up_dequant_matrix, %layers_0_up_bias_1)"
        in text
    )
    assert "%layers_0_up_result: f32[B, S, 6] = aten._to_copy(%layers_0_up, dtype=f32)" in text
    # The branch reads the uncast input and joins the result in the activations' dtype.
    assert "%layers_0_up_lora_a: f32[B, S, 2] = aten.linear(%x, %layers_0_up_lora_A_weight)" in text
    assert (
        "%layers_0_up_adapted: f32[B, S, 6] = aten.add(%layers_0_up_result, %layers_0_up_scaled)"
        in text
    )


def test_dropout_stands_before_lora_a_in_training_only(config: Config) -> None:
    config.lora.lora_dropout = 0.25
    trained = printer.text(after(adapt, config, Toy(blocks=1)))
    assert "%layers_0_up_lora_dropout: f32[B, S, 8] = aten.dropout(%x, 0.25, True)" in trained
    evaluated = printer.text(
        after(adapt, config.with_(training=False), Toy(blocks=1), training=False)
    )
    assert "dropout" not in evaluated


def test_storage_without_double_quantization_has_no_nested_parts(config: Config) -> None:
    single = Config(config.lora, Quantization("fp4", 32, False), torch.float32, config.output_heads)
    text = printer.text(after(quantize, single, Toy(blocks=1)))
    assert "nested" not in text
    assert (
        "dequantize_4bit(%layers_0_up_weight_packed, %layers_0_up_weight_absmax, 32, fp4, [1, 48], f32)"
        in text
    )


class Called(nn.Module):
    """One linear called twice, its weight tied to an embedding elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(8, 8)
        self.table = nn.Embedding(8, 8)
        self.tied = nn.Linear(8, 8, bias=False)
        self.tied.weight = self.table.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.tied(
            self.shared(self.shared(x)) + self.table.weight[0]
        ) + self.table(torch.zeros(3, dtype=torch.int64))
        return y


def test_a_linear_called_twice_has_one_storage_and_one_adapter(config: Config) -> None:
    gm = after(adapt, config, Called())
    stored = [n.meta["stored"] for n in gm.graph.find_nodes(op="placeholder") if "stored" in n.meta]
    assert len(stored) == len(set(stored))
    shared = [n for n in sites(gm.graph) if n.meta["site"].name == "shared"]
    assert len(shared) == 2
    assert shared[0].meta["site"] == shared[1].meta["site"]


def test_a_weight_that_another_op_reads_stays_dense_and_says_so(config: Config) -> None:
    gm = after(adapt, config, Called())
    site = next(n.meta["site"] for n in sites(gm.graph) if n.meta["site"].weight == "table.weight")
    assert not site.quantize
    assert "also read by" in site.reason


class Computed(nn.Module):
    """A linear, and a product whose weight is computed from a parameter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.plain = nn.Linear(8, 8, bias=False)
        self.doubled = nn.Linear(8, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = nn.functional.linear(self.plain(x), 2 * self.doubled.weight)
        return y


def test_a_product_that_is_not_recognised_is_skipped_and_says_so(config: Config) -> None:
    with pytest.warns(UserWarning, match="it stays dense and unadapted"):
        gm = after(select, config, Computed())
    (node,) = (n for n in gm.graph.nodes if "skipped" in n.meta)
    skipped = node.meta["skipped"]
    assert skipped.weight == "doubled.weight"
    assert skipped.reason == "the weight is computed, not a parameter (doubled.weight)"
    assert [n.meta["site"].name for n in sites(gm.graph)] == ["plain"]
    (line,) = (text for text in printer.text(gm).splitlines() if f" %{node.name}: " in text)
    assert line.endswith(f"  # site {skipped.name}: {skipped.reason}")


@pytest.mark.parametrize(
    ("field", "value", "adapted"),
    [
        ("target_modules", ["up"], {"layers.0.up", "layers.1.up"}),
        ("target_modules", r".*\.1\.(up|down)", {"layers.1.up", "layers.1.down"}),
        (
            "target_modules",
            "all-linear",
            {"layers.0.up", "layers.0.down", "layers.1.up", "layers.1.down"},
        ),
        ("target_modules", ["up", "head"], {"layers.0.up", "layers.1.up", "head"}),
        ("exclude_modules", ["down"], {"layers.0.up", "layers.1.up"}),
        ("exclude_modules", r".*\.0\..*", {"layers.1.up", "layers.1.down"}),
    ],
)
def test_targets_are_matched_as_in_peft(
    config: Config, field: str, value: object, adapted: set[str]
) -> None:
    lora = default_lora()
    lora.r = 2
    setattr(lora, field, value)
    gm = after(select, Config(lora, output_heads=config.output_heads))
    assert {n.meta["site"].name for n in sites(gm.graph) if n.meta["site"].adapt} == adapted


def test_layers_to_transform_limits_the_targets(config: Config) -> None:
    class Nested(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.model = Toy(3)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            y: dict[str, torch.Tensor] = self.model(x)
            return y

    lora = default_lora()
    lora.r, lora.target_modules, lora.layers_to_transform, lora.layers_pattern = (
        2,
        ["up"],
        [0, 2],
        "layers",
    )
    gm = after(select, Config(lora), Nested())
    adapted = {n.meta["site"].name for n in sites(gm.graph) if n.meta["site"].adapt}
    assert adapted == {"model.layers.0.up", "model.layers.2.up"}


def test_rank_and_alpha_patterns_and_rslora(config: Config) -> None:
    lora = default_lora()
    lora.r, lora.lora_alpha, lora.use_rslora = 4, 8, True
    lora.rank_pattern, lora.alpha_pattern = {"up": 1, "layers.1.down": 2}, {"up": 3}
    gm = after(select, Config(lora, output_heads=config.output_heads))
    found = {
        n.meta["site"].name: (n.meta["site"].r, n.meta["site"].scaling) for n in sites(gm.graph)
    }
    assert found["layers.0.up"] == (1, 3.0)
    assert found["layers.0.down"] == (4, 4.0)
    assert found["layers.1.down"] == (2, 8 / 2**0.5)


def test_a_target_that_matches_nothing_lists_near_names(config: Config) -> None:
    lora = default_lora()
    lora.target_modules = ["upp"]
    with pytest.raises(ConfigError, match=r"\['upp'\].*Near names: up\..*down, head, up"):
        after(select, Config(lora))


def test_one_list_entry_that_matches_nothing_is_a_warning(config: Config) -> None:
    lora = default_lora()
    lora.r, lora.target_modules = 2, ["up", "dwn"]
    with pytest.warns(UserWarning, match="'dwn' matches no linear.*Near names: down"):
        after(select, Config(lora))


def test_a_rank_larger_than_a_dimension_names_the_site(config: Config) -> None:
    lora = default_lora()
    lora.r = 7
    with pytest.raises(ConfigError, match=r"r=7 is larger .* every linear .* layers.0.up \[6, 8\]"):
        after(select, Config(lora, output_heads=config.output_heads))
    lora.target_modules = ["up"]
    with pytest.raises(
        ConfigError, match=r"r=7 is larger.*layers.0.up \[6, 8\]; accepted: at most 6"
    ):
        after(select, Config(lora, output_heads=config.output_heads))


def test_a_linear_too_small_for_the_rank_is_left_out_of_all_linear() -> None:
    lora = default_lora()
    lora.r = 6
    gm = after(select, Config(lora))  # the head is 5 x 8 and no known output head
    verdicts = {n.meta["site"].name: n.meta["site"] for n in sites(gm.graph)}
    assert verdicts["layers.0.up"].adapt
    assert verdicts["head"].quantize
    assert verdicts["head"].reason == "not adapted: r=6 is larger than its smaller dimension 5"


def test_skipped_modules_stay_dense_but_can_be_adapted(config: Config) -> None:
    skipping = Config(config.lora, Quantization(skip=("down",)), torch.float32, config.output_heads)
    gm = after(adapt, skipping)
    site = next(n.meta["site"] for n in sites(gm.graph) if n.meta["site"].name == "layers.0.down")
    assert not site.quantize
    assert site.adapt
    assert site.reason == "listed in llm_int8_skip_modules (down)"
