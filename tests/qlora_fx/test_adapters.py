"""The tables of adapters: nodes and values of each kind, and the tensors that both speak of."""

from __future__ import annotations

from peft import LoraConfig
from qlora_fx.adapters import VALUES, values_of
from qlora_fx.config import default_lora
from qlora_fx.passes.adapt import is_adapter_key
from qlora_fx.passes.adapters import ADAPTERS, adapter_of
from qlora_fx.passes.graph.site import Layout, Site


def site(shape: tuple[int, ...], name: str = "m.up", kind: str = "linear") -> Site:
    layout = Layout(shape, tuple(range(len(shape))), shape)
    return Site(name, f"{name}.weight" if kind == "linear" else name, "linear", layout, kind, r=4)


def test_each_kind_has_nodes_and_values() -> None:
    assert ADAPTERS.keys() == VALUES.keys()
    lora = default_lora()
    assert adapter_of(lora) is ADAPTERS["lora"]
    assert values_of(lora) is VALUES["lora"]


def test_tensors_have_the_keys_and_shapes_that_peft_gives_them() -> None:
    tensors = adapter_of(LoraConfig()).tensors
    found = {role: (t.key, t.shape) for role, t in tensors(site((6, 8))).items()}
    assert found == {
        "lora_A": ("m.up.lora_A.weight", (4, 8)),
        "lora_B": ("m.up.lora_B.weight", (6, 4)),
    }
    stack = tensors(site((3, 6, 8), "m.experts.up", "parameter"))
    assert {role: (t.key, t.shape) for role, t in stack.items()} == {
        "lora_A": ("m.experts.lora_A.up", (12, 8)),
        "lora_B": ("m.experts.lora_B.up", (6, 12)),
    }
    bare = tensors(site((6, 8), "scale", "own"))
    assert [t.key for t in bare.values()] == ["lora_A.scale", "lora_B.scale"]
    for found_tensors in (tensors(site((6, 8))), stack, bare):
        assert all(is_adapter_key(t.key) for t in found_tensors.values())
    assert not is_adapter_key("m.up.weight")
