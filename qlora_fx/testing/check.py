"""Is the compiled model right? ``check(model, batch)`` compares it with float64 and names what went wrong.

The truth is ``reference.Oracle``'s; the same in float32 shows how much error the precision alone explains.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft import LoraConfig
from torch import fx, nn
from torch.utils import _pytree as pytree
from transformers import BitsAndBytesConfig

from ..capture.skeleton import Capture, named_tensors
from ..compiler.compile import compile_call
from ..model import QLoRAModel
from ..passes.graph.nodes import is_packed
from ..transform import transform
from .reference import Float64, Oracle, dense_weights, relative_error
from .report import Line, Report
from .step import gradient_errors, gradients, leaves, loss_of, step

__all__ = [
    "Float64",
    "Line",
    "Oracle",
    "Report",
    "check",
    "compare",
    "randomize_adapter",
    "relative_error",
]

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest relative error accepted, by compute dtype, unless float32 eager PyTorch itself is worse."""


def check(
    model: nn.Module,
    batch: Mapping[str, Any],
    lora: LoraConfig | None = None,
    quantization: BitsAndBytesConfig | bool | None = None,
    *,
    compute_dtype: torch.dtype | str = torch.float32,
    also_quantize: Iterable[str] = (),
    blocksize: int = 64,
    backend: str = "inductor",
    tolerance: float | None = None,
    stages: bool | None = None,
    quiet: bool = False,
) -> Report:
    """Transform a copy of ``model``, run one training step, and compare it with float64.

    Adapters get random values, ``lora_B`` too. The scalar whose gradients are compared is the model's loss,
    or a random projection of its outputs where it returns none.

    Args:
        model: as for ``transform``; it is left as it is. Dropout in the model makes the comparison
            meaningless: build it with every dropout 0, or call ``model.eval()`` on one whose forward is
            the same in both modes.
        batch: the arguments of one call.
        lora, quantization, compute_dtype, also_quantize, blocksize, backend: as for ``transform``.
        tolerance: largest relative error accepted; default: ``TOLERANCE`` of the compute dtype, or four
            times the error of float32 eager PyTorch where that is larger.
        stages: whether to run the graph after each stage; default: only if the comparison fails.
        quiet: do not print the report.

    Returns:
        The printed report; ``report.passed`` is the verdict.
    """
    qmodel = transform(
        copy.deepcopy(model),
        lora,
        quantization,
        compute_dtype=compute_dtype,
        also_quantize=also_quantize,
        blocksize=blocksize,
        backend=backend,
        example_inputs=batch,
    )
    randomize_adapter(qmodel)
    report = compare(model, qmodel, batch, tolerance)
    if stages or (stages is None and not report.passed):
        report.stages = bisect(model, qmodel, batch)
        report.stages["lower"] = max(report.worst_output, report.worst_gradient)
    if not quiet:
        print(report)
    return report


def randomize_adapter(qmodel: QLoRAModel, *, scale: float = 0.05, seed: int = 1) -> None:
    """Give every ``lora_A`` and ``lora_B`` normal random values, and add some to what trains beside them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in qmodel.adapter_parameters():
            values = torch.randn(p.shape, generator=generator).to(p.device) * scale
            p.copy_(p + values if name in qmodel.base.trained else values)


def compare(
    model: nn.Module,
    qmodel: QLoRAModel,
    batch: Mapping[str, Any],
    tolerance: float | None = None,
    *,
    all_outputs: bool = True,
) -> Report:
    """One step of ``qmodel`` beside the oracle; ``model`` is what it was made from.

    Args:
        all_outputs: compare also the outputs that a training step leaves out (logits), which takes another
            capture.
    """
    base, training = qmodel.base, qmodel.training
    true_out, true_grads = step(Oracle(model, base, training=training), batch)
    eager = Oracle(model, base, training=training, dtype=torch.float32)
    eager_out, eager_grads = step(eager, batch)
    out, grads = step(qmodel, batch)
    if all_outputs and not true_out.keys() <= out.keys():
        with torch.no_grad():
            out = leaves(qmodel.run_uncompiled(**{**batch, "return_logits": True})) | out
    true_out = {k: v for k, v in true_out.items() if k in out}
    outputs = {k: relative_error(out[k], v) for k, v in true_out.items()}
    eager_outputs = {k: relative_error(eager_out[k], v) for k, v in true_out.items()}
    errors = gradient_errors(grads, true_grads)
    eager_errors = gradient_errors(eager_grads, true_grads)
    lines = []
    for site in base.sites.values():
        if not site.adapt:
            continue
        keys = {role: tensor.key for role, tensor in base.adapter.tensors(site).items()}
        norm = float(torch.stack([true_grads[key].norm() for key in keys.values()]).norm())
        eager_error = max(eager_errors[key] for key in keys.values())
        found = {role: errors[key] for role, key in keys.items()}
        lines.append(Line(site.name, found, eager_error, norm))
    for trained, key in base.trained.items():
        norm = float(true_grads[trained].norm())
        lines.append(Line(key, {"trained": errors[trained]}, eager_errors[trained], norm))
    lines.sort(key=lambda line: -line.worst)
    if tolerance is None:
        eager_error = max([*eager_outputs.values(), *(line.eager for line in lines)], default=0.0)
        tolerance = max(TOLERANCE[qmodel.compute_dtype], 4 * eager_error)
    return Report(type(model).__name__, tolerance, outputs, eager_outputs, lines)


def bisect(model: nn.Module, qmodel: QLoRAModel, batch: Mapping[str, Any]) -> dict[str, float]:
    """Worst relative error of outputs and gradients of the graph after each stage, run as it is.

    Before ``quantize`` the graph reads the dequantized weights, before ``adapt`` it has no adapter; each
    stage is compared with an oracle of the same.
    """
    base, training = qmodel.base, qmodel.training
    call = base.skeleton.bind((), batch)
    dense = dense_weights(model, base)
    originals = dict(named_tensors(model))
    with torch.no_grad():
        plain = leaves(Oracle(model, base, training=training, adapter=False)(batch))
    full, true_grads = step(Oracle(model, base, training=training), batch)
    errors: dict[str, float] = {}

    def stored(node: fx.Node, capture: Capture) -> torch.Tensor:
        key = node.meta["stored"]
        if key in capture.constants:
            return capture.constants[key]
        held = is_packed(node) or key not in originals
        value = base.store[key] if held else dense.get(key, originals[key])
        dtype = node.meta["val"].dtype
        return value if value.dtype == dtype else value.detach().to(dtype)

    def observe(capture: Capture, stage: str, gm: fx.GraphModule) -> None:
        placeholders = list(gm.graph.find_nodes(op="placeholder"))
        arguments = [
            stored(n, capture) if "stored" in n.meta else call.values[n.meta["input"]]
            for n in placeholders
        ]
        output = pytree.tree_unflatten(list(gm(*arguments)), capture.out_spec)
        found = leaves(output)
        adapted = any(n.meta.get("trainable") for n in placeholders)
        true = full if adapted else plain
        both = [k for k in true if k in found]
        worst = max((relative_error(found[k], true[k]) for k in both), default=0.0)
        if adapted:
            adapters = dict(qmodel.adapter_parameters())
            grads = gradients(loss_of(output, found), adapters)
            worst = max([worst, *gradient_errors(grads, true_grads).values()])
        errors[stage] = worst

    signature = call.signature(training=training)
    compile_call(base.skeleton, base.decided_config, call, signature, observe)
    return errors
