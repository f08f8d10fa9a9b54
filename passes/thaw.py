"""thaw: dense tensors that train beside the adapters, as PEFT's ``bias`` and ``modules_to_save`` ask for."""

from __future__ import annotations

from collections.abc import Collection

import torch
from peft import LoraConfig
from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from ..config import Config
from ..errors import ConfigError
from .graph.nodes import StoredInputs, identifier, placeholders, sites

TRAINED = "trained"
"""Before the last part of a trained copy's store key: ``lm_head.trained.weight``."""


def thaw(gm: fx.GraphModule, *, config: Config) -> PassResult:
    """Let readers of a tensor that trains read a copy of their own, float32, which requires grad.

    The tensor itself stays in the store as it was: that is the base, without the adapter.

    Before::

        %head: f32[B, S, 5] = aten.linear(%x, %head_weight)

    After::

        %head_trained_weight: f32[5, 8] = adapter[head.trained.weight]
        %head: f32[B, S, 5] = aten.linear(%x, %head_trained_weight)

    Raises:
        ConfigError: an entry of ``modules_to_save`` that names no parameter.
    """
    if config.decided is None:
        chosen = trained_keys(gm.graph, config.lora)
    else:  # the first capture chose; this one may be of a part of the model
        stored = (n.meta["stored"] for n in placeholders(gm.graph) if "stored" in n.meta)
        chosen = {key for key in stored if copy_key(key) in config.trained}
    inputs = StoredInputs(gm.graph)
    trained: dict[str, str] = dict(gm.meta.get("trained", {}))
    for node in list(placeholders(gm.graph)):
        key = node.meta.get("stored")
        if key not in chosen:
            continue
        copy = inputs.add(copy_key(key), node.meta["val"], name=identifier(copy_key(key)))
        copy.meta.update(
            {k: node.meta[k] for k in ("parameter",) if k in node.meta},
            trainable=True,
            stored_dtype=torch.float32,
        )
        node.replace_all_uses_with(copy)
        gm.graph.erase_node(node)
        trained[copy_key(key)] = key
    gm.meta["trained"] = trained
    return PassResult(gm, bool(chosen))


def copy_key(key: str) -> str:
    owner, _, leaf = key.rpartition(".")
    return ".".join(filter(None, (owner, TRAINED, leaf)))


def trained_keys(graph: fx.Graph, lora: LoraConfig) -> set[str]:
    """Store keys of the parameters that train themselves."""
    parameters = [
        n.meta["stored"]
        for n in placeholders(graph)
        if "stored" in n.meta and n.meta.get("parameter") and not n.meta.get("trainable")
    ]
    chosen = {key for key in parameters if is_saved(key, lora.modules_to_save or ())}
    there = [
        *parameters,
        *(n.meta["stored"] for n in placeholders(graph) if n.meta.get("trainable")),
    ]
    for name in lora.modules_to_save or ():
        if not any(is_saved(key, [name]) for key in there):
            raise ConfigError(
                f"LoraConfig.modules_to_save entry {name!r} names no module with parameters of its own in this model "
                "(a weight that is tied belongs to the first module that has it)"
            )
    if lora.bias == "all":
        chosen |= {key for key in parameters if key == "bias" or key.endswith(".bias")}
    elif lora.bias == "lora_only":
        adapted = {f"{n.meta['site'].name}.bias" for n in sites(graph) if n.meta["site"].adapt}
        chosen |= adapted.intersection(parameters)
    return chosen


def is_saved(key: str, modules: Collection[str]) -> bool:
    """PEFT's rule for ``modules_to_save``: the end of a module's path; of the module that holds ``key``, or one above."""
    owner = key.rpartition(".")[0].removesuffix(f".{TRAINED}")
    return any(path.endswith(name) for name in modules for path in ancestors(owner))


def ancestors(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts) + 1)]
