"""The output head and the input embedding in 4 bits, by choice."""

from __future__ import annotations

import copy
from typing import Any

import qlora_fx
import pytest
import torch
from peft import LoraConfig
from qlora_fx.errors import ConfigError
from qlora_fx.testing.check import compare, dense_weights, randomize_adapter
from small_models import VOCABULARY, batch, tiny_llama
from torch import fx, nn
from transformers import BitsAndBytesConfig

EMBEDDING = "model.embed_tokens.weight"
BOTH = ("head", "embeddings")


def transformed(model: Any, **options: Any) -> Any:
    lora = LoraConfig(r=2, lora_alpha=4, target_modules=options.pop("targets", "all-linear"))
    settings = {"backend": "eager", "compute_dtype": torch.float32} | options
    return qlora_fx.transform(model, lora, **settings)


def rows(qmodel: Any) -> dict[str, Any]:
    return {row.name: row for row in qmodel.explain()}


@pytest.mark.parametrize(
    ("tied", "backend"),
    [
        (False, "eager"),
        pytest.param(True, "eager", marks=pytest.mark.slow),
        (True, "aot_eager"),
        pytest.param(True, "inductor", marks=pytest.mark.slow),
        pytest.param(False, "inductor", marks=pytest.mark.slow),
    ],
)
def test_head_and_embedding_in_4_bits_are_right(tied: bool, backend: str) -> None:
    model = tiny_llama(tie_word_embeddings=tied)
    qmodel = transformed(copy.deepcopy(model), also_quantize=BOTH, backend=backend)
    randomize_adapter(qmodel)
    report = compare(model, qmodel, batch())
    assert report.passed, str(report)
    found = rows(qmodel)
    assert found["lm_head"].quantized
    assert found["model.embed_tokens (lookup)"].quantized
    state = qmodel.state_dict()
    assert not [k for k, t in state.items() if t.is_floating_point() and VOCABULARY in t.shape]


@pytest.mark.parametrize(
    ("double_quant", "hidden", "storage"),
    [(True, 48, "uint8"), (False, 48, "uint8"), (True, 64, "uint8"), (True, 48, "bfloat16")],
)
def test_looked_up_rows_are_bitwise_those_of_the_whole_table(
    double_quant: bool, hidden: int, storage: str
) -> None:
    """48 is not a multiple of the block of 64: blocks go across rows."""
    vocabulary = 100 if storage == "bfloat16" else VOCABULARY  # bytes must fill whole elements
    model = tiny_llama(hidden_size=hidden, vocab_size=vocabulary)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_quant_storage=storage,
        bnb_4bit_compute_dtype=torch.float32,
    )
    qmodel = transformed(copy.deepcopy(model), also_quantize=BOTH, quantization=quantization)
    table = dense_weights(model, qmodel.base)[EMBEDDING]
    prologue = qmodel.graph_module.get_submodule("prologue")
    assert isinstance(prologue, fx.GraphModule)
    (lookup,) = (n for n in prologue.graph.nodes if "site" in n.meta)
    values = [getattr(n.meta.get("val"), "shape", ()) for n in prologue.graph.nodes]
    assert str(list(table.shape)) not in {str(list(v)) for v in values}, "the table is dense"
    rows = Lookup(prologue, lookup, qmodel.base.store.tensors).run(torch.arange(vocabulary))
    assert torch.equal(rows, table)


class Lookup:
    """Runs the part of a graph that one node needs, on ids."""

    def __init__(self, gm: fx.GraphModule, node: fx.Node, stored: Any) -> None:
        graph = fx.Graph()
        mapping: dict[fx.Node, fx.Node] = {}
        needed = {node}
        for n in reversed(gm.graph.nodes):
            if n in needed:
                needed.update(n.all_input_nodes)
        self.inputs = [n for n in gm.graph.nodes if n in needed and n.op == "placeholder"]
        for n in gm.graph.nodes:
            if n in needed:
                mapping[n] = graph.node_copy(n, lambda m: mapping[m])
        graph.output(mapping[node])
        self.gm, self.stored = fx.GraphModule(nn.Module(), graph), stored

    def run(self, ids: torch.Tensor) -> torch.Tensor:
        values = [self.stored[n.meta["stored"]] if "stored" in n.meta else ids for n in self.inputs]
        result: torch.Tensor = self.gm(*values)
        return result


def test_only_the_head_of_an_untied_model() -> None:
    qmodel = transformed(tiny_llama(), also_quantize=["head"])
    assert rows(qmodel)["lm_head"].quantized
    assert not rows(qmodel)["lm_head"].adapted
    assert EMBEDDING in qmodel.base.store.root.state_dict()


def test_a_tied_head_needs_its_embedding_too() -> None:
    qmodel = transformed(tiny_llama(tie_word_embeddings=True), also_quantize=["head"])
    row = rows(qmodel)["lm_head"]
    assert not row.quantized
    assert "also_quantize=['embeddings']" in row.reason
    qmodel = transformed(tiny_llama(tie_word_embeddings=True), also_quantize=["embeddings"])
    row = rows(qmodel)["model.embed_tokens (lookup)"]
    assert not row.quantized
    assert "tied to the output head" in row.reason


def test_a_head_named_as_a_target_is_adapted() -> None:
    model = tiny_llama(tie_word_embeddings=True)
    qmodel = transformed(copy.deepcopy(model), targets=["lm_head", "q_proj"], also_quantize=BOTH)
    assert (rows(qmodel)["lm_head"].quantized, rows(qmodel)["lm_head"].adapted) == (True, True)
    randomize_adapter(qmodel)
    report = compare(model, qmodel, batch())
    assert report.passed, str(report)


def test_an_embedding_as_a_target_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot be adapted: an embedding"):
        transformed(tiny_llama(), targets=["embed_tokens", "q_proj"])


def test_an_unknown_role_is_quoted() -> None:
    with pytest.raises(ConfigError, match=r"also_quantize has 'heads'; accepted: 'head'"):
        transformed(tiny_llama(), also_quantize=["heads"])


def test_bytes_add_up_to_what_is_held() -> None:
    for options in ({}, {"also_quantize": BOTH}):
        qmodel = transformed(tiny_llama(tie_word_embeddings=True), **options)
        held = {t.data_ptr(): t.nbytes for t in qmodel.base.store.tensors.values()}
        assert qmodel.explain().totals["held_bytes"] == sum(held.values())
