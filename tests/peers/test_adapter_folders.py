"""Adapter folders go both ways: saved here and loaded by PEFT, saved by PEFT and loaded here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import qlora_fx
import pytest
import torch
from qlora_fx import AdapterError
from oracle import ours, random_adapter, reference, relative_error
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from small_models import batch, peer_llama, tiny_gpt2
from transformers import LlamaConfig

pytestmark = pytest.mark.peer

LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}


def logits(model: Any) -> torch.Tensor:
    inputs: dict[str, Any] = dict(batch())
    if isinstance(model, qlora_fx.QLoRAModel):
        inputs["return_logits"] = True
    with torch.no_grad():
        return model(**inputs).logits  # type: ignore[no-any-return]


def transformed(config: LoraConfig | None = None, scale: float = 0.05) -> Any:
    """A model run uncompiled, with a random adapter: folders do not depend on how it runs."""
    config = config or LoraConfig(**LORA)
    model = peer_llama()
    adapter = random_adapter(model, config.r, scale=scale)
    return ours(model, adapter, config, backend="eager")[0]


def test_saved_here_loaded_by_peft(tmp_path: Path) -> None:
    qmodel = transformed()
    qmodel.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    base, _ = reference(peer_llama(), random_adapter(peer_llama(), 4), LoraConfig(**LORA))
    theirs = PeftModel.from_pretrained(base.unload(), tmp_path).train()
    theirs.config.use_cache = False
    assert relative_error(logits(qmodel), logits(theirs)) < 1e-6


def test_saved_by_peft_loaded_here(tmp_path: Path) -> None:
    theirs, _ = reference(
        peer_llama(), random_adapter(peer_llama(), 4, scale=0.05), LoraConfig(**LORA)
    )
    theirs.config.use_cache = False
    theirs.save_pretrained(tmp_path)
    qmodel = qlora_fx.transform(peer_llama(), LoraConfig.from_pretrained(tmp_path), backend="eager")
    before = logits(qmodel)
    qmodel.load_adapter(tmp_path)
    assert relative_error(logits(qmodel), logits(theirs)) < 1e-6
    assert relative_error(before, logits(theirs)) > 1e-3


def test_keys_and_config_are_pefts_own(tmp_path: Path) -> None:
    for name, base in (("llama", peer_llama()), ("gpt2", tiny_gpt2())):
        folder = tmp_path / name
        qmodel = qlora_fx.transform(base, LoraConfig(**LORA), backend="eager")
        qmodel.save_pretrained(folder / "ours")
        peft: Any = get_peft_model(
            peer_llama() if name == "llama" else tiny_gpt2(),
            LoraConfig(**LORA, fan_in_fan_out=name == "gpt2"),
        )
        peft.save_pretrained(folder / "theirs")
        mine, theirs = (
            load_file(folder / who / "adapter_model.safetensors") for who in ("ours", "theirs")
        )
        assert {k: v.shape for k, v in mine.items()} == {k: v.shape for k, v in theirs.items()}
        my_config, their_config = (
            json.loads((folder / who / "adapter_config.json").read_text())
            for who in ("ours", "theirs")
        )
        assert my_config.keys() == their_config.keys()
        for key in ("peft_type", "r", "lora_alpha", "bias", "use_rslora", "inference_mode"):
            assert my_config[key] == their_config[key], key


def test_rank_patterns_and_partial_targets_survive_the_journey(tmp_path: Path) -> None:
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        use_rslora=True,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"down_proj": 2},
        alpha_pattern={"layers.1.self_attn.q_proj": 3},
        init_lora_weights=False,
    )
    qmodel = qlora_fx.transform(peer_llama(), config, backend="eager")
    qmodel.save_pretrained(tmp_path)
    peft = PeftModel.from_pretrained(peer_llama(), tmp_path)
    for name, module in peft.base_model.model.named_modules():
        if isinstance(getattr(module, "scaling", None), dict):
            site = qmodel.base.sites[name]
            assert (module.r["default"], module.scaling["default"]) == (
                site.r,
                pytest.approx(site.scaling),
            )
    again = qlora_fx.transform(peer_llama(), LoraConfig.from_pretrained(tmp_path), backend="eager")
    again.load_adapter(tmp_path)
    assert torch.equal(logits(again), logits(qmodel))


def test_targets_that_leaf_names_cannot_tell_apart_are_saved_in_full(tmp_path: Path) -> None:
    config = LoraConfig(
        r=4, exclude_modules=["model.layers.0.self_attn.q_proj"], target_modules="all-linear"
    )
    qmodel = qlora_fx.transform(peer_llama(), config, backend="eager")
    qmodel.save_pretrained(tmp_path)
    peft: Any = get_peft_model(peer_llama(), LoraConfig.from_pretrained(tmp_path))
    theirs = {
        n.replace(".default", "").removeprefix("base_model.model.")
        for n, _ in peft.named_parameters()
        if "lora_" in n
    }
    assert theirs == {n for n, _ in qmodel.adapter_parameters()}


@pytest.fixture(scope="module")
def current() -> Any:
    return transformed()


def damage(folder: Path, how: str) -> None:
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors = load_file(weights)
    settings = json.loads(config.read_text())
    first = sorted(tensors)[0]
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "garbage":
        weights.write_bytes(b"not safetensors at all")
    elif how == "no weights":
        weights.unlink()
    elif how == "no config":
        config.unlink()
    elif how == "config":
        config.write_text("{")
    elif how == "foreign":
        config.write_text(json.dumps(settings | {"peft_type": "IA3"}))
    elif how == "unsupported":
        config.write_text(json.dumps(settings | {"use_dora": True}))
    elif how == "rank":
        config.write_text(json.dumps(settings | {"r": 8}))
    elif how == "alpha":
        config.write_text(json.dumps(settings | {"lora_alpha": 99}))
    elif how == "missing key":
        save_file({k: v for k, v in tensors.items() if k != first}, weights)
    elif how == "extra key":
        save_file(tensors | {"base_model.model.other.lora_A.weight": torch.ones(1)}, weights)
    elif how == "shape":
        save_file(tensors | {first: torch.ones(3, 3)}, weights)
    elif how == "nan":
        save_file(tensors | {first: torch.full_like(tensors[first], float("nan"))}, weights)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "adapter_model.safetensors cannot be read"),
        ("garbage", "adapter_model.safetensors cannot be read"),
        ("no weights", "has no adapter_model.safetensors"),
        ("no config", "has no adapter_config.json"),
        ("config", "is not JSON"),
        ("foreign", "peft_type='IA3'; accepted: 'LORA'"),
        ("unsupported", "use_dora=True is not supported"),
        ("rank", "rank 8 and scaling 1 there, rank 4 and scaling 2 here"),
        ("alpha", "rank 4 and scaling 24.75 there, rank 4 and scaling 2 here"),
        ("missing key", "missing: base_model.model"),
        ("extra key", "not in this model: base_model.model.other.lora_A.weight"),
        ("shape", r"has shape \[3, 3\]; this model's is"),
        ("nan", "holds NaN or infinity"),
    ],
)
def test_a_damaged_folder_leaves_the_current_adapter_as_it_was(
    tmp_path: Path, current: Any, how: str, message: str
) -> None:
    current.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file({k: v + 1 for k, v in tensors.items()}, tmp_path / "adapter_model.safetensors")
    damage(tmp_path, how)
    before = {k: v.clone() for k, v in current.adapter_state_dict().items()}
    with pytest.raises(AdapterError, match=message):
        current.load_adapter(tmp_path)
    assert all(torch.equal(before[k], v) for k, v in current.adapter_state_dict().items())


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="'nowhere' is not a folder"):
        transformed().load_adapter("nowhere")


def test_an_adapter_that_peft_would_not_apply_is_said_when_it_is_saved(tmp_path: Path) -> None:
    """``nn.MultiheadAttention`` reads the weight of its out_proj, past the module that PEFT puts there."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = LlamaConfig()
            self.mix = torch.nn.MultiheadAttention(64, 2, batch_first=True)
            self.up = torch.nn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            x = self.up(x)
            return {"y": self.mix(x, x, x, need_weights=False)[0]}

    lora = LoraConfig(**(LORA | {"target_modules": ["out_proj", "up"]}))
    inputs = {"x": torch.randn(2, 5, 64)}
    qmodel = qlora_fx.transform(Model(), lora, example_inputs=inputs, backend="eager")
    assert {s.name: s.module_runs for s in qmodel.base.sites.values() if s.adapt} == {
        "mix.out_proj": False,
        "up": True,
    }
    with pytest.warns(
        UserWarning, match=r"in PEFT the adapters of mix\.out_proj have no effect"
    ) as caught:
        qmodel.save_pretrained(tmp_path)
    assert len(caught) == 1
