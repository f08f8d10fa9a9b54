"""The twin: an object of the user's own model class whose tensors are a store's, without a copy of any."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from ..adapters.peft_format import peft_names
from ..capture.arguments import is_encoder_decoder
from ..passes.thaw import ancestors, is_saved
from ..runtime.parameter_store import Node, QuantizedNode
from ..transformers_internals import ModulesToSaveWrapper
from ..weights.base import Base
from .layers import AdaptedLayer
from .modules import Owner, Quantized, Root, Submodel, mixed


def build_twin(base: Base, owner: Owner) -> Any:
    """A twin of the base's model.

    Its forward, and the forwards of its ``submodels``, run compiled programs. Its dense modules
    (embeddings, norms, a dense head) hold their weights and compute as ever; a module whose weights are in 4 bits
    holds them under transformers + bitsandbytes' keys and says so when it is called.

    Args:
        base: all weights are in its store.
        owner: the model that it belongs to.
    """
    model: Any = base.skeleton.model
    memo: dict[int, Any] = {}
    for module in model.modules():  # one config for the twin and for what is captured later
        for name in ("config", "generation_config"):
            one = module.__dict__.get(name)
            if one is not None:
                memo[id(one)] = one
    twin = copy.deepcopy(model, memo)
    show_tensors(twin, base)
    called = submodels(twin)
    mixed(twin, Root)
    twin.__dict__["qlora_fx_owner"] = owner
    for path, module in called.items():
        mixed(module, Submodel)
        module.__dict__.update(qlora_fx_owner=owner, qlora_fx_path=path)
    return twin


def submodels(model: Any) -> dict[str, nn.Module]:
    """Modules that others call for themselves, by path: trainers the backbone (``model.base_model``, without the head),
    ``generate`` an encoder-decoder's encoder."""
    found = [getattr(model, "base_model", model)]
    if is_encoder_decoder(model):
        found.append(model.get_encoder())
    paths = {module: path for path, module in model.named_modules() if path}
    return {paths[module]: module for module in found if module in paths}


def show_tensors(twin: nn.Module, base: Base) -> None:
    """Let the twin's modules hold the store's tensors, also under tied names."""
    store = base.store
    for name, key in base.skeleton.keys.items():
        path, _, leaf = name.rpartition(".")
        module = twin.get_submodule(path)
        if key not in store:
            continue
        tensor = store[key]
        place: dict[str, Any] = module._buffers
        if isinstance(tensor, nn.Parameter):
            module._buffers.pop(leaf, None)
            place = module._parameters
        place[leaf] = tensor
    for path, node in store.root.named_modules():
        if isinstance(node, QuantizedNode):
            module = twin.get_submodule(path)
            for name, part in node._buffers.items():
                module.register_buffer(name, part)
            mixed(module, Quantized)
            module.__dict__.update(descriptions=node.descriptions, held=node.held)


def show_adapter(
    twin: nn.Module, base: Base, tensors: Mapping[str, nn.Parameter], name: str
) -> None:
    """Hold an adapter's tensors where PEFT's wrappers hold those of the adapter ``name``.

    ``q_proj.lora_A.<name>.weight`` beside ``q_proj.base_layer``; ``classifier.modules_to_save.<name>.weight`` beside
    ``classifier.original_module``; a bias that trains (``bias="lora_only"`` or "all") in its own place.

    Args:
        tensors: by store key.
    """
    whole = base.config.lora.modules_to_save or ()
    paths = peft_names(base.adapter, base.sites, base.skeleton.keys, base.trained)
    for key, path in sorted(
        paths.items(), key=lambda item: item[1].count(".")
    ):  # wrap from outside
        owner, _, leaf = path.rpartition(".")
        if key not in base.trained:
            owner, _, role = owner.rpartition(".")
            adapted_layer(twin, owner).hold(role, name, leaf, tensors[key])
        elif is_saved(base.trained[key], whole):
            saved_module(twin, owner, whole, name).register_parameter(leaf, tensors[key])
        else:
            twin.get_submodule(owner).register_parameter(leaf, tensors[key])


def hide_adapter(twin: nn.Module, name: str) -> None:
    """Take the tensors of the adapter ``name`` out of PEFT's wrappers."""
    for module in twin.modules():
        if isinstance(module, AdaptedLayer):
            module.forget(name)
        elif isinstance(module, ModulesToSaveWrapper):
            del module.modules_to_save[name]
            module._adapters.discard(name)


def adapted_layer(twin: nn.Module, path: str) -> AdaptedLayer:
    """The wrapper at PEFT's ``path``, made if it is not there: of several on one module the inner ones lie at
    ``base_layer`` of the outer."""
    outer = path
    while outer.endswith(".base_layer"):
        outer = outer.removesuffix(".base_layer")
    count = path[len(outer) :].count("base_layer") + 1
    above, _, last = outer.rpartition(".")
    parent = child(twin, above) if above else twin
    module = child(parent, last)
    wrappers = []
    while isinstance(module, AdaptedLayer):
        wrappers.append(module)
        module = module.base_layer
    for _ in range(count - len(wrappers)):  # innermost: those outside hold adapters already
        module = AdaptedLayer(module)
        if wrappers:
            wrappers[-1].base_layer = module
        else:
            parent._modules[last] = module
        wrappers.append(module)
    found = child(twin, path)
    assert isinstance(found, AdaptedLayer)
    return found


def saved_module(twin: nn.Module, path: str, whole: Collection[str], name: str) -> nn.Module:
    """The module at ``path`` in the copy for the adapter ``name`` of the module that trains as a whole: PEFT's wrapper
    lies around the outermost that ``whole`` names."""
    outer = next(p for p in ancestors(path) if is_saved(f"{p}.", whole))
    above, _, last = outer.rpartition(".")
    parent = twin.get_submodule(above)
    wrapper: Any = parent._modules[last]
    if not isinstance(wrapper, ModulesToSaveWrapper):
        wrapper = parent._modules[last] = ModulesToSaveWrapper(wrapper, name)
    elif name not in wrapper.modules_to_save:
        wrapper.update(name)
    copied: nn.Module = wrapper.modules_to_save[name]
    return copied.get_submodule(path[len(outer) + 1 :])


def child(module: nn.Module, path: str) -> nn.Module:
    """The module at ``path``; plain holders are made for what is not there, also beside a parameter of that name."""
    for part in path.split("."):
        held = module._modules.get(part)
        if held is None:
            held = module._modules[part] = Node()
        module = held
    return module
