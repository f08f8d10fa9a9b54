"""No dequantized frozen weight crosses from forward to backward; the idle model holds each weight once."""

from __future__ import annotations

from typing import Any

import qlora_fx
import pytest
import torch
from peft import LoraConfig
from qlora_fx.compiler.pipeline import OPTIONAL
from qlora_fx.passes.lowering import partition
from small_models import batch, tiny_llama
from torch import fx

LORA = LoraConfig(r=4, target_modules="all-linear")


def saved_for_backward(monkeypatch: pytest.MonkeyPatch, frozen_marked: bool) -> list[list[fx.Node]]:
    """What each compiled body's forward graph hands to its backward, from the partitioner itself."""
    if not frozen_marked:
        monkeypatch.setattr(partition, "mark_recompute", lambda joint, frozen: 0)
        monkeypatch.setattr(partition.Partition, "uuid", lambda self: "unmarked")
    qmodel = qlora_fx.transform(tiny_llama(2), LORA, backend="aot_eager")
    qmodel(**batch()).loss.backward()
    return [p.saved for p in partitions(qmodel)]


def partitions(qmodel: Any) -> list[partition.Partition]:
    """What each compiled body's forward hands to its backward, from the partitioner itself."""
    return [
        body.partitioned(key)
        for program in qmodel.programs
        for body in program.run.children()
        for key in list(body.partitions)
    ]


def dense(node: fx.Node) -> bool:
    """A floating-point value of a weight's two static dimensions that is no input of the body."""
    val = node.meta["val"]
    if not isinstance(val, torch.Tensor) or any(isinstance(s, torch.SymInt) for s in val.shape):
        return False
    shapes = {(64, 48), (32, 48), (48, 64), (80, 48), (48, 80)}
    return (
        node.op != "placeholder"
        and val.is_floating_point()
        and (tuple(val.shape) in shapes or tuple(val.shape)[::-1] in shapes)
    )


def test_the_partitioned_joint_graph_saves_no_dequantized_weight(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bodies = saved_for_backward(monkeypatch, frozen_marked=True)
    assert len(bodies) >= 2
    assert not [n for nodes in bodies for n in nodes if dense(n)]
    packed = [
        n for nodes in bodies for n in nodes if getattr(n.meta["val"], "dtype", None) == torch.uint8
    ]
    assert packed, "backward dequantizes from storage"


def test_without_the_mark_it_would_save_them(monkeypatch: pytest.MonkeyPatch) -> None:
    bodies = saved_for_backward(monkeypatch, frozen_marked=False)
    assert [n for nodes in bodies for n in nodes if dense(n)]


def bytes_saved(backend: str) -> int:
    """Bytes that autograd really holds between forward and backward, without parameters and storage."""
    # Without the passes that save activations of their own: what remains is the weights.
    qmodel = qlora_fx.transform(tiny_llama(4), LORA, backend=backend, disable=OPTIONAL)
    held = {t.data_ptr() for _, t in qmodel.base.store.items()}
    seen: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.data_ptr() not in held:
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    qmodel(**batch()).loss.backward()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = qmodel(**batch()).loss
    loss.backward()
    return sum(seen.values())


@pytest.mark.parametrize("backend", [pytest.param("inductor", marks=pytest.mark.slow), "aot_eager"])
def test_bytes_really_saved_are_less_than_plain_autograds_by_the_dense_weights(
    backend: str,
) -> None:
    weights = 4 * 4 * (64 * 48 * 2 + 2 * 32 * 48 + 3 * 80 * 48)
    assert bytes_saved("eager") - bytes_saved(backend) >= weights


def test_storage_held_is_what_the_paper_says() -> None:
    """4.127 bits per weight on weights large enough that the shared map and the last block do not count."""
    for double, bits in ((True, 4.127), (False, 4.5)):
        from transformers import BitsAndBytesConfig

        model = tiny_llama(1, hidden_size=512, intermediate_size=1024, head_dim=128)
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double
        )
        qmodel = qlora_fx.transform(model, LORA, quantization, backend="eager")
        rows = [r for r in qlora_fx.explain(qmodel) if r.quantized]
        weights = sum(r.shape[0] * r.shape[1] for r in rows)
        assert 8 * sum(r.bytes_after for r in rows) / weights == pytest.approx(bits, abs=1e-3)
        assert 32 * weights == 8 * sum(r.bytes_before for r in rows)
