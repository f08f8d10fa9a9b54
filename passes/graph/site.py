"""Verdicts: a *site*, or an operation that was skipped; and how a product reads its weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Layout:
    """How a parameter becomes a weight that multiplies: ``p.reshape(view).permute(permute).reshape(shape)``.

    Attributes:
        view: a shape of the parameter's elements, in the order in which they are stored.
        permute: the order in which the weight takes those dimensions.
        shape: ``(out, in)``, or ``(experts, out, in)``.
    """

    view: tuple[int, ...]
    permute: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def plain(self) -> bool:
        """True if the weight has the parameter's elements in the parameter's order."""
        return self.permute == tuple(range(len(self.permute)))

    def of(self, parameter: torch.Tensor) -> torch.Tensor:
        """The weight ``[(experts,) out, in]`` of a parameter."""
        return parameter.reshape(self.view).permute(self.permute).reshape(self.shape)

    def inverse(self, weight: torch.Tensor) -> torch.Tensor:
        """The parameter, as ``view``, of a weight."""
        back = [self.permute.index(i) for i in range(len(self.permute))]
        return weight.reshape([self.view[i] for i in self.permute]).permute(back)


@dataclass(frozen=True)
class WeightView:
    """What the weight argument of a canonical product reads. ``meta["weight_view"]`` of the argument.

    Attributes:
        key: store key of the parameter.
        layout: the whole weight.
        rows: ``(start, stop)`` of the output features that are read, where not all are (a fused q/k/v weight).
        expert: which matrix of a stack of experts is read, where it is one (a loop over experts).
    """

    key: str
    layout: Layout
    rows: tuple[int, int] | None = None
    expert: int | None = None


@dataclass(frozen=True)
class Site:
    """The verdict on one product with a weight. ``meta["site"]`` of the canonical node holds it.

    Attributes:
        name: the module path as PEFT names it, e.g. ``model.layers.0.self_attn.q_proj``, or the parameter's
            own path where the module is not a linear (``model.layers.0.mlp.experts.gate_up_proj``).
        weight: key of the weight in the parameter store.
        op: how the model spelled the operation (``linear``, ``addmm``, ``einsum``, ...).
        layout: from the parameter to ``[(experts,) out, in]``.
        kind: what holds the weight: ``linear``, ``conv`` (PEFT's module adapters), ``parameter`` (PEFT's
            ``target_parameters``), ``own`` (a form that PEFT has no adapter for), ``reader`` (another module,
            whose weight this one borrows), or ``embedding`` (a lookup).
        quantize: whether the weight goes to 4-bit storage.
        adapt: whether a LoRA branch is added.
        reason: why not, where ``quantize`` or ``adapt`` is False; empty otherwise.
        r, scaling, dropout: LoRA's rank, factor and dropout probability; meaningful if ``adapt``.
        swapped: PEFT's ``lora_A`` multiplies the parameter's last dimension, which is not the input here:
            the input meets ``lora_B`` first.
        module_runs: False where another module reads the weight of this one (``nn.MultiheadAttention`` that of its
            ``out_proj``): PEFT's adapter of the module would be there and have no effect.
        flops: of one forward, at the sizes of the capture's example.
    """

    name: str
    weight: str
    op: str
    layout: Layout
    kind: str = "linear"
    quantize: bool = False
    adapt: bool = False
    reason: str = ""
    r: int = 0
    scaling: float = 1.0
    dropout: float = 0.0
    swapped: bool = False
    module_runs: bool = True
    flops: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """``(out, in)`` or ``(experts, out, in)``."""
        return self.layout.shape

    @property
    def experts(self) -> int:
        """Matrices in the weight; 0 for an ordinary ``[out, in]`` one."""
        return self.shape[0] if len(self.shape) == 3 else 0

    @property
    def out_features(self) -> int:
        return self.shape[-2]

    @property
    def in_features(self) -> int:
        return self.shape[-1]


@dataclass(frozen=True)
class Skipped:
    """An operation with a weight in no form that can be rewritten: it runs as the model wrote it.

    ``meta["skipped"]`` of its node holds it.

    Attributes:
        name, op, flops: as in ``Site``.
        weight: key of the first weight that it reads; empty where none is stored.
        reason: why it was not recognised.
    """

    name: str
    weight: str
    op: str
    reason: str
    flops: int = 0


Verdict = Site | Skipped


def is_flipped(view: WeightView, site: Site) -> bool:
    """True if this reader takes the transpose of what the site describes."""
    return len(site.shape) == 2 and view.layout.permute != site.layout.permute
