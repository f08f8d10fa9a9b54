"""One capture per (model, request), and one compilation per body, for all tests of a process.

Tests build the same few tiny models over and over. What is traced of one depends on its Python, its config and the
call, what the compiler makes of that also on the request, neither on the weights: both are kept and handed out again;
each test fills a store of its own.
Nothing is kept of a capture that warned, is observed, logged or dumped, or of a pipeline that a test has changed.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from qlora_fx.capture.dynamic_shapes import free_dims, resized, shared_dims
from qlora_fx.capture.skeleton import Skeleton
from qlora_fx.compiler import compile as compiler
from qlora_fx.compiler import pipeline, programs
from qlora_fx.passes.graph.body import content
from qlora_fx.passes.graph.nodes import writes
from qlora_fx.passes.lowering import compiled_body, partition
from qlora_fx.passes.lowering.compiled_body import CompiledBody, Variant
from qlora_fx.runtime.program import holds


def described(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {tuple(value.shape)} {value.device}"
    return repr(value)


ASIDE = (
    "model_type",
    "_name_or_path",
    "_commit_hash",
    "architectures",
    "transformers_version",
    "dtype",
    "quantization_config",
)
"""Of a config: where the model came from; its Python does not read these, and the tensors have their dtypes."""


def python_of(skeleton: Any) -> tuple[Any, ...] | None:
    """What is traced of a model; None for models that say less about themselves than transformers'."""
    model = skeleton.model
    own_class = type(model).__module__.startswith("transformers.models.")
    if not own_class or any("forward" in vars(module) for module in model.modules()):
        return None
    configs = [
        f"{path} {sorted((k, str(v)) for k, v in vars(module.config).items() if k not in ASIDE)}"
        for path, module in model.named_modules()
        if hasattr(module, "config") and hasattr(module.config, "to_dict")
    ]
    own = [f"{p} {type(m).__qualname__} {m.extra_repr()}" for p, m in model.named_modules()]
    tensors = [f"{n} {k} {skeleton.dtypes[n]}" for n, k in skeleton.keys.items()]
    whole = (skeleton.device, skeleton.dtype, type(model).forward)
    return tuple(str(part) for part in (*configs, *own, *tensors, *whole))


def inputs_of(values: Any) -> tuple[str, ...]:
    return tuple(f"{n} {described(v)}" for n, v in values.items())


def inputs_of_any_size(values: Any, encoder_decoder: bool) -> tuple[str, ...]:
    """As ``inputs_of``, with names for free sizes, if a size tells which it is.

    FLOPs of sites are those of the sizes that were traced: whoever counts them replaces this by ``inputs_of``.
    """
    free = free_dims(resized(values, encoder_decoder), encoder_decoder)
    roles = {
        (role, values[name].shape[i]) for name, dims in free.items() for i, role in dims.items()
    }
    if not len(roles) == len({r for r, _ in roles}) == len({n for _, n in roles if n > 1}):
        return inputs_of(values)
    return tuple(
        f"{n} {v.dtype} {[free[n].get(i, size) for i, size in enumerate(v.shape)]} {v.device}"
        if n in free
        else f"{n} {described(v)}"
        for n, v in values.items()
    )


def any_size(placeholders: Any) -> bool:
    """Whether a graph takes other sizes than those that it was traced with."""
    inputs = [n.meta["val"] for n in placeholders if "input" in n.meta]
    return all(isinstance(n, torch.SymInt) for t in inputs if t.dim() > 1 for n in t.shape[:2])


def hold(guards: list[str] | None, values: Any) -> bool:
    """Whether what a capture relied on is so."""
    return all(holds(guard, values) for guard in guards or ())


def identity(skeleton: Any, config: Any, signature: Any) -> tuple[Any, ...] | None:
    """What a capture and the passes depend on, beside the call's arguments."""
    python = python_of(skeleton)
    if python is None:
        return None
    settings = [f"{k}={v!r}" for k, v in vars(config).items() if k != "lora"]
    lora = sorted(config.lora.to_dict().items(), key=str)
    return (python, str(settings), str(lora), str(signature))


def writes_to_inputs(program: Any) -> bool:
    """Whether it changes what it reads: that is taken out of it, with a warning, once."""
    readers = {u for n in program.graph_module.graph.find_nodes(op="placeholder") for u in n.users}
    return any(map(writes, readers))


def content_of(body: CompiledBody) -> Any:
    """What the compiler makes of a body depends on: equal for those of models that differ elsewhere."""
    graph = body.body.graph
    if {n.op for n in graph.nodes} - {"placeholder", "call_function", "output"}:
        return id(body.body)
    stored = tuple("stored" in n.meta for n in body.inputs)
    devices = {str(t.device) for n in body.inputs if isinstance(t := n.meta["val"], torch.Tensor)}
    own = (partition.mark_recompute, compiled_body.compile_fx, body.calls > 1)
    return (content(graph), stored, tuple(body.free), tuple(sorted(devices)), *own)


@contextmanager
def shared() -> Iterator[None]:
    """Share captures and compilations while this holds."""
    captures: dict[Any, Any] = {}
    builds: dict[Any, list[tuple[Variant, Any]]] = {}
    programs_of: dict[Any, Any] = {}
    bodies: list[Any] = []  # kept, so that an id stays its own
    partitions: dict[Any, Any] = {}
    original, build = compiler.compile_call, CompiledBody.build
    passes, stages = pipeline.run, pipeline.run.__kwdefaults__["stages"]
    partitioned, export = CompiledBody.partitioned, Skeleton.export

    def export_once(
        self: Skeleton, inputs: Any, training: bool, dtype: Any, dims: Any, patches: Any
    ) -> Any:
        way = (training, dtype, dims, patches.__name__ if hasattr(patches, "__name__") else None)
        python = python_of(self)
        if python is None or way[-1] is None:
            return export(self, inputs, training, dtype, dims, patches)
        exact = (python, inputs_of(inputs), *way)
        free = (python, inputs_of_any_size(inputs, self.encoder_decoder), *way)
        if exact in programs_of:
            return programs_of[exact]
        if free in programs_of and hold(programs_of[free]._guards_code, inputs):
            return programs_of[free]
        program = export(self, inputs, training, dtype, dims, patches)
        if not writes_to_inputs(program):
            programs_of[exact] = program
            if dims is shared_dims:
                programs_of[free] = program
        return program

    def compile_call(
        skeleton: Any, config: Any, call: Any, signature: Any, observe: Any = None
    ) -> Any:
        own = identity(skeleton, config, signature)
        logged = pipeline.dump_folder() is not None or pipeline.log.isEnabledFor(10)
        own_passes = pipeline.run is passes and passes.__kwdefaults__["stages"] is stages
        if own is None or observe is not None or logged or not own_passes:
            return original(skeleton, config, call, signature, observe)
        exact = (own, inputs_of(call.values))
        free = (own, inputs_of_any_size(call.values, skeleton.encoder_decoder))
        if exact in captures:
            return captures[exact]
        if free in captures and hold(captures[free][0].guards, call.values):
            return captures[free]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = original(skeleton, config, call, signature, observe)
        for w in caught:
            warnings.warn_explicit(w.message, w.category, w.filename, w.lineno)
        if not caught:
            capture, _ = captures[exact] = result
            if any_size(capture.gm.graph.find_nodes(op="placeholder")):
                captures[free] = result
        return result

    def build_once(self: CompiledBody, key: Any, sizes: tuple[int, ...]) -> Variant:
        what = content_of(self)
        place = (what, self.backend, key)
        for variant, split in builds.get(place, ()):
            if variant.holds is None or variant.holds(sizes):
                self.partitions[key] = split
                return variant
        variant = build(self, key, sizes)
        bodies.append(self.body)
        builds.setdefault(place, []).append((variant, self.partitions[key]))
        partitions.update({(what, k): split for k, split in self.partitions.items()})
        return variant

    def partitioned_once(self: CompiledBody, key: Any) -> Any:
        what = content_of(self)
        if key not in self.partitions and (what, key) in partitions:
            self.partitions[key] = partitions[what, key]
        found = partitioned(self, key)
        bodies.append(self.body)
        partitions.update({(what, k): split for k, split in self.partitions.items()})
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CompiledBody, "partitioned", partitioned_once)
        patch.setattr(Skeleton, "export", export_once)
        patch.setattr(compiler, "compile_call", compile_call)
        patch.setattr(programs, "compile_call", compile_call)
        patch.setattr(CompiledBody, "build", build_once)
        yield
