"""Is the compiled model right? ``check(model, batch)`` compares it with float64 and names what went wrong.

The truth is ``reference.Oracle``'s; the same in float32 shows how much error the precision alone explains.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
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


@dataclass(frozen=True)
class Line:
    """Errors of one site's gradients: of ``lora_A``, of ``lora_B``, and float32 eager PyTorch's worst."""

    name: str
    lora_a: float
    lora_b: float
    eager: float
    norm: float

    @property
    def worst(self) -> float:
        return max(self.lora_a, self.lora_b)


@dataclass
class Report:
    """What ``check`` found. Printable.

    Attributes:
        passed: all errors are within ``tolerance``.
        outputs: relative error of each floating-point output, by place.
        eager_outputs: the same of float32 eager PyTorch.
        sites: one line per adapted site, worst first.
        stages: worst relative error after each stage that was run, in order; empty if none was.
        culprit: the first stage whose error is above the tolerance; empty if all are within it.
    """

    model: str
    tolerance: float
    outputs: dict[str, float]
    eager_outputs: dict[str, float]
    sites: list[Line]
    stages: dict[str, float] = field(default_factory=dict)

    @property
    def worst_output(self) -> float:
        return max(self.outputs.values(), default=0.0)

    @property
    def worst_gradient(self) -> float:
        return max((line.worst for line in self.sites), default=0.0)

    @property
    def passed(self) -> bool:
        return max(self.worst_output, self.worst_gradient) <= self.tolerance

    @property
    def culprit(self) -> str:
        return next((s for s, error in self.stages.items() if not error <= self.tolerance), "")

    def __str__(self) -> str:
        lines = [
            f"{self.model}: {'passed' if self.passed else 'FAILED'}, relative errors against float64, "
            f"tolerance {self.tolerance:.0e}"
        ]
        for name, error in self.outputs.items():
            lines.append(f"  output {name}: {error:.1e} (eager {self.eager_outputs[name]:.1e})")
        lines.append(
            f"  gradients of {len(self.sites)} sites, worst {self.worst_gradient:.1e}; the worst five:"
        )
        width = max((len(line.name) for line in self.sites[:5]), default=0)
        for line in self.sites[:5]:
            lines.append(
                f"    {line.name:{width}}  lora_A {line.lora_a:.1e}  lora_B {line.lora_b:.1e}  "
                f"(eager {line.eager:.1e}, norm {line.norm:.1e})"
            )
        if self.stages:
            lines.append("  worst error after each stage:")
            for stage, error in self.stages.items():
                mark = "  <- introduced here" if stage == self.culprit else ""
                lines.append(f"    {stage:9} {error:.1e}{mark}")
        return "\n".join(lines)


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
            values = torch.randn(p.shape, generator=generator) * scale
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
        a, b = (tensor.key for tensor in base.adapter.tensors(site).values())
        norm = float(torch.stack([true_grads[a].norm(), true_grads[b].norm()]).norm())
        eager_error = max(eager_errors[a], eager_errors[b])
        lines.append(Line(site.name, errors[a], errors[b], eager_error, norm))
    for trained, key in base.trained.items():
        norm = float(true_grads[trained].norm())
        lines.append(Line(key, errors[trained], 0.0, eager_errors[trained], norm))
    lines.sort(key=lambda line: -line.worst)
    if tolerance is None:
        own = max([*eager_outputs.values(), *(line.eager for line in lines)], default=0.0)
        tolerance = max(TOLERANCE[qmodel.compute_dtype], 4 * own)
    return Report(type(model).__name__, tolerance, outputs, eager_outputs, lines)


def step(
    run: QLoRAModel | Oracle, batch: Mapping[str, Any]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Outputs by place and gradients by adapter name of one forward and backward of a model or an oracle."""
    if isinstance(run, Oracle):
        output = run(batch)
        adapters: dict[str, nn.Parameter] = run.adapters
    else:
        output = run(**batch)
        adapters = dict(run.adapter_parameters())
    found = leaves(output)
    return found, gradients(scalar(output, found), adapters)


def gradients(loss: torch.Tensor, adapters: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """The gradient of each adapter, zero where it has none."""
    values = torch.autograd.grad(loss, list(adapters.values()), allow_unused=True)
    pairs = zip(adapters.items(), values, strict=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in pairs}


def gradient_errors(
    grads: Mapping[str, torch.Tensor], true: Mapping[str, torch.Tensor]
) -> dict[str, float]:
    """Relative to each gradient's own norm, or to a millionth of the largest one where that is larger."""
    floor = 1e-6 * max((float(g.norm()) for g in true.values()), default=0.0)
    distances = {key: float((grads[key].double() - g).norm()) for key, g in true.items()}
    return {k: d / max(float(true[k].norm()), floor) if d else 0.0 for k, d in distances.items()}


def leaves(output: Any) -> dict[str, torch.Tensor]:
    """The floating-point tensors of an output, by place."""
    pairs, _ = pytree.tree_flatten_with_path(output)
    return {
        pytree.keystr(path).strip(".[]'\""): leaf
        for path, leaf in pairs
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
    }


def scalar(output: Any, found: Mapping[str, torch.Tensor]) -> torch.Tensor:
    loss = output.get("loss") if isinstance(output, Mapping) else None
    if isinstance(loss, torch.Tensor):
        return loss
    generator = torch.Generator().manual_seed(2)
    total = []
    for leaf in found.values():
        if leaf.requires_grad:
            weights = torch.randn(leaf.shape, generator=generator).to(leaf)
            total.append((leaf * weights).mean())
    return torch.stack(total).sum()


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
        wanted = node.meta["val"].dtype
        return value if value.dtype == wanted else value.detach().to(wanted)

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
        there = [k for k in true if k in found]
        worst = max((relative_error(found[k], true[k]) for k in there), default=0.0)
        if adapted:
            adapters = dict(qmodel.adapter_parameters())
            grads = gradients(scalar(output, found), adapters)
            worst = max([worst, *gradient_errors(grads, true_grads).values()])
        errors[stage] = worst

    signature = call.signature(training=training)
    compile_call(base.skeleton, base.decided_config, call, signature, observe)
    return errors
