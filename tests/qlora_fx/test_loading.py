"""from_pretrained: the same model as transform makes, from a folder's files."""

from __future__ import annotations

import dataclasses
import gc
import json
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import qlora_fx
import pytest
import torch
import transformers
from qlora_fx import CheckpointError, ConfigError
from checkpoints import EAGER, MODELS, assert_same_store, save
from families import FAMILIES, build
from packaging.version import Version
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from slow import only_slow_but
from small_models import batch, tiny_llama
from transformers import AutoModelForCausalLM, LlamaForCausalLM


@pytest.mark.parametrize("name", only_slow_but(["tied", "gpt2", "mixtral"], MODELS))
def test_a_folder_gives_the_bytes_that_transform_gives(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    folder = save(model, tmp_path / "model", max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    qmodel = qlora_fx.from_pretrained(folder, **EAGER)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    reference = qlora_fx.transform(loaded, backend="eager")
    assert_same_store(qmodel, reference)
    assert (
        str(qlora_fx.explain(qmodel)).splitlines()[5:]
        == str(qlora_fx.explain(reference)).splitlines()[5:]
    )
    inputs = batch()
    with qmodel.disable_adapter(), reference.disable_adapter(), torch.no_grad():
        assert torch.equal(qmodel.eval()(**inputs).logits, reference.eval()(**inputs).logits)


def test_a_loaded_model_trains(tmp_path: Path) -> None:
    qmodel = qlora_fx.from_pretrained(
        save(tiny_llama(), tmp_path / "m"), LoraConfig(r=4, target_modules="all-linear"), **EAGER
    )
    assert qmodel.training
    qmodel(**batch()).loss.backward()
    grads = [p.grad for _, p in qmodel.adapter_parameters()]
    assert len(grads) == 28
    assert all(g is not None for g in grads)


@pytest.mark.parametrize("name", only_slow_but(["gpt2"], MODELS))
def test_for_generation_the_prompt_is_captured_first(name: str, tmp_path: Path) -> None:
    """The same weights and adapters are decided by it, ``generate`` finds it, and training is what it is otherwise."""
    folder = save(MODELS[name](), tmp_path / "m")
    qmodel = qlora_fx.from_pretrained(folder, training=False, **EAGER)
    reference = qlora_fx.from_pretrained(folder, **EAGER)
    assert not qmodel.training
    assert_same_store(qmodel, reference)
    found, expected = qmodel.base.sites, reference.base.sites
    assert found.keys() == expected.keys()
    for site in found:
        assert dataclasses.replace(found[site], flops=0) == dataclasses.replace(
            expected[site], flops=0
        )
    ids = torch.randint(5, 90, (1, 12), generator=torch.Generator().manual_seed(0))
    tokens = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(
        qmodel.generate(input_ids=ids, **tokens), reference.eval().generate(input_ids=ids, **tokens)
    )
    if Version(transformers.__version__) >= Version("5.23"):  # 5.17 gives a mask of ones, too
        assert len(qmodel.graph_modules) == 1, "generate makes the call that was captured"
    reference.load_state_dict(qmodel.state_dict())
    gradients = []
    for model in (qmodel.train(), reference.train()):
        model(**batch()).loss.backward()
        gradients.append([p.grad for _, p in model.adapter_parameters()])
    for mine, true in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, true, rtol=0, atol=0)
    assert any(bool(g.any()) for g in gradients[0])
    with pytest.raises(ConfigError, match="training='no'; accepted: True, False"):
        qlora_fx.from_pretrained(folder, training="no", **EAGER)


@pytest.mark.parametrize("model_type", only_slow_but(["t5"], ["t5", "bert", "vit"]))
def test_for_generation_a_model_without_such_a_prompt_is_called_as_it_can_be(
    model_type: str,
) -> None:
    """An encoder-decoder, and models that do not generate."""
    family = next(f for f in FAMILIES if f.model_type == model_type)
    qmodel = qlora_fx.transform(build(family), training=False, backend="eager")
    values = {k: v for k, v in family.batch(2, 11).items() if k != "labels"}
    if model_type == "t5":
        values["decoder_input_ids"] = values["input_ids"][:, :5]
    assert qmodel(**values) is not None
    assert len(qmodel.graph_modules) == 1
    qmodel.train()(**family.batch(2, 11)).loss.backward()
    assert any(p.grad.any() for _, p in qmodel.adapter_parameters())


def test_the_dtype_asked_for_is_cast_to_before_quantizing(tmp_path: Path) -> None:
    folder = save(tiny_llama(), tmp_path / "m")
    qmodel = qlora_fx.from_pretrained(folder, dtype=torch.bfloat16, **EAGER)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert_same_store(qmodel, qlora_fx.transform(reference, backend="eager"))


def test_a_head_that_the_config_ties_and_the_file_repeats_is_tied(tmp_path: Path) -> None:
    folder = save(tiny_llama(tie_word_embeddings=True), tmp_path / "m")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, file, {"format": "pt"})
    assert "lm_head.weight" not in dict(
        qlora_fx.from_pretrained(folder, **EAGER).base.store.items()
    )
    tensors["lm_head.weight"] += 1
    save_file(tensors, file, {"format": "pt"})
    with pytest.warns(UserWarning, match="different values; they are not tied"):
        qmodel = qlora_fx.from_pretrained(folder, **EAGER)
    assert torch.equal(qmodel.base.store["lm_head.weight"], tensors["lm_head.weight"])


def test_a_base_model_checkpoint_gets_its_prefix(tmp_path: Path) -> None:
    """A head is missing then, which is refused rather than made up."""
    folder = save(tiny_llama().model, tmp_path / "m")
    with pytest.raises(
        CheckpointError, match=r"lacks 1 tensors of LlamaForCausalLM, the first lm_head.weight"
    ):
        qlora_fx.from_pretrained(folder, model_class=LlamaForCausalLM, **EAGER)


# -- what is refused ----------------------------------------------------------------------------------


def edited(folder: Path, change: Any) -> None:
    """Change the tensors of the first shard."""
    file = sorted(folder.glob("*.safetensors"))[0]
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def without(key: str) -> Any:
    return lambda tensors: tensors.pop(key)


def with_(key: str, tensor: torch.Tensor) -> Any:
    return lambda tensors: tensors.update({key: tensor})


NORM = "model.layers.0.input_layernorm.weight"
Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(NORM), rf"lacks 1 tensors of LlamaForCausalLM, the first {NORM}"),
        (with_("model.extra", torch.ones(2)), r"model.extra in .*model.safetensors has no place"),
        (
            with_(Q, torch.ones(64, 47)),
            rf"{Q} in .*model.safetensors has shape \[64, 47\]; .* is \[64, 48\]",
        ),
        (
            with_(Q, torch.ones(64, 48).to(torch.int32)),
            rf"{Q} in .* has dtype torch.int32; .* 16-, 32-",
        ),
        (
            with_(Q, torch.ones(64, 48).to(torch.float8_e4m3fn)),
            rf"{Q} in .* has dtype torch.float8_e4m3fn",
        ),
        (
            with_(Q, torch.full((64, 48), torch.nan)),
            rf"{Q} in .* has values that are NaN or infinite",
        ),
        (
            with_(NORM, torch.full((48,), torch.inf)),
            rf"{NORM} in .* has values that are NaN or infinite",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named_with_their_file(
    change: Any, message: str, tmp_path: Path
) -> None:
    folder = save(tiny_llama(1), tmp_path / "m")
    edited(folder, change)
    with pytest.raises(CheckpointError, match=message):
        qlora_fx.from_pretrained(folder, **EAGER)


def test_a_truncated_shard_is_refused_at_any_length(tmp_path: Path) -> None:
    folder = save(tiny_llama(), tmp_path / "m", max_shard_size="40KB")
    shard = sorted(folder.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    for length in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        shard.write_bytes(whole[:length])
        message = (
            rf"{shard.name} is truncated: it has {length} bytes, and .* needs"
            if length > 5000
            else shard.name
        )
        with pytest.raises(CheckpointError, match=message):
            qlora_fx.from_pretrained(folder, **EAGER)
    shard.write_bytes(whole + b"x")
    with pytest.raises(CheckpointError, match=rf"{shard.name} has {len(whole) + 1} bytes"):
        qlora_fx.from_pretrained(folder, **EAGER)


def test_an_index_that_is_not_true_is_refused(tmp_path: Path) -> None:
    folder = save(tiny_llama(), tmp_path / "m", max_shard_size="40KB")
    index = folder / "model.safetensors.index.json"
    true = json.loads(index.read_text())

    def claim(key: str, file: Any) -> None:
        index.write_text(json.dumps(true | {"weight_map": true["weight_map"] | {key: file}}))

    shards = sorted({*true["weight_map"].values()})
    other = next(s for s in shards if s != true["weight_map"][Q])
    for key, file, message in (
        (Q, other, rf"{Q} is (not )?in .*{'|'.join(shards)}"),
        ("nothing", other, r"nothing is not in"),
        (
            Q,
            "gone.safetensors",
            r"gone.safetensors is not there; .* has model.layers.0.self_attn.q_proj.weight",
        ),
        (Q, "../m.safetensors", "in the same folder"),
        (Q, "pytorch_model.bin", "in the same folder"),
        (Q, 3, "in the same folder"),
    ):
        claim(key, file)
        with pytest.raises(CheckpointError, match=message):
            qlora_fx.from_pretrained(folder, **EAGER)
    index.write_text("{")
    with pytest.raises(CheckpointError, match="not readable JSON"):
        qlora_fx.from_pretrained(folder, **EAGER)


def test_pickles_are_not_read(tmp_path: Path) -> None:
    folder = save(tiny_llama(), tmp_path / "m")
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin is a pickle.*convert it once"):
        qlora_fx.from_pretrained(folder, **EAGER)


def test_what_is_no_checkpoint_is_refused_with_what_is_accepted(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not there; accepted: a folder"):
        qlora_fx.from_pretrained(tmp_path / "nowhere", **EAGER)
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="is no folder"):
        qlora_fx.from_pretrained(tmp_path / "file", **EAGER)
    with pytest.raises(CheckpointError, match=r"has no config.json \(it has: file\)"):
        qlora_fx.from_pretrained(tmp_path, **EAGER)
    folder = save(tiny_llama(), tmp_path / "m")
    for changes, message in (
        ({"architectures": ["Nonsense"]}, "accepted: a class of transformers"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quant_method='gptq'"),
    ):
        config = json.loads((folder / "config.json").read_text())
        changed = shutil.copytree(folder, tmp_path / "changed", dirs_exist_ok=True)
        (changed / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(ConfigError, match=message):
            qlora_fx.from_pretrained(changed, **EAGER)
    with pytest.raises(ConfigError, match=r"dtype=torch.int8; accepted"):
        qlora_fx.from_pretrained(folder, dtype="int8", **EAGER)


def test_an_interrupted_load_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora_fx.runtime.safetensors_reader import Shards

    folder = save(tiny_llama(), tmp_path / "m", max_shard_size="40KB")
    before = sorted(p.name for p in tmp_path.rglob("*"))
    made: list[weakref.ref[Any]] = []
    pieces = Shards.pieces

    def interrupted(self: Shards, name: str, *rest: Any) -> Iterator[torch.Tensor]:
        made.append(weakref.ref(self))
        if "layers.1" in name:
            raise KeyboardInterrupt
        yield from pieces(self, name, *rest)

    monkeypatch.setattr(Shards, "pieces", interrupted)
    with pytest.raises(KeyboardInterrupt):
        qlora_fx.from_pretrained(folder, **EAGER)
    assert made
    assert made[0]() is None or made[0]().files == {}  # type: ignore[union-attr]
    gc.collect()
    assert made[0]() is None
    assert sorted(p.name for p in tmp_path.rglob("*")) == before
    monkeypatch.undo()
    assert qlora_fx.from_pretrained(folder, **EAGER)(**batch()).loss > 0
