"""Generation with a key/value cache: beside the same model without one, and beside transformers over the true weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import qlora_fx
import pytest
import torch
from oracle import Float64, ours, random_adapter, truth
from peft import LoraConfig
from qlora_fx.errors import InputError
from qlora_fx.testing import randomize_adapter
from slow import only_slow_but
from small_models import batch, peer_llama, windowed_gemma2
from torch import Tensor
from transformers import (
    DynamicCache,
    MambaConfig,
    MambaForCausalLM,
    StaticCache,
)

LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
ALONE = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(scope="module")
def adapted() -> tuple[Any, Any]:
    """A model with a random adapter, run operator by operator, and transformers' own over its true weights."""
    model = peer_llama(1)
    adapter = random_adapter(model, 4, scale=0.1)
    qmodel, _ = ours(model, adapter, LoraConfig(**LORA), backend="eager")
    dense, _ = truth(model, adapter, 2.0)
    return qmodel.eval(), dense.eval()


def token_by_token(qmodel: Any, ids: Tensor, first: int, **others: Any) -> tuple[Tensor, Any]:
    """Logits of all tokens, of which the first ``first`` are computed together; and the cache."""
    with torch.no_grad():
        out = qmodel(ids[:, :first], use_cache=True, **others)
        logits = [out.logits]
        for i in range(first, ids.shape[1]):
            out = qmodel(ids[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True)
            logits.append(out.logits)
    return torch.cat(logits, 1), out.past_key_values


@pytest.mark.parametrize("backend", only_slow_but(["eager"], ["eager", "inductor"]))
def test_logits_are_those_without_a_cache_and_training_is_not_disturbed(backend: str) -> None:
    model = peer_llama(1)
    qmodel: Any = qlora_fx.transform(
        model, LoraConfig(**LORA), backend=backend, compute_dtype=torch.float32
    )
    randomize_adapter(qmodel)

    def gradients() -> list[Tensor]:
        qmodel.zero_grad()
        qmodel.train()(**batch()).loss.backward()
        return [p.grad.clone() for _, p in qmodel.adapter_parameters()]

    before = gradients()
    for rows in (2, 1):
        ids = batch(rows, 9, padded=0)["input_ids"]
        whole = qmodel.eval()(ids).logits
        logits, cache = token_by_token(qmodel, ids, 6)
        torch.testing.assert_close(logits, whole, rtol=0, atol=1e-5)
        assert type(cache) is DynamicCache
        assert cache.get_seq_length() == 9
        with torch.no_grad():  # several at once
            more = qmodel(ids[:, :4], past_key_values=cache).logits
            again = qmodel(torch.cat([ids, ids[:, :4]], 1)).logits[:, 9:]
        torch.testing.assert_close(more, again, rtol=0, atol=1e-5)
    graphs, compiled = set(qmodel.graph_modules), compilations(qmodel)
    assert all(torch.equal(a, b) for a, b in zip(before, gradients(), strict=True))
    token_by_token(qmodel.eval(), ids, 3)
    assert set(qmodel.graph_modules) == graphs
    assert compilations(qmodel) == compiled, "other lengths compile nothing"


def compilations(qmodel: Any) -> int:
    return sum(m.compilations for p in qmodel.programs for m in p.run.children())


GENERATIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 0.7, "repetition_penalty": 1.3},
    "assisted": {"prompt_lookup_num_tokens": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_through_the_defaults(dtype: torch.dtype) -> None:
    """Compiled by default, in the dtype that is fastest on some CPU: tokens beside transformers' own, and logits with a cache beside those without."""
    model = peer_llama().to(dtype)
    adapter = random_adapter(model, 4, scale=0.1)
    qmodel: Any = qlora_fx.transform(copy.deepcopy(model), LoraConfig(**LORA), compute_dtype=dtype)
    qmodel.load_adapter_state_dict(adapter)
    inputs = batch(3, 11, padded=0)
    inputs["attention_mask"][1, :4] = 0
    del inputs["labels"]
    with torch.no_grad():
        whole = qmodel.eval()(**inputs).logits.float()
        first = qmodel(
            inputs["input_ids"][:, :10],
            attention_mask=inputs["attention_mask"][:, :10],
            use_cache=True,
        )
        last = qmodel(
            inputs["input_ids"][:, 10:],
            attention_mask=inputs["attention_mask"],
            past_key_values=first.past_key_values,
        )
    limit = 1e-5 if dtype == torch.float32 else 2e-2 * float(whole.abs().max())
    torch.testing.assert_close(last.logits[:, 0].float(), whole[:, -1], rtol=0, atol=limit)
    if dtype == torch.float32:
        dense, _ = truth(model, adapter, 2.0)
        for way in ("greedy", "beams", "sampling"):
            found = []
            for one in (qmodel, dense.eval()):
                torch.manual_seed(1)
                with Float64() if one is dense else nullcontext():
                    options = ALONE | GENERATIONS[way]
                    found.append(one.generate(**inputs, max_new_tokens=12, **options))
            assert torch.equal(*found), way
    assert not [b for p in qmodel.programs for b in p.run.children() if b.warned], "no fallback"


@pytest.mark.parametrize("rows", [1, 8, 17])
def test_compiled_tokens_are_the_kernels_and_right(compiled: tuple[Any, Any], rows: int) -> None:
    """Sizes that the kernels for few rows take, which are called past Python; 17 rows go back to the dense weight."""
    qmodel, dense = compiled
    ids = batch(rows, 9, padded=0)["input_ids"]
    with torch.no_grad(), Float64():
        true = dense(ids).logits[:, -1]
    with torch.no_grad():
        cache = qmodel(ids[:, :7], use_cache=True, logits_to_keep=1).past_key_values
        token = {"past_key_values": cache, "logits_to_keep": 1}
        qmodel(ids[:, 7:8], **token)  # compiled now
        with torch.profiler.profile() as profile:
            logits = qmodel(ids[:, 8:], **token).logits[:, -1]
    torch.testing.assert_close(logits.double(), true, rtol=0, atol=1e-5)
    called = {e.key: e.count for e in profile.key_averages() if "::linear_" in e.key}
    past_python = {"qlora_fx_cpu::linear_4bit": 7, "qlora_fx_cpu::linear_dense": 1}
    back = {"qlora_fx::linear_4bit": 7, "qlora_fx::linear_dense": 1} if rows > 16 else {}
    assert called == past_python | back


@pytest.fixture(scope="module")
def compiled() -> tuple[Any, Any]:
    model = peer_llama(1)
    adapter = random_adapter(model, 4, scale=0.1)
    dense, _ = truth(model, adapter, 2.0)
    qmodel: Any = qlora_fx.transform(
        model, LoraConfig(**LORA), compute_dtype=torch.float32, training=False, backend="aot_eager"
    )
    qmodel.load_adapter_state_dict(adapter)
    return qmodel, dense.eval()


@pytest.mark.parametrize("way", only_slow_but(("greedy", "beams", "sampling"), GENERATIONS))
def test_tokens_are_those_of_transformers_own_model(adapted: Any, way: str) -> None:
    qmodel, dense = adapted
    found = []
    inputs = batch(1 if way == "assisted" else 3, 11, padded=0)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    if way != "assisted":
        mask[1, :4] = 0  # padded on the left, as prompts of several lengths are
        ids[1, :4] = 0
    for model in (qmodel, dense):
        torch.manual_seed(1)
        options = ALONE | GENERATIONS[way] | {"return_dict_in_generate": True}
        with Float64() if model is dense else nullcontext():
            found.append(model.generate(ids, attention_mask=mask, max_new_tokens=12, **options))
    mine, theirs = found
    assert torch.equal(mine.sequences, theirs.sequences)
    assert mine.past_key_values.get_seq_length() == theirs.past_key_values.get_seq_length()


def test_without_the_adapter_tokens_are_those_of_the_base(adapted: Any) -> None:
    qmodel, _ = adapted
    ids = batch(2, 9, padded=0)["input_ids"]
    with_adapter, _ = token_by_token(qmodel, ids, 6)
    with torch.no_grad(), qmodel.disable_adapter():
        whole = qmodel(ids).logits
        logits, _ = token_by_token(qmodel, ids, 6)
    torch.testing.assert_close(logits, whole, rtol=0, atol=1e-5)
    assert not torch.allclose(logits, with_adapter, atol=1e-3)


def test_a_cache_grows_in_place(adapted: Any) -> None:
    qmodel, _ = adapted
    ids = batch(2, 250, padded=0)["input_ids"]
    _, cache = token_by_token(qmodel, ids, 248)
    place = cache.layers[0].keys.data_ptr()
    with torch.no_grad():
        for i in range(5):
            qmodel(ids[:, i : i + 1], past_key_values=cache)
        assert cache.layers[0].keys.data_ptr() == place
        for i in range(5):
            last = qmodel(ids[:, i : i + 1], past_key_values=cache).logits
        assert cache.layers[0].keys.data_ptr() != place, "moved to a buffer of twice the size"
        whole = qmodel(torch.cat([ids, ids[:, :5], ids[:, :5]], 1)).logits
    torch.testing.assert_close(last[:, 0], whole[:, -1], rtol=0, atol=1e-5)


def test_a_cache_outlives_inference_mode_and_a_step_over_it_has_gradients(adapted: Any) -> None:
    qmodel, _ = adapted
    ids = batch(2, 9, padded=0)["input_ids"]
    with torch.inference_mode():
        _, cache = token_by_token(qmodel, ids, 8)
    logits = qmodel(ids[:, :1], past_key_values=cache).logits
    whole = qmodel(torch.cat([ids, ids[:, :1]], 1)).logits[:, -1:]
    torch.testing.assert_close(logits, whole, rtol=0, atol=1e-5)
    qmodel.zero_grad()
    logits.sum().backward()
    assert all(float(p.grad.norm()) > 0 for _, p in qmodel.adapter_parameters())


def crop(cache: Any) -> Any:
    cache.crop(-1)
    return cache


def copied(cache: Any) -> Any:
    other = copy.deepcopy(cache)
    cache.layers[0].keys.zero_()
    return other


def emptied(cache: Any) -> Any:
    for layer in cache.layers:
        layer.reset()
    if cache.get_seq_length():
        pytest.skip("this release of transformers leaves zeros in a cache that was reset")
    return cache


def cropped_to_nothing(cache: Any) -> Any:
    cache.crop(-9)
    return cache


def of_others(cache: Any) -> Any:
    return DynamicCache([(layer.keys.clone(), layer.values.clone()) for layer in cache.layers])


CHANGES: dict[str, tuple[Callable[[Any], Any], Callable[[Tensor], Tensor]]] = {
    "cropped": (crop, lambda ids: ids[:, :8]),
    "copied": (copied, lambda ids: ids),
    "emptied": (emptied, lambda ids: ids[:1, :0]),
    "cropped to nothing": (cropped_to_nothing, lambda ids: ids[:, :0]),
    "made by others": (of_others, lambda ids: ids),
    "reordered": (
        lambda cache: cache.reorder_cache(torch.tensor([1, 1])) or cache,
        lambda ids: ids[[1, 1]],
    ),
    "fewer rows": (
        lambda cache: cache.batch_select_indices(torch.tensor([1])) or cache,
        lambda ids: ids[[1]],
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_others_do_to_a_cache_is_seen(adapted: Any, change: str) -> None:
    qmodel, _ = adapted
    ids = batch(2, 9, padded=0)["input_ids"]
    _, cache = token_by_token(qmodel, ids, 6)
    of_cache, of_ids = CHANGES[change]
    cache, ids = of_cache(cache), of_ids(ids)
    for token in (7, 8):
        new = torch.full((len(ids), 1), token)
        ids = torch.cat([ids, new], 1)
        with torch.no_grad():
            logits = qmodel(new, past_key_values=cache).logits[:, 0]
            whole = qmodel(ids).logits[:, -1]
        torch.testing.assert_close(logits, whole, rtol=0, atol=1e-5)


def test_a_conversation_goes_on(adapted: Any) -> None:
    qmodel, dense = adapted
    for model in (qmodel, dense):
        ids = batch(1, 6, padded=0)["input_ids"]
        cache = DynamicCache()
        for _ in range(2):
            with Float64() if model is dense else nullcontext():
                ids = model.generate(ids, past_key_values=cache, max_new_tokens=4, **ALONE)
            ids = torch.cat([ids, torch.tensor([[7, 8]])], 1)
        if model is qmodel:
            mine = ids
    assert torch.equal(mine, ids)


def test_calls_that_no_graph_takes_are_refused_by_name(adapted: Any) -> None:
    qmodel, _ = adapted
    ids = batch(2, 9, padded=0)["input_ids"]
    _, cache = token_by_token(qmodel, ids, 6)
    static = StaticCache(config=qmodel.config, max_cache_len=32)

    def refused(message: str, **call: Any) -> None:
        with pytest.raises(InputError, match=message), torch.no_grad():
            qmodel(**call)

    refused(
        "StaticCache of StaticLayer; accepted: a DynamicCache",
        input_ids=ids,
        past_key_values=static,
    )
    refused("with use_cache=False", input_ids=ids, past_key_values=cache, use_cache=False)
    refused("of another model or batch", input_ids=ids[:1], past_key_values=cache)
    other = of_others(cache)
    other.layers[0].keys = other.layers[0].keys[..., :8]
    refused("of another model or batch", input_ids=ids, past_key_values=other)
    refused(
        r"accepted: \[2, 10\], with the 9 tokens",
        input_ids=ids[:, :1],
        past_key_values=cache,
        attention_mask=torch.ones(2, 1, dtype=torch.int64),
    )
    refused("return_dict=True", input_ids=ids, use_cache=True, return_dict=False)
    assert cache.get_seq_length() == 9
    with pytest.raises(InputError, match=r"in train mode; accepted: in eval mode"):
        qmodel.train()(ids, use_cache=True)
    qmodel.eval()


@pytest.mark.slow
def test_a_window_is_that_of_the_model() -> None:
    qmodel = qlora_fx.transform(windowed_gemma2(), LoraConfig(**LORA), backend="eager")
    ids = batch(2, 6, padded=0)["input_ids"]
    with_cache, without = (
        qmodel.generate(ids, max_new_tokens=8, use_cache=use, **ALONE) for use in (True, False)
    )
    assert torch.equal(with_cache, without)


def test_models_with_other_caches_compute_the_prefix_again() -> None:
    config = MambaConfig(
        vocab_size=101, hidden_size=32, state_size=4, num_hidden_layers=1, time_step_rank=4
    )
    torch.manual_seed(0)
    qmodel: Any = qlora_fx.transform(MambaForCausalLM(config), LoraConfig(**LORA), backend="eager")
    ids = batch(2, 6, padded=0)["input_ids"]
    found = qmodel.generate(ids, max_new_tokens=3, **ALONE)
    with torch.no_grad():
        expected = qmodel.eval()(found[:, :-1]).logits[:, 5:].argmax(-1)
    assert torch.equal(found[:, 6:], expected)
    with pytest.raises(InputError, match="use_cache=True is not supported for Mamba"):
        qmodel(ids, use_cache=True)
