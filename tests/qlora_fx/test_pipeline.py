"""The runner: the whole pipeline's golden, invariants that break on hand-broken graphs, logs and dumps."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from expecttest import assert_expected_inline
from qlora_fx.capture.skeleton import Skeleton
from qlora_fx.compiler import invariants, pipeline, printer
from qlora_fx.compiler.compile import decide
from qlora_fx.config import Config, Quantization, default_lora
from qlora_fx.errors import GraphError
from qlora_fx.passes.graph.nodes import aten, call, mark, sites
from qlora_fx.passes.graph.site import Layout, Site, Skipped
from small_models import Toy, batch, captured, tiny_llama
from torch import fx, nn


def test_whole_pipeline_on_a_one_layer_llama() -> None:
    lora = default_lora()
    lora.r, lora.lora_alpha = 4, 8
    model = tiny_llama(1, attention_bias=False, mlp_bias=False)
    inputs = batch() | {"use_cache": False}
    capture = Skeleton(model).capture(inputs, training=True, dtype=torch.float32)
    result = pipeline.run(
        capture.gm, Config(lora, Quantization(), output_heads=frozenset({"lm_head.weight"}))
    )
    # The site lines and what they read; masks and rotary tables are transformers' own and may change.
    text = printer.text(result.gm)
    lines = [
        line
        for line in text.splitlines()
        if "self_attn_q_proj" in line or "mlp_down_proj" in line or "lm_head" in line
    ]
    assert_expected_inline(
        "\n".join(lines),
        """\
    %lm_head_weight: f32[101, 48] = stored[lm_head.weight]
    %model_layers_0_self_attn_q_proj_weight_packed: u8[1536, 1] = stored[model.layers.0.self_attn.q_proj.weight]
    %model_layers_0_self_attn_q_proj_weight_absmax: u8[48] = stored[model.layers.0.self_attn.q_proj.weight.absmax]
    %model_layers_0_self_attn_q_proj_weight_nested_absmax: f32[1] = stored[model.layers.0.self_attn.q_proj.weight.nested_absmax]
    %model_layers_0_self_attn_q_proj_weight_offset: f32[] = stored[model.layers.0.self_attn.q_proj.weight.offset]
    %model_layers_0_mlp_down_proj_weight_packed: u8[1920, 1] = stored[model.layers.0.mlp.down_proj.weight]
    %model_layers_0_mlp_down_proj_weight_absmax: u8[60] = stored[model.layers.0.mlp.down_proj.weight.absmax]
    %model_layers_0_mlp_down_proj_weight_nested_absmax: f32[1] = stored[model.layers.0.mlp.down_proj.weight.nested_absmax]
    %model_layers_0_mlp_down_proj_weight_offset: f32[] = stored[model.layers.0.mlp.down_proj.weight.offset]
    %model_layers_0_self_attn_q_proj_lora_A_weight: f32[4, 48] = adapter[model.layers.0.self_attn.q_proj.lora_A.weight]
    %model_layers_0_self_attn_q_proj_lora_B_weight: f32[64, 4] = adapter[model.layers.0.self_attn.q_proj.lora_B.weight]
    %model_layers_0_mlp_down_proj_lora_A_weight: f32[4, 80] = adapter[model.layers.0.mlp.down_proj.lora_A.weight]
    %model_layers_0_mlp_down_proj_lora_B_weight: f32[48, 4] = adapter[model.layers.0.mlp.down_proj.lora_B.weight]
    %model_layers_0_self_attn_q_proj_absmax: f32[48] = bitsandbytes.dequantize_blockwise(%model_layers_0_self_attn_q_proj_weight_absmax, %model_layers_0_self_attn_q_proj_weight_nested_absmax, %nested_quant_map, 256, f32)
    %model_layers_0_self_attn_q_proj_absmax_offset: f32[48] = aten.add(%model_layers_0_self_attn_q_proj_absmax, %model_layers_0_self_attn_q_proj_weight_offset)
    %model_layers_0_self_attn_q_proj_dequant: f32[48, 64] = bitsandbytes.dequantize_4bit(%model_layers_0_self_attn_q_proj_weight_packed, %model_layers_0_self_attn_q_proj_absmax_offset, 64, nf4, [48, 64], f32)
    %model_layers_0_self_attn_q_proj_dequant_matrix: f32[64, 48] = aten.view(%model_layers_0_self_attn_q_proj_dequant, [64, 48])
    %model_layers_0_self_attn_q_proj: f32[B, S, 64] = aten.linear(%model_layers_0_input_layernorm_mul_1, %model_layers_0_self_attn_q_proj_dequant_matrix)  # site model.layers.0.self_attn.q_proj: quantize, adapt r=4
    %model_layers_0_self_attn_q_proj_lora_stack: f32[12, 48] = aten.cat([%model_layers_0_self_attn_q_proj_lora_A_weight, %model_layers_0_self_attn_k_proj_lora_A_weight, %model_layers_0_self_attn_v_proj_lora_A_weight])
    %model_layers_0_self_attn_q_proj_lora_a_all: f32[B, S, 12] = aten.linear(%model_layers_0_input_layernorm_mul_1, %model_layers_0_self_attn_q_proj_lora_stack)
    %model_layers_0_self_attn_q_proj_lora_a_part: f32[B, S, 4] = aten.slice(%model_layers_0_self_attn_q_proj_lora_a_all, -1, 0, 4)
    %model_layers_0_self_attn_k_proj_lora_a_part: f32[B, S, 4] = aten.slice(%model_layers_0_self_attn_q_proj_lora_a_all, -1, 4, 8)
    %model_layers_0_self_attn_v_proj_lora_a_part: f32[B, S, 4] = aten.slice(%model_layers_0_self_attn_q_proj_lora_a_all, -1, 8, 12)
    %model_layers_0_self_attn_q_proj_lora_b: f32[B, S, 64] = aten.linear(%model_layers_0_self_attn_q_proj_lora_a_part, %model_layers_0_self_attn_q_proj_lora_B_weight)
    %model_layers_0_self_attn_q_proj_scaled: f32[B, S, 64] = aten.mul(%model_layers_0_self_attn_q_proj_lora_b, 2.0)
    %model_layers_0_self_attn_q_proj_adapted: f32[B, S, 64] = aten.add(%model_layers_0_self_attn_q_proj, %model_layers_0_self_attn_q_proj_scaled)
    %model_layers_0_self_attn_view: f32[B, S, 4, 16] = aten.view(%model_layers_0_self_attn_q_proj_adapted, [%sym_size, %sym_size_1, -1, 16])
    %model_layers_0_mlp_down_proj_absmax: f32[60] = bitsandbytes.dequantize_blockwise(%model_layers_0_mlp_down_proj_weight_absmax, %model_layers_0_mlp_down_proj_weight_nested_absmax, %nested_quant_map, 256, f32)
    %model_layers_0_mlp_down_proj_absmax_offset: f32[60] = aten.add(%model_layers_0_mlp_down_proj_absmax, %model_layers_0_mlp_down_proj_weight_offset)
    %model_layers_0_mlp_down_proj_dequant: f32[60, 64] = bitsandbytes.dequantize_4bit(%model_layers_0_mlp_down_proj_weight_packed, %model_layers_0_mlp_down_proj_absmax_offset, 64, nf4, [60, 64], f32)
    %model_layers_0_mlp_down_proj_dequant_matrix: f32[48, 80] = aten.view(%model_layers_0_mlp_down_proj_dequant, [48, 80])
    %model_layers_0_mlp_down_proj: f32[B, S, 48] = aten.linear(%model_layers_0_mlp_mul, %model_layers_0_mlp_down_proj_dequant_matrix)  # site model.layers.0.mlp.down_proj: quantize, adapt r=4
    %model_layers_0_mlp_down_proj_lora_a: f32[B, S, 4] = aten.linear(%model_layers_0_mlp_mul, %model_layers_0_mlp_down_proj_lora_A_weight)
    %model_layers_0_mlp_down_proj_lora_b: f32[B, S, 48] = aten.linear(%model_layers_0_mlp_down_proj_lora_a, %model_layers_0_mlp_down_proj_lora_B_weight)
    %model_layers_0_mlp_down_proj_scaled: f32[B, S, 48] = aten.mul(%model_layers_0_mlp_down_proj_lora_b, 2.0)
    %model_layers_0_mlp_down_proj_adapted: f32[B, S, 48] = aten.add(%model_layers_0_mlp_down_proj, %model_layers_0_mlp_down_proj_scaled)
    %model_layers_0_add_1: f32[B, S, 48] = aten.add(%model_layers_0_add, %model_layers_0_mlp_down_proj_adapted)
    %lm_head: f32[B, S, 101] = aten.linear(%model_norm_mul_1, %lm_head_weight)  # site lm_head: output head stays dense; not adapted: 'all-linear' leaves the output head out
    %view: f32[B*S, 101] = aten.view(%lm_head, [-1, 101])
    return (%cross_entropy_loss, %lm_head)""",
    )


def test_every_value_is_what_its_kernel_computes() -> None:
    for compute in (torch.float32, torch.bfloat16):
        capture = Skeleton(tiny_llama(2)).capture(
            batch() | {"use_cache": False}, training=True, dtype=torch.float32
        )
        lora = default_lora()
        lora.lora_dropout = 0.1
        result = pipeline.run(capture.gm, Config(lora, compute_dtype=compute))
        for graph in (
            result.flat,
            *(m for m in result.gm.children() if isinstance(m, fx.GraphModule)),
        ):
            assert list(invariants.values_match_fake_kernels(graph)) == []


def finished(config: Config) -> fx.GraphModule:
    stages = tuple(s for s in pipeline.PIPELINE if s.name != "outline")
    return pipeline.run(captured(Toy(bias=True)).gm, config, stages=stages).gm


def drop_value(gm: fx.GraphModule) -> None:
    del next(iter(gm.graph.find_nodes(op="call_function", target=aten.relu.default))).meta["val"]


def hold_a_tensor(gm: fx.GraphModule) -> None:
    gm.register_parameter("weight", nn.Parameter(torch.ones(1)))


def read_an_attribute(gm: fx.GraphModule) -> None:
    gm.weight = nn.Parameter(torch.ones(1))
    with gm.graph.inserting_before(next(iter(sites(gm.graph)))):
        node = gm.graph.get_attr("weight")
    node.meta["val"] = None


def add_an_addmm(gm: fx.GraphModule) -> None:
    relu = next(iter(gm.graph.find_nodes(op="call_function", target=aten.relu.default)))
    weight = next(n for n in gm.graph.nodes if n.meta.get("stored") == "head.weight")
    bias = next(n for n in gm.graph.nodes if n.meta.get("stored") == "layers.0.down.bias")
    with gm.graph.inserting_after(relu):
        node = gm.graph.call_function(aten.addmm.default, (bias, relu, weight))
    node.meta["val"] = relu.meta["val"]


def forget_a_verdict(gm: fx.GraphModule) -> None:
    del next(iter(sites(gm.graph))).meta["site"]


def give_no_reason(gm: fx.GraphModule) -> None:
    node = next(n for n in sites(gm.graph) if n.meta["site"].reason)
    node.meta["site"] = replace(node.meta["site"], reason="")


def keep_the_dense_weight(gm: fx.GraphModule) -> None:
    node = next(n for n in gm.graph.nodes if n.meta.get("format") == "4bit")
    with gm.graph.inserting_after(node):
        dense = gm.graph.placeholder("dense")
    dense.meta.update(val=node.meta["val"], stored=node.meta["stored"])


def read_a_dense_weight(gm: fx.GraphModule) -> None:
    node = next(n for n in sites(gm.graph) if n.meta["site"].quantize)
    node.replace_input_with(
        node.args[1], next(n for n in gm.graph.nodes if n.meta.get("stored") == "head.weight")
    )


def train_a_frozen_weight(gm: fx.GraphModule) -> None:
    next(n for n in gm.graph.nodes if n.meta.get("stored") == "head.weight").meta["trainable"] = (
        True
    )


def freeze_an_adapter(gm: fx.GraphModule) -> None:
    del next(n for n in gm.graph.nodes if n.meta.get("trainable")).meta["trainable"]


def cut_a_branch(gm: fx.GraphModule) -> None:
    adapted = next(n for n in gm.graph.nodes if "branch_of" in n.meta)
    adapted.replace_all_uses_with(adapted.args[0])


@pytest.mark.parametrize(
    ("spoil", "broken"),
    [
        (drop_value, "every_node_has_a_value"),
        (hold_a_tensor, "graph_holds_no_tensor"),
        (read_an_attribute, "graph_holds_no_tensor"),
        (add_an_addmm, "only_canonical_linears_multiply_by_weights"),
        (forget_a_verdict, "every_linear_has_a_verdict"),
        (give_no_reason, "every_linear_has_a_verdict"),
        (keep_the_dense_weight, "no_dense_copy_of_a_selected_weight"),
        (read_a_dense_weight, "no_dense_copy_of_a_selected_weight"),
        (train_a_frozen_weight, "only_adapters_are_trainable"),
        (freeze_an_adapter, "only_adapters_are_trainable"),
        (cut_a_branch, "every_adapted_site_has_a_live_branch"),
    ],
)
def test_a_broken_graph_is_refused(
    config: Config, spoil: Callable[[fx.GraphModule], None], broken: str
) -> None:
    gm = finished(config)
    held = [i for s in pipeline.PIPELINE for i in s.establishes] + list(pipeline.CAPTURED)
    pipeline.check(gm, held, config, "test")
    spoil(gm)
    with pytest.raises(GraphError, match=broken):
        pipeline.check(gm, held, config, "test")


def test_two_equal_bodies_are_refused(config: Config) -> None:
    gm = pipeline.run(captured().gm, config).gm
    block = gm.get_submodule("ToyBlock")
    assert isinstance(block, fx.GraphModule)
    gm.add_module("ToyBlock_again", fx.GraphModule(nn.Module(), block.graph))
    with pytest.raises(GraphError, match="ToyBlock and ToyBlock_again are the same"):
        pipeline.check(gm, [invariants.each_distinct_body_occurs_once], config, "test")


def test_a_violation_shows_the_graph_around_the_node(config: Config) -> None:
    gm = finished(config)
    forget_a_verdict(gm)
    with pytest.raises(GraphError) as caught:
        pipeline.check(gm, [invariants.every_linear_has_a_verdict], config, "adapt")
    assert "after adapt" in str(caught.value)
    assert "> %layers_0_up: f32[B, S, 6] = aten.linear" in caught.value.__notes__[0]


def test_a_pass_that_raises_is_named_in_a_note(config: Config) -> None:
    def fails(gm: fx.GraphModule, *, config: Config) -> None:
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom") as caught:
        pipeline.run(captured().gm, config, stages=(pipeline.Stage(fails),), title="train")  # type: ignore[arg-type]
    assert caught.value.__notes__ == ["raised by the pass fails on train"]


def test_a_stage_can_be_left_out_by_name(config: Config) -> None:
    whole = pipeline.run(captured().gm, config).gm
    flat = pipeline.run(captured().gm, config.with_(disabled=frozenset({"outline"}))).gm
    assert list(whole.graph.find_nodes(op="call_module"))
    assert not list(flat.graph.find_nodes(op="call_module"))


def test_each_stage_is_logged_as_a_diff(config: Config, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="qlora_fx"):
        pipeline.run(captured().gm, config, title="train")
    messages = [r.getMessage() for r in caplog.records if r.name == "qlora_fx"]
    assert [m.split("\n")[0] for m in messages] == [
        f"train: {stage}" for stage in ("capture", *(s.name for s in pipeline.PIPELINE))
    ]
    (adapt,) = (m for m in messages if m.startswith("train: adapt\n"))
    assert (
        "+    %layers_0_up_lora_a: f32[B, S, 2] = aten.linear(%x, %layers_0_up_lora_A_weight)"
        in adapt
    )


def test_the_graph_after_every_stage_is_dumped(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QLORA_FX_DUMP", str(tmp_path / "dump"))
    pipeline.run(captured().gm, config, title="train")
    names = sorted(p.name for p in (tmp_path / "dump").iterdir())
    stages = ("capture", *(s.name for s in pipeline.PIPELINE))
    assert names == [f"train.{number:02}_{stage}.txt" for number, stage in enumerate(stages)]
    last = tmp_path / "dump" / names[-1]
    assert "def ToyBlock(" in last.read_text(encoding="ascii")


def test_the_printer_names_nothing_by_number_that_a_neighbour_renumbers(config: Config) -> None:
    gm = finished(config)
    before = printer.text(gm).splitlines()
    relu = next(iter(gm.graph.find_nodes(op="call_function", target=aten.relu.default)))
    relu.replace_all_uses_with(relu.args[0])
    gm.graph.erase_node(relu)
    after = printer.text(gm).splitlines()
    changed = [line for line in before if line not in after]
    assert len(changed) == 3, changed  # the node itself and its two readers


def test_new_nodes_belong_to_the_module_they_stand_for(config: Config) -> None:
    gm = finished(config)
    branch = next(n for n in gm.graph.nodes if n.name == "layers_0_up_lora_a")
    assert branch.meta["module"] == "layers.0.up"
    assert list(branch.meta["nn_module_stack"].values())[-1][0] == "layers.0.up"
    with gm.graph.inserting_after(branch):
        extra = call(gm.graph, aten.relu.default, (branch,), name="extra", like=branch)
    assert extra.meta["val"].shape == branch.meta["val"].shape


def test_blocks_that_differ_get_bodies_of_their_own(config: Config) -> None:
    model = Toy(4)
    model.layers[2].up = nn.Linear(8, 6, bias=True)
    gm = pipeline.run(captured(model).gm, config).gm
    called = [str(n.target) for n in gm.graph.find_nodes(op="call_module")]
    assert called == ["ToyBlock", "ToyBlock", "ToyBlock_2", "ToyBlock", "epilogue"]


def test_a_dequantized_weight_outside_of_blocks_stays_with_its_reader() -> None:
    lora = default_lora()
    lora.r, lora.target_modules = 2, ["up", "head"]
    gm = pipeline.run(
        captured().gm, Config(lora)
    ).gm  # without a known output head it is quantized too
    assert [str(n.target) for n in gm.graph.find_nodes(op="call_module")] == [
        "ToyBlock",
        "ToyBlock",
        "epilogue",
    ]
    epilogue = gm.get_submodule("epilogue")
    assert isinstance(epilogue, fx.GraphModule)
    assert "head_dequant" in {n.name for n in epilogue.graph.nodes}


def test_blocks_that_feed_each_other_in_a_circle_stay_flat(config: Config) -> None:
    class Crossed(Toy):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            first, second = self.layers
            a = first.up(x)
            return {"y": self.head(first.down(second.up(second.down(a))))}

    gm = pipeline.run(captured(Crossed()).gm, config).gm
    assert not list(gm.graph.find_nodes(op="call_module"))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_of_a_weight_that_is_read_both_ways_the_site_counts(order: tuple[int, int]) -> None:
    site = Site("up", "up.weight", "linear", Layout((6, 8), (0, 1), (6, 8)), adapt=True, flops=2)
    found = (Skipped("up", "up.weight", "mul", "unrecognised", flops=1), site)
    graph = fx.Graph()
    at = graph.placeholder("x")
    for i in order:
        at = graph.call_function(torch.relu, (at,))
        mark(at, found[i])
    graph.output(at)
    assert decide(fx.GraphModule(nn.Module(), graph)) == {"up": replace(site, flops=3)}
