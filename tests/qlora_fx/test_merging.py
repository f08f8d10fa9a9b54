"""merge: ordinary checkpoints that agree with the adapter model within the error that is reported."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import qlora_fx
import pytest
import torch
from qlora_fx import CheckpointError, ConfigError, InputError
from checkpoints import EAGER, MODELS, save, tiny_mixtral
from peft import LoraConfig
from qlora_fx.merging.values import MODES
from safetensors.torch import load_file
from slow import only_slow_but
from small_models import VOCABULARY, batch, peer_llama, tiny_gpt2, tiny_llama
from transformers import AutoModelForCausalLM

LORA: dict[str, Any] = {
    "r": 3,
    "lora_alpha": 6,
    "init_lora_weights": False,
    "target_modules": "all-linear",
}


def sample() -> dict[str, torch.Tensor]:
    return {k: v for k, v in batch().items() if k != "labels"}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model.eval()(**sample()).logits.float()
    return out


def loaded(build: Callable[[], Any], tmp_path: Path, **options: Any) -> Any:
    """A model from a folder, with an adapter that is no no-op."""
    torch.manual_seed(1)
    return qlora_fx.from_pretrained(
        save(build(), tmp_path / "base", max_shard_size="40KB"),
        LoraConfig(**LORA),
        **EAGER,
        **options,
    )


BUILD: dict[str, Callable[[], Any]] = {
    "llama": lambda: tiny_llama(1),
    "tied": MODELS["tied"],
    "gpt2": tiny_gpt2,
    "mixtral": tiny_mixtral,
    "bfloat16": MODELS["bfloat16"],
}


@pytest.mark.parametrize(
    ("mode", "name"),
    only_slow_but(
        [("dequantized", "llama"), ("dequantized", "tied"), ("base16", "mixtral")],
        [*(("dequantized", name) for name in BUILD), ("base16", "gpt2"), ("base16", "mixtral")],
    ),
)
def test_transformers_loads_what_is_merged_and_agrees_within_the_reported_drift(
    mode: str, name: str, tmp_path: Path
) -> None:
    qmodel = loaded(BUILD[name], tmp_path)
    report = qmodel.merge(tmp_path / "merged", mode, sample=sample(), max_shard_size="40KB")
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype="auto", output_loading_info=True
    )
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    saved = [sorted(load_file(f)) for f in sorted((tmp_path / "merged").glob("*.safetensors"))]
    base = [sorted(load_file(f)) for f in sorted((tmp_path / "base").glob("*.safetensors"))]
    assert sorted(chain(*saved)) == sorted(chain(*base)), "the names are the checkpoint's own"
    before, after = logits(qmodel), logits(model)
    mask = sample()["attention_mask"].bool()
    difference = (after - before)[mask].abs()
    assert report.drift is not None
    assert float(difference.max()) == pytest.approx(report.drift.largest, rel=0.02, abs=1e-6)
    assert float(difference.norm() / before[mask].norm()) == pytest.approx(
        report.drift.relative, rel=0.02, abs=1e-6
    )
    worst = max(report.errors.values())
    if mode == "base16":
        assert 0.01 < worst < 0.15  # what 4 bits cost
    elif name == "bfloat16":
        assert 1e-4 < worst < 4e-3
    else:
        assert worst < 1e-6
        assert report.drift.relative < 1e-5
        assert report.drift.agreement == 1.0
    adapted = {s.weight for s in qmodel.base.sites.values() if s.adapt}
    assert adapted <= {qmodel.base.skeleton.keys[n] for n in report.errors}


def test_base16_is_the_original_weight_plus_the_adapter(tmp_path: Path) -> None:
    model = peer_llama(1)
    qmodel = qlora_fx.from_pretrained(save(model, tmp_path / "base"), LoraConfig(**LORA), **EAGER)
    qmodel.merge(tmp_path / "merged", "base16", sample=False)
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    for name, p in model.named_parameters():
        path = name.removesuffix(".weight")
        true = p.detach()
        if f"{path}.lora_A.weight" in qmodel.base.store:
            a, b = (qmodel.base.store[f"{path}.lora_{x}.weight"].detach() for x in "AB")
            true = true + 2.0 * b @ a
        torch.testing.assert_close(merged[name], true, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_requantized_loads_and_agrees_within_the_reported_drift(name: str, tmp_path: Path) -> None:
    build: Any = (lambda: peer_llama(1)) if name == "llama" else BUILD[name]
    qmodel = loaded(build, tmp_path)
    if name == "mixtral":
        with pytest.warns(UserWarning, match="own format"):
            report = qmodel.merge(tmp_path / "merged", "requantized", sample=sample())
    else:
        report = qmodel.merge(tmp_path / "merged", "requantized", sample=sample())
    again = qlora_fx.from_pretrained(tmp_path / "merged", **EAGER)
    with again.disable_adapter():
        after = logits(again)
    assert report.drift is not None
    mask = sample()["attention_mask"].bool()
    difference = (after - logits(qmodel))[mask].abs()
    assert float(difference.max()) == pytest.approx(report.drift.largest, rel=0.02, abs=1e-6)
    assert 0.02 < max(report.errors.values()) < 0.15
    if name == "llama":
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        with torch.no_grad():
            theirs = model.train()(**sample()).logits
        torch.testing.assert_close(theirs, after, rtol=1e-4, atol=1e-5)


def test_requantized_leaves_what_has_no_adapter_byte_for_byte(tmp_path: Path) -> None:
    lora = LoraConfig(**LORA | {"target_modules": ["q_proj"]})
    qmodel = qlora_fx.transform(peer_llama(1), lora, backend="eager")
    qmodel.save_quantized(tmp_path / "q")
    qmodel.merge(tmp_path / "m", "requantized", sample=False)
    before, after = (load_file(tmp_path / f / "model.safetensors") for f in "qm")
    changed = {k for k in before if not torch.equal(before[k], after[k]) and "quant_state" not in k}
    assert {k.split(".weight")[0] for k in changed} == {"model.layers.0.self_attn.q_proj"}


def test_a_report_prints_every_layer_and_the_drift(tmp_path: Path) -> None:
    qmodel = loaded(tiny_llama, tmp_path)
    report = qmodel.merge(None)
    text = str(report)
    assert "model.layers.{0..1}.self_attn.q_proj.weight: " in text
    assert "64 random tokens (no tokenizer beside the checkpoint)" in text
    assert report.folder is None
    assert "not compared" in str(qmodel.merge(None, sample=False))


def test_text_is_a_sample_where_there_is_a_tokenizer(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = save(tiny_llama(1), tmp_path / "base")
    words = {w: i for i, w in enumerate(["[UNK]", "the", "quick", "brown", "fox"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    qmodel = qlora_fx.from_pretrained(folder, LoraConfig(**LORA), **EAGER)
    report = qmodel.merge(tmp_path / "m", sample="the quick brown fox")
    assert report.drift is not None
    assert report.drift.sample == "4 tokens of sample text"
    assert (tmp_path / "m" / "tokenizer.json").is_file()


# -- what is refused ----------------------------------------------------------------------------------


def test_what_cannot_be_merged_is_refused(tmp_path: Path) -> None:
    qmodel = loaded(lambda: tiny_llama(1), tmp_path)
    for options, error, message in (
        (
            {"mode": "half"},
            ConfigError,
            r"mode='half'; accepted: 'dequantized', 'base16', 'requantized'",
        ),
        ({"sample": "text"}, InputError, "needs a tokenizer"),
        ({"max_shard_size": "big"}, ConfigError, "max_shard_size"),
        ({"mode": "base16", "base": tmp_path / "nowhere"}, CheckpointError, "not there"),
    ):
        with pytest.raises(error, match=message):
            qmodel.merge(tmp_path / "m", **options)  # type: ignore[arg-type]
    other = save(tiny_llama(1, initializer_range=0.1), tmp_path / "other")
    with pytest.raises(CheckpointError, match="is not what this model was quantized from"):
        qmodel.merge(tmp_path / "m", "base16", base=other)
    with pytest.raises(ConfigError, match="pass base="):
        qlora_fx.transform(tiny_llama(1), backend="eager").merge(tmp_path / "m", "base16")
    qmodel.save_quantized(tmp_path / "q")
    with pytest.raises(CheckpointError, match="is in 4 bits"):
        qmodel.merge(tmp_path / "m", "base16", base=tmp_path / "q")
    assert not (tmp_path / "m").exists()
    assert set(MODES) == {"dequantized", "base16", "requantized"}


def test_an_adapter_on_a_tied_head_is_not_merged_into_the_embedding(tmp_path: Path) -> None:
    lora = LoraConfig(**LORA | {"target_modules": ["lm_head"]})
    qmodel = qlora_fx.transform(tiny_llama(1, tie_word_embeddings=True), lora, backend="eager")
    with pytest.raises(
        ConfigError, match=r"lm_head is adapted.*model.embed_tokens.weight.*act on all of them"
    ):
        qmodel.merge(tmp_path / "m")


def test_a_merge_that_fails_leaves_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora_fx.merging.values import Merged

    qmodel = loaded(lambda: tiny_llama(1), tmp_path)
    qmodel.merge(tmp_path / "m", sample=False)
    before = {p.name: p.read_bytes() for p in (tmp_path / "m").iterdir()}
    original, calls = Merged.parameter, 0

    def interrupted(self: Merged, *args: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls > 12:
            raise KeyboardInterrupt
        return original(self, *args)

    monkeypatch.setattr(Merged, "parameter", interrupted)
    with pytest.raises(KeyboardInterrupt):
        qmodel.merge(tmp_path / "m", sample=False)
    assert {p.name: p.read_bytes() for p in (tmp_path / "m").iterdir()} == before
    assert not list(tmp_path.glob(".*"))
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["vocab_size"] == VOCABULARY
