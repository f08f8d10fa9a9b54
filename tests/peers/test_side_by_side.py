"""Adapters of other ranks, scalings and targets over one base, beside PEFT's own over the same weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import qlora_fx
import pytest
import torch
from qlora_fx import AdapterError, ConfigError
from families import FAMILIES, build
from oracle import with_stored_values
from peft import LoraConfig, PeftModel
from qlora_fx.testing import compare, randomize_adapter
from slow import only_slow_but
from small_models import batch, tiny_llama

ALL = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
FEW = {
    "r": 6,
    "lora_alpha": 3,
    "target_modules": ["q_proj", "down_proj"],
    "rank_pattern": {"layers.1.mlp.down_proj": 2},
    "use_rslora": True,
    "task_type": "CAUSAL_LM",
}


def made(backend: str = "eager", **changes: Any) -> tuple[Any, Any]:
    model = tiny_llama(2)
    qmodel: Any = qlora_fx.transform(
        copy.deepcopy(model),
        LoraConfig(**(ALL | changes)),
        compute_dtype=torch.float32,
        backend=backend,
    )
    randomize_adapter(qmodel)
    return model, qmodel


def with_few(qmodel: Any, name: str = "few") -> None:
    qmodel.add_adapter(name, LoraConfig(**FEW))
    qmodel.set_adapter(name)
    randomize_adapter(qmodel)


def whole(qmodel: Any) -> list[Any]:
    """Shapes of adapters that have graphs of the whole model."""
    return [shape for shape, path in qmodel.adapter_graphs.of_shape if not path]


@pytest.mark.parametrize("backend", only_slow_but(["eager"], ["eager", "inductor"]))
def test_each_computes_and_trains_as_if_it_were_alone(backend: str) -> None:
    """Beside float64; the first is as it was, and what is captured already is not captured again."""
    model, qmodel = made(backend)
    values = batch()
    first = qmodel(**values).loss
    with_few(qmodel)
    report = compare(model, qmodel, values)
    assert report.passed, report
    assert {line.name for line in report.sites if line.norm > 0} == {
        f"model.layers.{i}.{name}" for i in (0, 1) for name in ("self_attn.q_proj", "mlp.down_proj")
    }
    assert not [key for key, _ in qmodel.base.store.items() if "k_proj.lora" in key]
    graphs = len(qmodel.graph_modules)
    qmodel.set_adapter("default")
    assert torch.equal(qmodel(**values).loss, first)
    report = compare(model, qmodel, values)
    assert report.passed, report
    assert len(report.sites) == 14
    qmodel.add_adapter("same", LoraConfig(**FEW))
    qmodel.set_adapter("same")
    qmodel(**values)
    assert len(whole(qmodel)) == 2
    assert len(qmodel.graph_modules) == graphs
    for name in ("few", "default", "same"):
        qmodel.set_adapter(name)
        with qmodel.disable_adapter():
            without = qmodel(**values).loss
        if name == "same":
            torch.testing.assert_close(qmodel(**values).loss, without), "lora_B is zero"
    captured = [s for programs in qmodel.all_programs for s in programs.captured]
    assert [s.adapter for s in captured].count(False) == 1, "whichever is active"
    qmodel.set_adapter("default")
    qmodel.delete_adapter("few")
    assert len(whole(qmodel)) == 2
    qmodel.delete_adapter("same")
    assert len(whole(qmodel)) == 1


def test_another_scaling_and_another_dropout_are_other_graphs() -> None:
    model, qmodel = made()
    values = batch()
    qmodel(**values)
    for name, changes in (("louder", {"lora_alpha": 40}), ("dropping", {"lora_dropout": 0.5})):
        qmodel.add_adapter(name, LoraConfig(**(ALL | changes)))
        qmodel.set_adapter(name)
        randomize_adapter(qmodel)
        if name == "louder":
            report = compare(model, qmodel, values)
            assert report.passed, report
        else:
            assert not torch.equal(qmodel(**values).loss, qmodel(**values).loss)
    qmodel.set_adapter("default")
    assert torch.equal(qmodel(**values).loss, qmodel(**values).loss)


def test_all_linear_beside_an_adapter_of_the_head_leaves_the_head_out() -> None:
    _, qmodel = made(target_modules=["q_proj", "lm_head"])
    qmodel.add_adapter("other", LoraConfig(**ALL))
    qmodel.set_adapter("other")
    adapted = {site.name.rsplit(".", 1)[-1] for site in qmodel.base.sites.values() if site.adapt}
    assert adapted == {"q_proj"}


def test_the_backbone_has_graphs_for_each() -> None:
    """TRL calls it for itself, and switches with adapters disabled."""
    _, qmodel = made()
    ids = batch(padded=0)["input_ids"]
    twin = qmodel.get_base_model()

    def agrees() -> None:
        with torch.no_grad():
            hidden = twin.base_model(ids).last_hidden_state
            torch.testing.assert_close(twin.lm_head(hidden), qmodel.eval()(ids).logits)

    agrees()
    with_few(qmodel)
    agrees()
    qmodel.set_adapter("default")
    with qmodel.disable_adapter():
        agrees()
        qmodel.set_adapter("few")
        agrees()
    agrees()
    qmodel.set_adapter("default")
    agrees()
    assert len(qmodel.adapter_graphs.of_shape) == 4


def test_a_part_that_ran_without_adapters_first_has_the_active_one_afterwards() -> None:
    """A reference model's pass comes first in preference training."""
    _, qmodel = made()
    qmodel.add_adapter("other", LoraConfig(**ALL))
    qmodel.set_adapter("other")
    randomize_adapter(qmodel, seed=2)
    ids = batch(padded=0)["input_ids"]
    twin = qmodel.eval().get_base_model()
    with torch.no_grad():
        with qmodel.disable_adapter():
            twin.base_model(ids)
        hidden = twin.base_model(ids).last_hidden_state
        torch.testing.assert_close(twin.lm_head(hidden), qmodel(ids).logits)


def test_folders_go_to_peft_and_come_back(tmp_path: Path) -> None:
    model, qmodel = made()
    with_few(qmodel)
    qmodel.save_pretrained(tmp_path)
    values = batch(padded=0)
    del values["labels"]
    theirs_of: dict[str, Any] = {}
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(with_stored_values(model, qmodel), tmp_path)
        theirs.load_adapter(tmp_path / "few", "few")
        for name in ("default", "few"):
            theirs.set_adapter(name)
            qmodel.set_adapter(name)
            theirs_of[name] = theirs.eval()(**values).logits
            torch.testing.assert_close(
                qmodel.eval()(**values).logits, theirs_of[name], rtol=1e-4, atol=1e-5
            )
    _, again = made()
    again.load_adapter(tmp_path / "few", "few")
    again.load_adapter(tmp_path)
    for name, logits in theirs_of.items():
        again.set_adapter(name)
        with torch.no_grad():
            torch.testing.assert_close(again.eval()(**values).logits, logits, rtol=1e-4, atol=1e-5)
    assert again.peft_config["few"].r == again.lora_config.r == 6
    with pytest.raises(AdapterError, match="rank 6 and scaling"):
        again.load_adapter(tmp_path / "few", "default")


def test_what_is_merged_is_the_adapter_that_is_used(tmp_path: Path) -> None:
    model, qmodel = made()
    values = batch(padded=0)
    del values["labels"]
    with_few(qmodel)
    for name in ("few", "default"):
        qmodel.set_adapter(name)
        qmodel.merge(tmp_path / name, sample=False)
        merged = type(model).from_pretrained(tmp_path / name).eval()
        with torch.no_grad():
            torch.testing.assert_close(
                merged(**values).logits, qmodel.eval()(**values).logits, rtol=1e-3, atol=1e-4
            )


def test_experts_of_another_rank(tmp_path: Path) -> None:
    """Stacks are parameters to PEFT, and all of them adapted or none."""
    family = next(f for f in FAMILIES if f.model_type == "mixtral")
    model = build(family).train()
    values = family.batch(3, 21)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    qmodel: Any = qlora_fx.transform(
        copy.deepcopy(model), config, compute_dtype=torch.float32, backend="eager"
    )
    qmodel.add_adapter("wide", LoraConfig(r=8, lora_alpha=8, target_modules="all-linear"))
    qmodel.set_adapter("wide")
    randomize_adapter(qmodel)
    report = compare(model, qmodel, values)
    assert report.passed, report
    assert min(line.norm for line in report.sites) > 0
    qmodel.save_pretrained(tmp_path)
    again: Any = qlora_fx.transform(
        copy.deepcopy(model), config, compute_dtype=torch.float32, backend="eager"
    )
    again.load_adapter(tmp_path / "wide", "wide")
    again.set_adapter("wide")
    assert torch.equal(again(**values).loss, qmodel(**values).loss)
    with pytest.raises(ConfigError, match="adapts the parameters"):
        qmodel.add_adapter("few", LoraConfig(r=8, target_modules=["q_proj"]))


@pytest.mark.parametrize(
    ("first", "config", "said"),
    [
        (
            ["q_proj"],
            {"target_modules": ["q_proj", "k_proj"]},
            "which the first adapter leaves out",
        ),
        ("all-linear", {"r": 4096, "target_modules": ["q_proj"]}, "r=4096 is larger"),
        ("all-linear", {"target_modules": ["z_proj"]}, "matches no linear"),
        ("all-linear", {"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\] beside"),
        ("all-linear", {"bias": "all"}, "bias='all' beside an adapter with bias='none'"),
        ("all-linear", {"use_dora": True}, "use_dora=True is not supported"),
    ],
)
def test_what_does_not_go_beside_the_first_is_told(first: Any, config: Any, said: str) -> None:
    _, qmodel = made(target_modules=first)
    with pytest.raises(ConfigError, match=rf"(?s)adapter 'other'.*{said}"):
        qmodel.add_adapter("other", LoraConfig(**(ALL | config)))
    assert list(qmodel.named_adapters.bases) == ["default"]
