"""A batch with an adapter for each row, beside PEFT's over the same weights and beside each adapter alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import qlora_fx
import pytest
import torch
from qlora_fx import ConfigError, InputError
from expecttest import assert_expected_inline
from families import FAMILIES, build
from oracle import with_stored_values
from peft import LoraConfig, PeftModel
from qlora_fx.capture.cache import START
from qlora_fx.capture.cache_layers import Buffers
from qlora_fx.testing import randomize_adapter
from slow import only_slow_but
from small_models import batch, excerpt, tiny_llama

ALL = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
WIDE = LoraConfig(r=6, lora_alpha=3, use_rslora=True, target_modules="all-linear")
NAMES = ["wide", "default", "__base__", "few", "wide"]


def made(model: Any, few: list[str], backend: str = "eager", first: LoraConfig = ALL) -> Any:
    """Three adapters: of two ranks on everything, and one on a few linears."""
    qmodel: Any = qlora_fx.transform(
        copy.deepcopy(model), copy.deepcopy(first), compute_dtype=torch.float32, backend=backend
    )
    randomize_adapter(qmodel)
    narrow = LoraConfig(r=3, lora_alpha=9, lora_dropout=0.2, target_modules=few)
    for name, config in (("wide", copy.deepcopy(WIDE)), ("few", narrow)):
        qmodel.add_adapter(name, config)
        qmodel.set_adapter(name)
        randomize_adapter(qmodel)
    return qmodel.eval()


def in_peft(model: Any, qmodel: Any, folder: Path) -> Any:
    """PEFT's model over the values that our 4 bits stand for, with our saved adapters."""
    qmodel.save_pretrained(folder)
    theirs = PeftModel.from_pretrained(with_stored_values(model, qmodel), folder)
    for name in ("wide", "few"):
        theirs.load_adapter(folder / name, name)
    return theirs.eval()


def of_family(model_type: str) -> tuple[Any, dict[str, Any]]:
    family = next(f for f in FAMILIES if f.model_type == model_type)
    return build(family).eval(), family.batch(5, 21)


FEW = {"gpt2": ["c_attn"], "t5": ["q", "wo"], "vit": ["o_proj", "fc1"], "bert": ["value", "dense"]}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
@pytest.mark.parametrize(
    ("model_type", "backend"),
    only_slow_but(
        [("llama", "inductor"), ("gpt2", "eager")],
        [(m, b) for b in ("eager", "aot_eager", "inductor") for m in ("llama", *FEW)],
    ),
)
def test_each_row_has_its_adapter_as_in_peft(model_type: str, backend: str, tmp_path: Path) -> None:
    """Non-square linears with biases; GPT-2's are ``Conv1D``; ViT's input says nothing of a sequence."""
    if model_type == "llama":
        model, values = tiny_llama(2).eval(), batch(5)
    else:
        model, values = of_family(model_type)
    qmodel = made(model, FEW.get(model_type, ["q_proj", "down_proj"]), backend)
    values = {k: v for k, v in values.items() if k != "labels" or model_type == "t5"}
    theirs = in_peft(model, qmodel, tmp_path)
    with torch.no_grad():
        mine = qmodel(**values, adapter_names=NAMES).logits
        torch.testing.assert_close(
            mine, theirs(**values, adapter_names=NAMES).logits, rtol=1e-4, atol=1e-5
        )
        for row, name in enumerate(NAMES):
            qmodel.set_adapter("default" if name == "__base__" else name)
            qmodel.enable_adapters(name != "__base__")
            alone = qmodel.run_uncompiled(**values).logits
            assert_near(mine[row], alone[row])
            assert min(relative(alone[r], mine[r]) for r in range(5) if NAMES[r] != name) > 1e-3


def relative(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x - y).norm() / y.norm())


def assert_near(x: torch.Tensor, y: torch.Tensor) -> None:
    torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def llama() -> tuple[Any, Any]:
    model = tiny_llama(2).eval()
    for weight in (model.lm_head.weight, model.model.embed_tokens.weight):
        torch.nn.init.normal_(weight)  # so that adapters change which token is the likeliest
    return model, made(model, ["q_proj", "down_proj"])


def test_tokens_are_pefts(llama: tuple[Any, Any], tmp_path: Path) -> None:
    """With a cache and without, rows padded in front, beams and several sequences of a row."""
    model, qmodel = llama
    ids = batch(5, 7)["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    asked = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    theirs = in_peft(model, qmodel, tmp_path)
    for more in ({}, {"num_beams": 3, "num_return_sequences": 2}, {"use_cache": False}):
        tokens = qmodel.generate(ids, adapter_names=NAMES, **asked, **more)
        assert torch.equal(
            tokens, theirs.generate(input_ids=ids, adapter_names=NAMES, **asked, **more)
        )
    assert len({tuple(t.tolist()) for t in tokens[:, 7:]}) > 2, "they differ"


def test_an_encoder_runs_with_the_adapters_of_its_rows(tmp_path: Path) -> None:
    model, values = of_family("t5")
    qmodel = made(model, FEW["t5"])
    theirs = in_peft(model, qmodel, tmp_path)
    asked = {"input_ids": values["input_ids"], "max_new_tokens": 5, "do_sample": False}
    asked["num_beams"] = 2  # a row's beams have its adapter
    tokens = qmodel.generate(**asked, adapter_names=NAMES)
    assert torch.equal(tokens, theirs.generate(**asked, adapter_names=NAMES))
    assert set(qmodel.adapter_graphs.of_rows) == {"", "encoder"}


def test_other_names_and_other_values_capture_nothing(llama: tuple[Any, Any]) -> None:
    _, qmodel = llama
    qmodel.set_adapter("default")
    values = {k: v for k, v in batch(5).items() if k != "labels"}

    def captured() -> int:
        return sum(len(programs.captured) for programs in qmodel.all_programs)

    with torch.no_grad():
        before = qmodel(**values, adapter_names=NAMES).logits
        graphs = captured()
        assert_near(before[1], qmodel(**values).logits[1])
        graphs = captured()
        other = ["few", "few", "default", "wide", "__base__"]
        after = qmodel(**values, adapter_names=other).logits
        assert_near(after[2], qmodel(**values).logits[2])
        for _, tensor in qmodel.adapter_parameters():
            tensor.data = tensor.data * 1.5  # a change that no version counter tells of
        again = qmodel(**values, adapter_names=NAMES).logits
        assert_near(again[1], qmodel(**values).logits[1])
        assert_near(again[0], before[0])
        assert relative(again[1], before[1]) > 1e-3
        for rows in (1, 3):
            short = {k: v[:rows] for k, v in values.items()}
            logits = qmodel(**short, adapter_names=["default"] * rows).logits
            assert_near(logits, qmodel(**short).logits)
    assert captured() == graphs


def test_more_adapters_than_there_were_and_adapters_that_come_and_go() -> None:
    model = tiny_llama(1).eval()
    qmodel = made(model, ["q_proj"])
    values = {k: v for k, v in batch(5).items() if k != "labels"}
    with torch.no_grad():
        qmodel(**values, adapter_names=["default"] * 5)
        (one,) = qmodel.adapter_graphs.of_rows.values()
        assert one.base.config.slots == 2
        qmodel(**values, adapter_names=NAMES)
        (several,) = qmodel.adapter_graphs.of_rows.values()
        assert several.base.config.slots == 4
        large = LoraConfig(r=20, lora_alpha=8, target_modules=["down_proj"])
        qmodel.add_adapter("large", large)
        qmodel.set_adapter("large")
        randomize_adapter(qmodel)
        alone = qmodel.eval()(**values).logits
        logits = qmodel(**values, adapter_names=["large", *NAMES[1:]]).logits
        assert_near(logits[0], alone[0])
        qmodel.set_adapter("wide")
        assert_near(logits[4], qmodel(**values).logits[4])
        qmodel.delete_adapter("large")
        # Its slot is another's now, whose smaller rank must not see what is left of it.
        logits = qmodel(**values, adapter_names=NAMES).logits
        assert_near(logits[4], qmodel(**values).logits[4])
        with pytest.raises(InputError, match="adapter_names has 'large'; there are: default, wide"):
            qmodel(**values, adapter_names=["large"] * 5)


def test_the_graph_that_is_dumped(llama: tuple[Any, Any]) -> None:
    _, qmodel = llama
    values = {k: v for k, v in batch(5).items() if k != "labels"}
    with torch.no_grad():
        qmodel(**values, adapter_names=NAMES)
    body = qmodel.graph_modules[
        "eval(attention_mask, input_ids, slot_of_row, use_cache)"
    ].LlamaDecoderLayer
    assert_expected_inline(
        excerpt(body, "self_attn_q_proj_l"),
        """\
%self_attn_q_proj_lora_A_stack_weight: f32[4, 6, 48] = stored[self_attn.q_proj.lora_A_stack.weight]
%self_attn_q_proj_lora_B_stack_weight: f32[4, 64, 6] = stored[self_attn.q_proj.lora_B_stack.weight]
%self_attn_q_proj_lora_A_stack_of_rows: f32[B, 6, 48] = aten.index_select(%self_attn_q_proj_lora_A_stack_weight, 0, %slot_of_row)
%self_attn_q_proj_lora_B_stack_of_rows: f32[B, 64, 6] = aten.index_select(%self_attn_q_proj_lora_B_stack_weight, 0, %slot_of_row)
%self_attn_q_proj_lora_A_stack_transposed: f32[B, 48, 6] = aten.transpose(%self_attn_q_proj_lora_A_stack_of_rows, 1, 2)
%self_attn_q_proj_lora_B_stack_transposed: f32[B, 6, 64] = aten.transpose(%self_attn_q_proj_lora_B_stack_of_rows, 1, 2)
%self_attn_q_proj_lora_a: f32[B, S, 6] = aten.bmm(%input_layernorm_mul_1, %self_attn_q_proj_lora_A_stack_transposed)
%self_attn_q_proj_lora_b: f32[B, S, 64] = aten.bmm(%self_attn_q_proj_lora_a, %self_attn_q_proj_lora_B_stack_transposed)
%self_attn_q_proj_adapted: f32[B, S, 64] = aten.add(%self_attn_q_proj, %self_attn_q_proj_lora_b)
""",
    )


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["default"] * 4, "adapter_names has 4 names for 5 rows; accepted: one for each row"),
        (["default"] * 10, "adapter_names has 10 names for 5 rows"),
        ([], "adapter_names has 0 names for 5 rows"),
        ("default", "adapter_names='default'; accepted: a list of names"),
        ([None] * 5, "accepted: a list of names"),
        (["default", "fwe", "few", "few", "few"], "adapter_names has 'fwe'; there are: default, "),
    ],
)
def test_names_that_do_not_fit_are_told(llama: tuple[Any, Any], names: Any, said: str) -> None:
    _, qmodel = llama
    values = {k: v for k, v in batch(5).items() if k != "labels"}
    with pytest.raises(InputError, match=said):
        qmodel(**values, adapter_names=names)
    with pytest.raises(InputError, match=said):
        qmodel.generate(**values, adapter_names=names, max_new_tokens=2)
    qmodel.train()
    with pytest.raises(InputError, match="adapter_names in train mode; accepted: in eval mode"):
        qmodel(**values, adapter_names=names)
    qmodel.eval()


def test_without_adapters_names_change_nothing(llama: tuple[Any, Any]) -> None:
    _, qmodel = llama
    values = {k: v for k, v in batch(5).items() if k != "labels"}
    with torch.no_grad(), qmodel.disable_adapter():
        assert torch.equal(qmodel(**values, adapter_names=NAMES).logits, qmodel(**values).logits)


def test_what_has_no_row_is_told() -> None:
    """Tokens of experts lie in the order of the experts; a bias that trains is all rows'."""
    model, values = of_family("mixtral")
    qmodel: Any = qlora_fx.transform(model, copy.deepcopy(ALL), backend="eager").eval()
    del values["labels"]
    with pytest.raises(InputError, match=r"cannot be used with adapters of model\.layers\.0\.mlp"):
        qmodel(**values, adapter_names=["default"] * 5)
    few = LoraConfig(r=4, target_modules=["q_proj"])
    qmodel = qlora_fx.transform(of_family("mixtral")[0], few, backend="eager").eval()
    randomize_adapter(qmodel)
    with torch.no_grad():
        assert_near(qmodel(**values, adapter_names=["default"] * 5).logits, qmodel(**values).logits)
    biases = LoraConfig(r=4, target_modules=["q_proj"], bias="all")
    qmodel = qlora_fx.transform(tiny_llama(1), biases, backend="eager").eval()
    with pytest.raises(ConfigError, match=r"q_proj\.bias.* trained beside the adapters"):
        qmodel(batch(2)["input_ids"], adapter_names=["default"] * 2)


def test_rows_of_a_ring(llama: tuple[Any, Any]) -> None:
    """As ``cuda_graphs=True`` generates: a cache of fixed room, whose shapes come again."""
    _, qmodel = llama
    ids = batch(5, 7)["input_ids"]
    asked = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    tokens = qmodel.generate(ids, adapter_names=NAMES, **asked)
    programs = qmodel.adapter_graphs.for_rows()
    programs.buffers = Buffers()
    try:
        for _ in range(2):  # the second finds the buffers of the first
            assert torch.equal(qmodel.generate(ids, adapter_names=NAMES, **asked), tokens)
    finally:
        programs.buffers = None
    assert any(START in str(signature) for signature in programs.captured)


def test_in_bfloat16() -> None:
    """The branch's products are in the activations' dtype, what a slot holds in float32."""
    model = tiny_llama(1).to(torch.bfloat16).eval()
    qmodel: Any = qlora_fx.transform(
        model, copy.deepcopy(ALL), compute_dtype=torch.bfloat16, backend="eager"
    ).eval()
    qmodel.add_adapter("wide", copy.deepcopy(WIDE))
    for seed, name in enumerate(("default", "wide")):
        qmodel.set_adapter(name)
        randomize_adapter(qmodel, seed=seed)
    values = {k: v for k, v in batch(2).items() if k != "labels"}
    with torch.no_grad():
        mine = qmodel(**values, adapter_names=["default", "wide"]).logits
        for row, name in enumerate(("default", "wide")):
            qmodel.set_adapter(name)
            assert relative(mine[row], qmodel(**values).logits[row]) < 0.02
    assert mine.dtype == torch.bfloat16


def test_a_call_within_generation_does_not_change_whose_tokens_they_are(llama: Any) -> None:
    _, qmodel = llama
    ids = batch(5, 7)["input_ids"]

    def within(seen: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        with pytest.raises(InputError, match="adapter_names within a generate"):
            qmodel(seen, adapter_names=["default"] * 5)
        qmodel.generate(seen, max_new_tokens=1, do_sample=False)  # of the same rows
        with qmodel.disable_adapter():
            qmodel(seen)
        return scores

    asked = {"max_new_tokens": 2, "do_sample": False, "eos_token_id": None, "adapter_names": NAMES}
    assert torch.equal(
        qmodel.generate(ids, **asked, logits_processor=[within]), qmodel.generate(ids, **asked)
    )
