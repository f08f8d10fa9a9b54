"""The transformed model behaves as the user's model; compiled unless a test says otherwise."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from contextlib import nullcontext
from typing import Any

import qlora_fx
import pytest
import torch
from qlora_fx import ConfigError, InputError, ModelError
from oracle import Float64, ours, random_adapter, relative_error, step, truth
from peft import LoraConfig
from qlora_fx.passes.lowering.compiled_body import CompiledBody
from qlora_fx.testing.check import compare, randomize_adapter
from slow import only_slow_but
from small_models import VOCABULARY, batch, tiny_gpt2, tiny_llama
from torch import nn
from transformers import BitsAndBytesConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}


@pytest.fixture(scope="module")
def adapted() -> tuple[Any, qlora_fx.QLoRAModel, dict[str, torch.Tensor]]:
    """A compiled model with a random adapter, the model it came from, and the adapter."""
    model = tiny_llama()
    adapter = random_adapter(model, 4, scale=0.1)
    qmodel, _ = ours(model, adapter, LoraConfig(**LORA))
    return model, qmodel, adapter


def true_logits(model: nn.Module, adapter: dict[str, torch.Tensor], inputs: Any) -> torch.Tensor:
    dense, _ = truth(model, adapter, 2.0)
    with Float64(), torch.no_grad():
        return dense.eval()(**inputs).logits  # type: ignore[no-any-return]


def test_output_class_and_fields_are_the_models_own(adapted: Any) -> None:
    model, qmodel, _ = adapted
    out = qmodel(**batch(), return_logits=True)
    theirs = model(**batch(), use_cache=False)
    assert type(out) is CausalLMOutputWithPast
    assert list(out.keys()) == list(theirs.keys())
    assert out.logits.shape == theirs.logits.shape
    assert qmodel.config is not None
    assert qmodel.config.to_dict() == model.config.to_dict()
    assert qmodel.device == torch.device("cpu")
    assert qmodel.dtype == torch.float32


def test_only_adapters_train_and_all_of_them_get_gradients(adapted: Any) -> None:
    _, qmodel, _ = adapted
    trainable = {id(p) for p in qmodel.parameters() if p.requires_grad}
    assert trainable == {id(p) for _, p in qmodel.adapter_parameters()}
    assert len(trainable) == 2 * 7 * 2
    qmodel.train()
    qmodel.zero_grad()
    qmodel(**batch()).loss.backward()
    for name, p in qmodel.adapter_parameters():
        assert p.grad is not None, name
        assert float(p.grad.norm()) > 0, name


def compilations(qmodel: qlora_fx.QLoRAModel) -> int:
    """How many times a body was compiled so far, over all captures."""
    bodies = [m for p in qmodel.programs for m in p.run.modules() if isinstance(m, CompiledBody)]  # type: ignore[attr-defined]
    return sum(body.compilations for body in bodies)


@pytest.mark.parametrize(("rows", "tokens"), [(2, 21), (1, 9), (5, 1), (1, 1), (4, 40), (3, 7)])
def test_any_batch_and_sequence_is_right_without_capturing_or_compiling_again(
    adapted: Any, rows: int, tokens: int
) -> None:
    model, qmodel, adapter = adapted
    qmodel.train()
    qmodel(**batch()).loss.backward()
    qmodel(**batch(), return_logits=True)
    qmodel.zero_grad()
    compiled = compilations(qmodel)
    assert compiled >= 4  # prologue, first and later blocks, epilogue
    graphs = len(qmodel.graph_modules)
    inputs = batch(rows, tokens, seed=rows)
    out = qmodel(**inputs)
    if tokens > 1:
        out.loss.backward()
    out = qmodel(**inputs, return_logits=True)
    assert relative_error(out.logits, true_logits(model, adapter, inputs)) < 2e-6
    assert len(qmodel.graph_modules) == graphs
    assert compilations(qmodel) == compiled


def test_other_arguments_are_captured_lazily_over_the_same_weights(adapted: Any) -> None:
    model, _, adapter = adapted
    qmodel, _ = ours(model, adapter, LoraConfig(**LORA), backend="eager")
    ids = batch()["input_ids"]
    held = sum(t.nbytes for _, t in qmodel.base.store.items())
    position = torch.arange(ids.shape[1])[None]
    for inputs in (
        {"input_ids": ids},
        {"input_ids": ids, "position_ids": position + 3},
        {"input_ids": ids, "labels": ids},
        {"input_ids": ids, "logits_to_keep": 2},
    ):
        out = qmodel(**inputs, return_logits=True)
        assert ("loss" in out) == ("labels" in inputs)
        assert relative_error(out.logits, true_logits(model, adapter, inputs)) < 2e-6, list(inputs)
    assert sum(t.nbytes for _, t in qmodel.base.store.items()) == held
    # Positional arguments and the default flags share captures with the keywords above.
    graphs = len(qmodel.graph_modules)
    qmodel(ids)
    qmodel(ids, use_cache=False, return_dict=True)
    assert len(qmodel.graph_modules) == graphs


@pytest.mark.parametrize("backend", only_slow_but(["eager"], ["eager", "inductor"]))
def test_eval_after_train_after_eval_is_right_each_time(backend: str) -> None:
    model = tiny_llama()
    adapter = random_adapter(model, 4, scale=0.1)
    qmodel, params = ours(model, adapter, LoraConfig(**LORA, lora_dropout=0.5), backend=backend)
    inputs = batch()
    right = true_logits(model, adapter, inputs)
    dense, true_params = truth(model, adapter, 2.0)
    with Float64():
        _, true_grads = step(dense, true_params, inputs)
    for _ in range(2):
        qmodel.eval()
        logits, grads = step(qmodel, params, inputs)
        assert relative_error(logits, right) < 2e-6
        for name in true_grads:
            assert relative_error(grads[name], true_grads[name]) < 1e-4, name
        qmodel.train()
        logits, grads = step(qmodel, params, inputs)
        assert relative_error(logits, right) > 1e-3, "dropout is not active in training"
        assert all(float(g.norm()) > 0 for g in grads.values())


def test_gradients_go_also_those_of_what_a_user_puts_beside() -> None:
    qmodel: Any = qlora_fx.transform(tiny_llama(1), backend="eager")
    qmodel.value = torch.nn.Linear(2, 1)
    qmodel.value(torch.ones(2)).backward()
    qmodel(**batch()).loss.backward()
    trained = [p for p in qmodel.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in trained)
    qmodel.zero_grad(set_to_none=False)
    assert not any(bool(p.grad.any()) for p in trained)
    qmodel.zero_grad()
    assert all(p.grad is None for p in trained)


def test_dropout_draws_anew_each_step_and_scales_by_its_survivors() -> None:
    model = tiny_llama(1)
    adapter = random_adapter(
        model, 4, scale=0.04
    )  # small: the network is near linear in its branches
    qmodel, _ = ours(model, adapter, LoraConfig(**LORA, lora_dropout=0.3), backend="aot_eager")
    inputs = batch()
    with torch.no_grad():
        draws = torch.stack([qmodel(**inputs, return_logits=True).logits for _ in range(200)])
    assert not torch.equal(draws[0], draws[1])
    right = true_logits(model, adapter, inputs)
    assert relative_error(draws.mean(0), right) < 0.15 * relative_error(draws[0], right)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_adapter_with_zero_b_leaves_the_quantized_model_unchanged_bitwise(backend: str) -> None:
    qmodel = qlora_fx.transform(tiny_llama(), LoraConfig(**LORA), backend=backend)
    with torch.no_grad():
        adapted = qmodel(**batch(), return_logits=True).logits
        with qmodel.disable_adapter():
            plain = qmodel(**batch(), return_logits=True).logits
    assert torch.equal(adapted, plain)


@pytest.mark.parametrize("backend", only_slow_but(["eager"], ["eager", "inductor"]))
def test_disabled_adapter_is_the_quantized_model(adapted: Any, backend: str) -> None:
    model, _, adapter = adapted
    qmodel, _ = ours(model, adapter, LoraConfig(**LORA), backend=backend)
    inputs = batch()
    with qmodel.disable_adapter():
        logits = qmodel(**inputs, return_logits=True).logits
    assert relative_error(logits, true_logits(model, {}, inputs)) < 2e-6
    assert (
        relative_error(qmodel(**inputs, return_logits=True).logits, true_logits(model, {}, inputs))
        > 1e-2
    )


def test_conv1d_is_quantized_and_adapted() -> None:
    model = tiny_gpt2()
    adapter = random_adapter(model, 4, scale=0.1)
    qmodel, params = ours(model, adapter, LoraConfig(**LORA), backend="aot_eager")
    assert {r.op for r in qlora_fx.explain(qmodel) if r.quantized} == {"addmm"}
    inputs = batch()
    logits, grads = step(qmodel, params, inputs)
    dense, true_params = truth(model, adapter, 2.0)
    with Float64():
        true, true_grads = step(dense, true_params, inputs)
    assert relative_error(logits, true) < 2e-6
    assert grads.keys() == true_grads.keys()
    for name in grads:
        assert relative_error(grads[name], true_grads[name]) < 1e-4, name


def test_a_bfloat16_model_keeps_its_storage_and_runs_in_the_wider_dtype() -> None:
    model = tiny_llama().to(torch.bfloat16)
    adapter = random_adapter(model, 4, scale=0.1)
    qmodel, _ = ours(model, adapter, LoraConfig(**LORA), compute_dtype="float32", backend="eager")
    assert qmodel.dtype == torch.float32
    dense = {
        n: p.dtype
        for n, p in qmodel.named_parameters()
        if not p.requires_grad and p.is_floating_point()
    }
    assert set(dense.values()) == {torch.bfloat16}
    out = qmodel(**batch(), return_logits=True)
    assert out.logits.dtype == torch.float32
    assert relative_error(out.logits, true_logits(model.float(), adapter, batch())) < 1e-2
    out.loss.backward()


@pytest.mark.parametrize(
    "quantization",
    [
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
        BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_quant_storage=torch.bfloat16,
        ),
    ],
    ids=["fp4-single", "nf4-double-bf16-storage"],
)
def test_quantization_settings_reach_the_numbers(quantization: BitsAndBytesConfig) -> None:
    model = tiny_llama()
    adapter = random_adapter(model, 4, scale=0.1)
    qmodel, params = ours(
        model, adapter, LoraConfig(**LORA), quantization=quantization, backend="eager"
    )
    dense, true_params = truth(
        model,
        adapter,
        2.0,
        quant_type=quantization.bnb_4bit_quant_type,
        double_quant=quantization.bnb_4bit_use_double_quant,
    )
    logits, grads = step(qmodel, params, batch())
    with Float64():
        true, true_grads = step(dense, true_params, batch())
    assert relative_error(logits, true) < 2e-6
    assert max(relative_error(grads[n], true_grads[n]) for n in grads) < 1e-4


def test_dense_weights_are_released_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from qlora_fx.runtime.schemes.four_bit import FourBit

    model = tiny_llama()
    watched = {n: weakref.ref(p) for n, p in model.named_parameters() if n.endswith("proj.weight")}
    alive: list[int] = []
    quantize = FourBit.quantize

    def counting(self: FourBit, weight: torch.Tensor) -> Any:
        alive.append(sum(ref() is not None for ref in watched.values()))
        return quantize(self, weight)

    monkeypatch.setattr(FourBit, "quantize", counting)
    gc.disable()  # only reference counts may free them
    try:
        qmodel = qlora_fx.transform(model, LoraConfig(**LORA), backend="eager")
        assert alive == list(range(len(watched), 0, -1))
        assert not any(ref() is not None for ref in watched.values())
    finally:
        gc.enable()
    assert qmodel is not None


def test_explain_accounts_for_every_linear_and_every_byte(adapted: Any) -> None:
    _, qmodel, _ = adapted
    table = qlora_fx.explain(qmodel)
    assert len(table) == 15
    head = next(r for r in table if r.name == "lm_head")
    assert (head.quantized, head.adapted) == (False, False)
    assert "output head" in head.reason
    row = next(r for r in table if r.name == "model.layers.0.self_attn.q_proj")
    assert (row.shape, row.bytes_before, row.quantized, row.adapted, row.reason) == (
        (64, 48),
        64 * 48 * 4,
        True,
        True,
        "",
    )
    totals = table.totals
    held = sum(t.nbytes for _, t in qmodel.base.store.items())
    assert totals["bytes_after"] + totals["adapter_bytes"] + totals["other_bytes"] == held
    text = str(table)
    assert text.isascii()
    assert "model.layers.{0..1}.mlp.down_proj" in text
    assert table.to_dicts()[0]["name"] == "model.layers.0.self_attn.q_proj"


def test_a_tied_head_is_named_as_a_head_and_its_bytes_count_once() -> None:
    qmodel = qlora_fx.transform(
        tiny_llama(1, tie_word_embeddings=True), LoraConfig(**LORA), backend="eager"
    )
    table = qlora_fx.explain(qmodel)
    head = next(r for r in table if r.name == "lm_head")
    assert head.weight == "model.embed_tokens.weight"
    assert not head.quantized
    totals = table.totals
    held = sum(t.nbytes for _, t in qmodel.base.store.items())
    assert totals["bytes_after"] + totals["adapter_bytes"] + totals["other_bytes"] == held
    with torch.no_grad():
        logits = qmodel(**batch(), return_logits=True).logits
    model = tiny_llama(1, tie_word_embeddings=True)
    assert relative_error(logits, true_logits(model, {}, batch())) < 2e-6


def test_state_dict_has_bitsandbytes_keys_and_loads_back(adapted: Any) -> None:
    model, qmodel, adapter = adapted
    state = {k: v.clone() for k, v in qmodel.state_dict().items()}
    site = "base_model.model.model.layers.0.self_attn.q_proj"
    base = f"{site}.base_layer.weight"
    for key in (
        "",
        ".absmax",
        ".quant_map",
        ".nested_absmax",
        ".nested_quant_map",
        ".quant_state.bitsandbytes__nf4",
    ):
        assert base + key in state
    other = qlora_fx.transform(tiny_llama(), LoraConfig(**LORA), backend="eager")
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    assert other.load_state_dict(state) is not None
    inputs = batch()
    assert (
        relative_error(
            other(**inputs, return_logits=True).logits, true_logits(model, adapter, inputs)
        )
        < 2e-6
    )
    for more in (f"{site}.absent", "base_model.model.model.absent"):
        with pytest.raises(RuntimeError, match=rf"Unexpected key\(s\) in state_dict: .*{more}"):
            other.load_state_dict(state | {more: torch.zeros(1)})
    del state[f"{base}.absmax"], state[f"{base}.quant_state.bitsandbytes__nf4"]
    with pytest.raises((RuntimeError, ValueError)):
        other.load_state_dict(state)


def test_a_training_run_lowers_the_loss_with_every_named_optimizer() -> None:
    for name in ("PagedAdamW32bit", "PagedAdamW8bit", "PagedLion"):
        qmodel = qlora_fx.transform(tiny_llama(1), LoraConfig(**LORA), backend="eager")
        optimizer = qmodel.paged_optimizer(lr=1e-2, optimizer=name, weight_decay=0.01)
        losses = []
        for _ in range(10):
            loss = qmodel(**batch()).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0] - 0.02, (name, losses)


def test_optimizer_takes_groups_of_adapters_and_nothing_else(adapted: Any) -> None:
    _, qmodel, _ = adapted
    named = dict(qmodel.adapter_parameters())
    a = [p for n, p in named.items() if "lora_A" in n]
    b = [p for n, p in named.items() if "lora_B" in n]
    optimizer = qmodel.paged_optimizer(1e-4, params=[{"params": a}, {"params": b, "lr": 1e-3}])
    assert [g["lr"] for g in optimizer.param_groups] == [1e-4, 1e-3]
    with pytest.raises(ConfigError, match="not an adapter parameter"):
        qmodel.paged_optimizer(1e-4, params=[next(qmodel.parameters())])
    with pytest.raises(ConfigError, match="'SGD'; accepted: PagedAdamW32bit"):
        qmodel.paged_optimizer(1e-4, optimizer="SGD")


@pytest.mark.slow
def test_generate_equals_greedy_decoding_of_the_true_model(adapted: Any) -> None:
    model, qmodel, adapter = adapted
    dense, _ = truth(model, adapter, 2.0)
    ids = batch(2, 9)["input_ids"]
    mask = torch.ones_like(ids)
    ids[1, :3], mask[1, :3] = 0, 0  # padded on the left
    qmodel.train()
    mine = qmodel.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    assert qmodel.training
    with Float64():
        theirs = dense.eval().generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False
        )  # type: ignore[operator]
    assert torch.equal(mine, theirs)


def test_the_users_model_is_used_up_and_says_so(adapted: Any) -> None:
    model = tiny_llama(1)
    qlora_fx.transform(model, LoraConfig(**LORA), backend="eager")
    with pytest.raises(ModelError, match="moved into the QLoRAModel"):
        model(**batch())
    with pytest.raises(ModelError, match="moved into the QLoRAModel"):
        qlora_fx.transform(model)


def test_moving_or_casting_a_captured_model_is_refused(adapted: Any) -> None:
    _, qmodel, _ = adapted
    assert qmodel.to("cpu") is qmodel
    assert qmodel.to(torch.float32) is qmodel
    assert qmodel.float() is qmodel
    with pytest.raises(ConfigError, match="pass compute_dtype="):
        qmodel.to(torch.bfloat16)
    with pytest.raises(ConfigError, match="cannot move"):
        qmodel.half()
    with pytest.raises(ConfigError, match="cannot move from cpu to meta"):
        qmodel.to("meta")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"labels": torch.ones(3, 20, dtype=torch.int64)},
            r"labels has shape \[3, 20\], input_ids \[3, 21\]",
        ),
        ({"labels": torch.zeros(3, 21)}, r"labels are torch.float32; accepted: int64"),
        (
            {"attention_mask": torch.ones(2, 21, dtype=torch.int64)},
            r"attention_mask has shape \[2, 21\]",
        ),
        (
            {"input_ids": torch.zeros(3, 21, dtype=torch.int64, device="meta")},
            "input_ids is on meta, the model on cpu",
        ),
        (
            {"input_ids": torch.full((3, 21), VOCABULARY)},
            "input_ids has values from 101 to 101; accepted: 0 to 100",
        ),
        (
            {"labels": torch.full((3, 21), -7)},
            "labels has values from -7 to -7; accepted: 0 to 100, or -100",
        ),
        ({"use_cache": True}, "use_cache=True in train mode"),
        (
            {"past_key_values": object()},
            "past_key_values is a object of nothing; accepted: a Dynamic",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(
    adapted: Any, change: Any, message: str
) -> None:
    _, qmodel, _ = adapted
    with pytest.raises(InputError, match=message):
        qmodel(**(batch() | change))


def test_the_trainers_item_count_is_an_input_not_a_constant(adapted: Any) -> None:
    _, qmodel, _ = adapted
    qmodel(**batch(), num_items_in_batch=7)
    graphs = len(qmodel.graph_modules)
    losses = [float(qmodel(**batch(), num_items_in_batch=n).loss.detach()) for n in (10, 20)]
    losses.append(float(qmodel(**batch(), num_items_in_batch=torch.tensor(40)).loss.detach()))
    assert losses == pytest.approx([losses[0], losses[0] / 2, losses[0] / 4])
    assert len(qmodel.graph_modules) == graphs


class Branching(LlamaForCausalLM):
    """Python that looks at the shape, and a constant made in the forward."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        factor = torch.tensor([1.0, 3.0])
        out.logits = out.logits * (factor[1] if out.logits.shape[1] > 30 else factor[0])
        return out


def test_a_model_that_looks_at_the_shape_is_captured_again_and_says_so() -> None:
    def make() -> Branching:
        model = Branching(tiny_llama(1, use_cache=False).config)
        model.load_state_dict(tiny_llama(1).state_dict())
        return model

    qmodel = qlora_fx.transform(
        make(),
        LoraConfig(**LORA),
        example_inputs={"input_ids": batch()["input_ids"]},
        backend="eager",
    )
    with torch.no_grad():
        for rows, tokens, again in ((2, 9, False), (2, 40, True), (3, 33, False), (4, 12, False)):
            inputs = {"input_ids": batch(rows, tokens)["input_ids"]}
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                logits = qmodel(**inputs, return_logits=True).logits
            said = [w for w in caught if "capturing" in str(w.message)]
            assert bool(said) == again
            assert all(w.filename == __file__ for w in said), "it names the line of the call"
            assert relative_error(logits, true_logits(make(), {}, inputs)) < 2e-6, (rows, tokens)


class RowByRow(LlamaForCausalLM):
    def forward(  # type: ignore[override]
        self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None
    ) -> Any:
        out = super().forward(input_ids, attention_mask, labels=labels)
        out.logits = torch.stack([2 * row for row in out.logits])
        return out


def test_a_model_that_goes_through_its_rows_takes_any_number_of_them_also_one() -> None:
    model = RowByRow(tiny_llama(1).config)
    options: dict[str, Any] = {"compute_dtype": torch.float32, "backend": "eager"}
    options["example_inputs"] = batch(3, 9)
    qmodel = qlora_fx.transform(copy.deepcopy(model), LoraConfig(**LORA), **options)
    randomize_adapter(qmodel)
    for rows, again in ((3, False), (1, True), (3, False)):
        said = pytest.warns(UserWarning, match="capturing RowByRow again")
        with said if again else nullcontext():
            report = compare(model, qmodel, batch(rows, 9))
        assert report.passed, str(report)
    assert sum(1 for _ in qmodel.programs) == 2


def test_autocast_around_a_call_changes_nothing(adapted: Any) -> None:
    _, qmodel, _ = adapted
    plain = qmodel(**batch(), return_logits=True).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(qmodel(**batch(), return_logits=True).logits, plain)


def test_no_warning_is_raised_by_the_main_path() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        qmodel = qlora_fx.transform(tiny_llama(1), LoraConfig(**LORA), backend="aot_eager")
        qmodel(**batch()).loss.backward()
    assert [str(w.message) for w in caught] == []


def test_a_copy_of_the_model_is_not_touched() -> None:
    model = tiny_llama(1)
    kept = copy.deepcopy(model)
    before = {n: p.clone() for n, p in kept.named_parameters()}
    qlora_fx.transform(model, LoraConfig(**LORA), backend="eager")
    assert all(torch.equal(before[n], p) for n, p in kept.named_parameters())


EXAMPLES: dict[str, dict[str, tuple[int, ...]]] = {
    "vit": {"pixel_values": (2, 3, 32, 32), "labels": (2,)},
    "wav2vec2": {"input_values": (2, 16000), "labels": (2,)},
    "whisper": {"labels": (2, 11)},
    "t5": {"input_ids": (2, 16), "attention_mask": (2, 16), "labels": (2, 11)},
    "bert": {"input_ids": (2, 16), "attention_mask": (2, 16), "labels": (2, 16)},
    "clip_vision_model": {},
}


@pytest.mark.parametrize("model_type", EXAMPLES)
def test_example_inputs_of_text_images_and_sound_are_what_the_model_takes(model_type: str) -> None:
    import inspect

    from families import FAMILIES, build
    from qlora_fx.capture.example_inputs import example_inputs

    model = build(next(f for f in FAMILIES if f.model_type == model_type)).train()
    made = example_inputs(model, inspect.signature(model.forward))
    assert model.main_input_name in made
    shapes = {k: tuple(v.shape) for k, v in made.items()}
    assert EXAMPLES[model_type].items() <= shapes.items()
    model(**made)


@pytest.mark.parametrize("model_type", only_slow_but(["vit"], ["vit", "bart"]))
def test_a_model_is_transformed_without_example_inputs_and_takes_other_sizes(
    model_type: str,
) -> None:
    import copy

    from families import FAMILIES, build
    from qlora_fx.testing.check import compare, randomize_adapter

    family = next(f for f in FAMILIES if f.model_type == model_type)
    model = build(family).train()
    qmodel = qlora_fx.transform(copy.deepcopy(model), compute_dtype=torch.float32, backend="eager")
    randomize_adapter(qmodel)
    report = compare(model, qmodel, family.batch(5, 29))
    assert report.passed, str(report)
    assert len(qmodel.graph_modules) == 1, "the first capture serves"
