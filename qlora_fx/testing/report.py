"""What ``check`` found, as text."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Line:
    """Errors of one site's gradients: of each tensor of its adapter, by role, and float32 eager PyTorch's worst."""

    name: str
    errors: dict[str, float]
    eager: float
    norm: float

    @property
    def worst(self) -> float:
        return max(self.errors.values())


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
            f"tolerance {self.tolerance:.1e}"
        ]
        for name, error in self.outputs.items():
            lines.append(f"  output {name}: {error:.1e} (eager {self.eager_outputs[name]:.1e})")
        lines.append(
            f"  gradients of {len(self.sites)} sites, worst {self.worst_gradient:.1e}; the worst five:"
        )
        width = max((len(line.name) for line in self.sites[:5]), default=0)
        for line in self.sites[:5]:
            each = "  ".join(f"{role} {error:.1e}" for role, error in line.errors.items())
            lines.append(
                f"    {line.name:{width}}  {each}  (eager {line.eager:.1e}, norm {line.norm:.1e})"
            )
        if self.stages:
            lines.append("  worst error after each stage:")
            for stage, error in self.stages.items():
                mark = "  <- introduced here" if stage == self.culprit else ""
                lines.append(f"    {stage:9} {error:.1e}{mark}")
        return "\n".join(lines)
