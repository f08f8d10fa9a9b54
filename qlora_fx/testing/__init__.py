"""Is the compiled model right? ``check(model, batch)`` compares it with float64 and names what went wrong."""

from .check import Line, Report, check, compare, randomize_adapter
from .reference import Float64, Oracle, relative_error

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
