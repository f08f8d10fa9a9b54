"""Every model type of the table, taken along the path that its users take (default_path.py).

T5 takes its training step, at two shapes, in the default run; twelve that differ most and then all others take
the whole of it in ``make test-all``. A part of them:
``pytest -m slow tests/test_default_path.py -k "gemma or qwen"``. What deviates is listed here with its reason; anything else that
falls back, is captured again or is refused is a failure.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import qlora_fx
import pytest
import torch
from default_path import DECODERS, SPECIAL, STEPS, Walk, walk
from families import ALL, FAMILIES, NOT_TRIED, Family, build
from families.exceptions import (
    CAPTURED_AGAIN,
    NO_CHECKPOINT,
    NO_PEFT,
    NOT_GENERATED,
    REFUSED,
    ROUNDING,
    SAID,
)
from qlora_fx.capture.cache import START, caches
from qlora_fx.capture.cache_layers import Buffers, GrowingLayer
from qlora_fx.tested_versions import TESTED, minor
from qlora_fx.testing import randomize_adapter
from slow import only_slow_but
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

BY_TYPE = {f.model_type: f for f in FAMILIES}
TWELVE = (
    *("llama", "gpt2", "t5", "bert", "deepseek_v3", "gpt_oss", "qwen3_5_text", "nemotron_h"),
    *("lfm2", "gemma3", "whisper", "vit"),
)


def check(family: Family, steps: tuple[str, ...] = STEPS, **options: Any) -> None:
    model_type = family.model_type
    left_out = set()
    if model_type in NO_PEFT:
        left_out.add("peft")
    if model_type in NO_CHECKPOINT:
        left_out.add("checkpoint")
    if model_type in NOT_GENERATED:
        left_out.add("generate")
    result = walk(family, steps=tuple(s for s in steps if s not in left_out), **options)
    if model_type in REFUSED:
        assert REFUSED[model_type] in result.error, result.error
        return
    assert not result.error, result.error
    said = unexpected(model_type, result)
    assert not said, said


def unexpected(model_type: str, result: Walk) -> list[str]:
    """What was said on the way that no list expects."""
    found = [message for messages in result.said.values() for message in messages]
    if model_type in CAPTURED_AGAIN:
        assert any(m.startswith("capturing") for m in found), "is not captured again any more"
        found = [m for m in found if not m.startswith("capturing")]
    return [m for m in found if not any(words in m for words in SAID.get(model_type, ()))]


@pytest.mark.parametrize("backend", only_slow_but(["aot_eager"], ["aot_eager", "inductor"]))
def test_a_compiled_step_at_two_shapes(backend: str) -> None:
    family = replace(BY_TYPE["t5"], config=BY_TYPE["t5"].config | {"num_layers": 1})
    check(family, steps=("shape",), backend=backend)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", TWELVE)
def test_twelve_that_differ_most(model_type: str) -> None:
    check(BY_TYPE[model_type])


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [t for t in BY_TYPE if t not in TWELVE])
def test_a_model_type(model_type: str) -> None:
    check(BY_TYPE[model_type])


def test_every_model_type_of_transformers_is_in_the_table_or_has_a_reason() -> None:
    passing = BY_TYPE.keys() - REFUSED.keys()
    assert len(passing) >= 120
    tried = {f.model_type for f in ALL}
    assert not tried & NOT_TRIED.keys()
    assert tried | NOT_TRIED.keys() >= set(CONFIG_MAPPING_NAMES)
    if minor(version("transformers")) == minor(TESTED["transformers"][1]):  # older ones lack some
        assert tried | NOT_TRIED.keys() == set(CONFIG_MAPPING_NAMES)
    for listed in (CAPTURED_AGAIN, NO_CHECKPOINT, NO_PEFT, NOT_GENERATED, REFUSED, ROUNDING, SAID):
        assert set(listed) <= tried
    print(
        f"{len(CONFIG_MAPPING_NAMES)} model types: {len(passing)} pass, {len(REFUSED)} refused with a reason, "
        f"{len(NOT_TRIED)} not tried"
    )


@pytest.mark.slow
def test_the_walk_notices_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient that is lost on the way, a cache that loses its tokens, an adapter that PEFT would not find."""
    import default_path

    def zero(qmodel: Any) -> None:
        with torch.no_grad():
            for _, parameter in qmodel.adapter_parameters():
                parameter.zero_()

    monkeypatch.setattr(default_path, "randomize_adapter", zero)
    result = walk(BY_TYPE["gpt2"], steps=(), backend="eager")
    assert result.error.startswith("train: Wrong"), result.error
    monkeypatch.undo()

    def empty(layer: GrowingLayer) -> tuple[torch.Tensor, ...]:
        return tuple(torch.zeros_like(t) for t in past(layer))

    past = GrowingLayer.past
    monkeypatch.setattr(GrowingLayer, "past", empty)
    result = walk(BY_TYPE["gpt2"], steps=("generate",), backend="eager")
    assert result.error.startswith("generate: Wrong"), result.error
    monkeypatch.undo()

    def not_rounded(model: torch.nn.Module, qmodel: object) -> torch.nn.Module:
        return copy.deepcopy(model)

    monkeypatch.setattr(default_path, "with_stored_values", not_rounded)
    result = walk(BY_TYPE["gpt2"], steps=("eval", "peft"), backend="eager")
    assert result.error.startswith("peft: Wrong"), result.error


NO_RING = ("bloom", "gpt_neo", "mllama_text_model", "mpt", "trocr", "xglm")
"""Their calls do not say where tokens stand, or their tables are shorter than a cache's room."""


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [t for t, f in BY_TYPE.items() if f.kind in DECODERS])
def test_a_cache_of_fixed_room_gives_the_logits_of_one_that_grows(model_type: str) -> None:
    family = BY_TYPE[model_type]
    model = build(family).eval()
    if not caches(model) or model_type in NOT_GENERATED:
        pytest.skip("has no cache that graphs take")
    qmodel: Any = qlora_fx.transform(
        model, example_inputs=family.batch(3, 21), compute_dtype="float32", backend="eager"
    )
    randomize_adapter(qmodel)
    ids = family.batch(3, 21)["input_ids"][:2, :9]
    told = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": 4}
    told |= {"output_logits": True, "return_dict_in_generate": True, "suppress_tokens": SPECIAL}
    expected = qmodel.generate(ids, **told).logits
    qmodel.programs.buffers = Buffers()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="cuda_graphs: tokens of .* are not recorded")
        found = qmodel.generate(ids, **told).logits
    for mine, true in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, true, rtol=0, atol=1e-5 * float(true.abs().max()))
    taken = qmodel.programs.buffers is not None and any(START in n for n in qmodel.graph_modules)
    assert taken is (model_type not in NO_RING)
