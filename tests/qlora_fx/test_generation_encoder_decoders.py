"""Generation of encoder-decoders: the encoder as a program of its own, and a cache that holds its keys and values too."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import qlora_fx
import pytest
import torch
from default_path import SPECIAL
from families import FAMILIES, build
from oracle import Float64, ours, random_adapter, truth
from peft import LoraConfig
from qlora_fx.capture.arguments import ENCODED, with_encoder_output
from qlora_fx.capture.cache import caches
from qlora_fx.errors import InputError
from qlora_fx.testing import randomize_adapter
from torch import Tensor
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.modeling_outputs import BaseModelOutput

LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
ALONE: dict[str, Any] = {
    "do_sample": False,
    "repetition_penalty": 2.0,  # small models would repeat one token
    "eos_token_id": None,
    "max_new_tokens": 9,
}


def test_an_encoders_states_alone_are_an_output_of_any_encoder() -> None:
    """NLLB-MoE's decoder asks for what the encoder's routers said."""
    states = torch.zeros(1, 2, 3)
    output = with_encoder_output({ENCODED: states})[ENCODED]
    assert output.last_hidden_state is states
    assert output.router_logits is None


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_states_that_an_encoder_masks_stay_masked_for_further_tokens(backend: str) -> None:
    """Moonshine's states are fewer than what its mask of waves tells of."""
    family = next(f for f in FAMILIES if f.model_type == "moonshine")
    model = build(family).float()
    adapter = random_adapter(model, 4, scale=0.1, keep=("proj_out",))
    waves = family.batch(2, 9)
    labels = {"labels": waves.pop("labels")}
    waves["attention_mask"] = torch.ones(2, waves["input_values"].shape[1], dtype=torch.long)
    waves["attention_mask"][1, 2000:] = 0
    told: dict[str, Any] = {"backend": backend, "example_inputs": waves | labels}
    qmodel, _ = ours(copy.deepcopy(model), adapter, LoraConfig(**LORA), **told)
    ids = {"decoder_input_ids": torch.full((2, 2), 7)}
    with torch.no_grad():
        states = qmodel.eval().get_encoder()(**waves)
        logits = qmodel(encoder_outputs=states, **ids).logits.double()
    dense, _ = truth(model, adapter, 2.0, keep=("proj_out",))
    with torch.no_grad(), Float64():
        waves["input_values"] = waves["input_values"].double()
        true = dense.eval()(**waves, **ids).logits
        states = dense.get_encoder()(**waves)
        states.attention_mask = None
        unmasked = dense(encoder_outputs=states, **ids).logits
    torch.testing.assert_close(logits, true, rtol=0, atol=1e-5)
    assert (unmasked - true)[1].abs().max() > 1e-3


def test_a_cache_that_holds_pictures_in_some_layers_is_not_taken() -> None:
    """Llama 3.2 with pictures generates without one."""
    by_type = {family.model_type: family for family in FAMILIES}
    assert not caches(build(by_type["mllama"]))
    assert caches(build(by_type["mllama_text_model"]))


def t5() -> T5ForConditionalGeneration:
    """q, k and v are 64x48, o 48x64, the feed-forward 80x48 and 48x80; the head is its own."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=101,
        d_model=48,
        d_kv=16,
        d_ff=80,
        num_layers=1,
        num_heads=4,
        relative_attention_num_buckets=8,
        tie_word_embeddings=False,
        pad_token_id=0,
        decoder_start_token_id=0,
    )
    model = T5ForConditionalGeneration(config)
    torch.nn.init.normal_(model.lm_head.weight, std=0.3)
    return model


def source(rows: int = 3, tokens: int = 9) -> dict[str, Tensor]:
    """The second row is padded on the right."""
    ids = torch.randint(5, 100, (rows, tokens), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    if rows > 1:
        ids[1, -3:] = 0
        mask[1, -3:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(scope="module")
def adapted() -> tuple[Any, Any]:
    """A model with a random adapter, run operator by operator, and transformers' own over its true weights."""
    model = t5()
    adapter = random_adapter(model, 4, scale=0.1)
    qmodel, _ = ours(model, adapter, LoraConfig(**LORA), backend="eager")
    dense, _ = truth(model, adapter, 2.0)
    return qmodel.eval(), dense.eval()


GENERATIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 0.7},
}


@pytest.mark.parametrize("way", GENERATIONS)
def test_tokens_are_those_of_transformers_own_model(adapted: Any, way: str) -> None:
    qmodel, dense = adapted
    found = []
    for model in (qmodel, dense):
        torch.manual_seed(1)
        with Float64() if model is dense else nullcontext():
            found.append(model.generate(**source(), **ALONE | GENERATIONS[way]))
    assert torch.equal(*found)
    assert len(found[0].unique()) > 5, "not one token again and again"
    assert not torch.equal(found[0][0], found[0][1])


def test_lengths_and_batches_share_graphs_and_the_encoder_runs_once(adapted: Any) -> None:
    qmodel, _ = adapted
    qmodel.generate(**source(), **ALONE)
    graphs = set(qmodel.graph_modules)
    (encoder,) = qmodel.submodels["encoder"]
    before = encoder.calls
    for rows, tokens in ((1, 5), (2, 14)):
        with_cache, without = (
            # Seq2SeqTrainer hands the labels of its batch on
            qmodel.generate(
                **source(rows, tokens), labels=torch.ones(rows, 3), **ALONE, use_cache=use
            )
            for use in (True, False)
        )
        assert torch.equal(with_cache, without)
    assert encoder.calls == before + 4
    assert set(qmodel.graph_modules) - graphs == {
        name for name in qmodel.graph_modules if "past" not in name and name not in graphs
    }
    assert len(qmodel.graph_modules) <= len(graphs) + 1, "one more without a cache"


def first_tokens(qmodel: Any, decoder_ids: Tensor, rows: int = 2) -> tuple[dict[str, Any], Any]:
    """What further calls take besides, and the cache of the tokens."""
    given: dict[str, Any] = source(rows)
    with torch.no_grad():
        states = qmodel.get_encoder()(**given)
        del given["input_ids"]
        given["encoder_outputs"] = states
        out = qmodel(**given, decoder_input_ids=decoder_ids, use_cache=True)
    return given, out.past_key_values


def test_the_encoder_alone_is_transformers_own_and_has_gradients(adapted: Any) -> None:
    qmodel, dense = adapted
    qmodel.zero_grad()
    mine = qmodel.get_encoder()(**source()).last_hidden_state
    with Float64():
        true = dense.get_encoder()(**source()).last_hidden_state
    torch.testing.assert_close(mine.double(), true, rtol=0, atol=1e-5)
    mine.square().sum().backward()
    for name, p in qmodel.adapter_parameters():
        assert (p.grad is not None and float(p.grad.norm()) > 0) is (".encoder." in f".{name}")
    qmodel.zero_grad()


@pytest.mark.parametrize("several", [1, 3])
def test_logits_are_those_without_a_cache(adapted: Any, several: int) -> None:
    qmodel, _ = adapted
    ids = torch.randint(5, 100, (2, 8), generator=torch.Generator().manual_seed(5))
    given, cache = first_tokens(qmodel, ids[:, :2])
    assert type(cache) is EncoderDecoderCache
    with torch.no_grad():
        whole = qmodel(**source(2), decoder_input_ids=ids).logits
        for i in range(2, 8, several):
            new = ids[:, i : i + several]
            out = qmodel(**given, decoder_input_ids=new, past_key_values=cache)
            expected = whole[:, i : i + several]
            torch.testing.assert_close(out.logits, expected, rtol=0, atol=1e-5)
            assert out.past_key_values is cache
    assert cache.get_seq_length() == 8
    assert cache.cross_attention_cache.get_seq_length() == 9
    # the encoder's states are not read again
    with torch.no_grad():
        kept = qmodel(**given, decoder_input_ids=ids[:, :1], past_key_values=copied(cache)).logits
        given["encoder_outputs"] = (torch.zeros(2, 9, 48),)
        other = qmodel(**given, decoder_input_ids=ids[:, :1], past_key_values=cache).logits
    assert torch.equal(kept, other)


def copied(cache: Any) -> Any:
    return copy.deepcopy(cache)


def reordered(cache: Any) -> Any:
    cache.reorder_cache(torch.tensor([1, 1]))
    return cache


def cropped(cache: Any) -> Any:
    cache.crop(-1)
    return cache


def of_others(cache: Any) -> Any:
    return EncoderDecoderCache(
        *(
            DynamicCache([(layer.keys.clone(), layer.values.clone()) for layer in one.layers])
            for one in (cache.self_attention_cache, cache.cross_attention_cache)
        )
    )


def without_the_encoders(cache: Any) -> Any:
    """Its keys and values are computed again."""
    return EncoderDecoderCache(cache.self_attention_cache, DynamicCache())


CHANGES: dict[str, tuple[Callable[[Any], Any], Callable[[Tensor], Tensor]]] = {
    "copied": (copied, lambda t: t),
    "reordered": (reordered, lambda t: t[[1, 1]]),
    "cropped": (cropped, lambda t: t),
    "made by others": (of_others, lambda t: t),
    "without the encoder's": (without_the_encoders, lambda t: t),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_others_do_to_a_cache_is_seen(adapted: Any, change: str) -> None:
    qmodel, _ = adapted
    ids = torch.randint(5, 100, (2, 6), generator=torch.Generator().manual_seed(7))
    with torch.inference_mode():
        given, cache = first_tokens(qmodel, ids)
    of_cache, rows = CHANGES[change]
    cache = of_cache(cache)
    ids = rows(ids[:, : cache.get_seq_length()])
    states = given["encoder_outputs"].last_hidden_state.clone()
    given["encoder_outputs"] = BaseModelOutput(rows(states))
    given["attention_mask"] = rows(given["attention_mask"])
    for token in (7, 8):
        new = torch.full((len(ids), 1), token)
        ids = torch.cat([ids, new], 1)
        logits = qmodel(**given, decoder_input_ids=new, past_key_values=cache).logits[:, 0]
        whole = qmodel(**given, decoder_input_ids=ids).logits[:, -1]
        torch.testing.assert_close(logits, whole, rtol=0, atol=1e-5)


def test_calls_that_no_graph_takes_are_refused_by_name(adapted: Any) -> None:
    qmodel, _ = adapted
    ids = torch.full((2, 3), 7)
    given, cache = first_tokens(qmodel, ids)
    with pytest.raises(
        InputError, match="DynamicCache of nothing; accepted: an EncoderDecoderCache"
    ):
        qmodel(**given, decoder_input_ids=ids, past_key_values=DynamicCache())
    with pytest.raises(InputError, match="of another model or batch"):
        qmodel(**source(1), decoder_input_ids=ids[:1], past_key_values=cache)
    with pytest.raises(InputError, match="encoder_outputs is a str; accepted: what"):
        qmodel(encoder_outputs="states", decoder_input_ids=ids)
    assert cache.get_seq_length() == 3


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["t5", "whisper", "bart", "llava", "qwen3_vl"])
def test_through_the_defaults(model_type: str) -> None:
    """Compiled, beside transformers' own over the true weights: greedy, beams and sampling; also what looks at pictures."""
    family = next(f for f in FAMILIES if f.model_type == model_type)
    model = build(family).float()
    adapter = random_adapter(model, 4, scale=0.1, keep=("lm_head", "proj_out"))
    qmodel: Any = qlora_fx.transform(
        copy.deepcopy(model),
        LoraConfig(**LORA),
        compute_dtype=torch.float32,
        example_inputs=family.batch(3, 21),
    )
    qmodel.load_adapter_state_dict(adapter)
    dense, _ = truth(model, adapter, 2.0, keep=("lm_head", "proj_out"))
    given = {k: v for k, v in family.batch(3, 21).items() if k != "labels"}
    for way in ("greedy", "sampling", *(("beams",) if qmodel.config.is_encoder_decoder else ())):
        found = []
        for one in (qmodel, dense.eval()):
            torch.manual_seed(1)
            wide = torch.float64 if one is dense else torch.float32
            taken = {k: v.to(wide) if v.is_floating_point() else v for k, v in given.items()}
            with Float64() if one is dense else nullcontext():
                options = ALONE | GENERATIONS[way] | {"suppress_tokens": SPECIAL}
                found.append(one.generate(**taken, **options))
        assert torch.equal(*found), way
    programs = [p for several in qmodel.all_programs for p in several]
    assert not [b for p in programs for b in p.run.children() if b.warned], "no fallback"


@pytest.mark.slow
def test_in_16_bits_logits_are_those_without_a_cache() -> None:
    """Compiled, in the dtype that is the default on GPUs and newer CPUs; the rest as a user has it."""
    qmodel: Any = qlora_fx.transform(
        t5().bfloat16(), LoraConfig(**LORA), compute_dtype=torch.bfloat16
    )
    randomize_adapter(qmodel)
    qmodel.eval()
    ids = torch.randint(5, 100, (2, 4), generator=torch.Generator().manual_seed(5))
    given, cache = first_tokens(qmodel, ids[:, :3])
    with torch.no_grad():
        last = qmodel(**given, decoder_input_ids=ids[:, 3:], past_key_values=cache).logits[:, 0]
        whole = qmodel(**source(2), decoder_input_ids=ids).logits[:, -1]
    assert last.dtype == torch.bfloat16
    limit = 2e-2 * float(whole.float().abs().max())
    torch.testing.assert_close(last.float(), whole.float(), rtol=0, atol=limit)
    assert qmodel.generate(**source(), **ALONE).shape == (3, 10)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_trainer_evaluates_by_what_is_generated(backend: str, tmp_path: Path) -> None:
    qmodel: Any = qlora_fx.transform(t5(), LoraConfig(**LORA), backend=backend)
    randomize_adapter(qmodel)
    rows = [{"input_ids": list(range(5, 11 + i)), "labels": [7, 8 + i, 9]} for i in range(4)]
    seen: dict[str, Any] = {}

    def metrics(found: Any) -> dict[str, float]:
        seen["tokens"], seen["labels"] = found.predictions, found.label_ids
        return {"rows": float(len(found.predictions))}

    def collated(several: list[dict[str, Any]]) -> dict[str, Tensor]:
        padded = torch.nn.utils.rnn.pad_sequence
        ids = padded([torch.tensor(r["input_ids"]) for r in several], batch_first=True)
        labels = torch.tensor([r["labels"] for r in several])
        return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}

    arguments = Seq2SeqTrainingArguments(
        str(tmp_path),
        predict_with_generate=True,
        generation_max_length=6,
        per_device_eval_batch_size=2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Seq2SeqTrainer(
        model=qmodel,
        args=arguments,
        eval_dataset=rows,
        data_collator=collated,
        compute_metrics=metrics,
    )
    found = trainer.evaluate()
    assert found["eval_rows"] == 4
    assert seen["labels"][:, 1].tolist() == [8, 9, 10, 11]
    batch = collated(rows[:2])
    expected = qmodel.generate(
        batch["input_ids"], attention_mask=batch["attention_mask"], max_length=6
    )
    assert seen["tokens"][:2, : expected.shape[1]].tolist() == expected.tolist()
