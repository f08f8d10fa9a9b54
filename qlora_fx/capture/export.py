"""One call of torch.export: what it is given, what it prints, what its failure says, and what is no part of a forward."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import os
import traceback
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind

from ..errors import CaptureError
from ..passes.graph.nodes import writes
from .adapter_rows import take_slots
from .arguments import is_encoder_decoder, with_encoder_output
from .cache import with_tensors, with_traced_cache
from .export_shortcuts import shortcuts


def export(
    model: Any, examples: dict[str, Any], dims: dict[str, Any], short: bool
) -> ExportedProgram:
    """The program of ``model(**examples)``.

    Args:
        model: a copy that is only traced: its forward is replaced.
        dims: which sizes are free, by argument.
        short: formulas of sizes must be. See ``shortcuts``.
    """
    take_exactly(model, list(examples), dims)
    with shortcuts(short):
        return torch.export.export(model, (), examples, dynamic_shapes=dims, strict=False)


def take_exactly(model: Any, names: list[str], dims: Mapping[str, Any]) -> None:
    """Give the copy that is traced a forward of just these arguments.

    torch.export 2.13 mistakes the place of arguments that go into the model's ``**kwargs``. What ``dims`` calls one size is one
    from the first operation on: otherwise a block would find out, and the next would see other sizes (repeated_blocks.py).
    """
    original = model.forward

    def forward(**kwargs: Any) -> Any:
        tie(kwargs, dims)
        take_slots(kwargs)
        arguments = with_traced_cache(with_encoder_output(kwargs), is_encoder_decoder(model))
        return with_tensors(arguments, original(**arguments))

    parameters = [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in names]
    forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    model.forward = forward


def tie(arguments: Mapping[str, Any], dims: Mapping[str, Any]) -> None:
    """Let sizes that are one dimension be one symbol."""
    first: dict[int, Any] = {}
    for name, spec in dims.items():
        for i, dim in spec.items() if isinstance(spec, dict) else ():
            if isinstance(dim, Dim):
                size = arguments[name].shape[i]
                torch._check(size == first.setdefault(id(dim), size))  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep export's advice to its own developers, and the graphs it prints, out of the user's terminal."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch")
        warnings.filterwarnings("ignore", message=".*lru_cache.*")
        before = {name: logging.getLogger(name).level for name in LOGGERS}
        for name in LOGGERS:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for name, level in before.items():
                logging.getLogger(name).setLevel(level)


LOGGERS = ("torch.utils._sympy.interp", "torch.fx.experimental.symbolic_shapes")
"""Tell of formulas that they cannot follow before the error that says so."""


def capture_error(model: Any, error: Exception, inputs: Mapping[str, Any]) -> CaptureError:
    """Name the line of the user's model that stopped the capture, and what to try."""
    ours = (os.path.dirname(torch.__file__), os.path.dirname(os.path.abspath(__file__)))
    frames = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if not f.filename.startswith(ours) and not f.filename.startswith("<")
    ]
    where = ""
    if frames:
        f = frames[-1]
        where = f'\n  File "{f.filename}", line {f.lineno}, in {f.name}\n    {f.line}'
    first_line = next((line for line in str(error).splitlines() if line.strip()), "")
    return CaptureError(
        f"{type(model).__name__} could not be captured by torch.export with arguments "
        f"({', '.join(inputs)}).{where}\n  {type(error).__name__}: {first_line}\n"
        "  Data-dependent Python (`if tensor.sum() > 0`, `.item()`, `.tolist()`) cannot be captured: use "
        "torch.where or torch.cond there, or pass example_inputs= that take another path. "
        "The model is unchanged."
    )


def without_writes(program: ExportedProgram, model: str) -> set[str]:
    """Take out what the model writes to a weight's ``.data`` (Gemma 3n clamps one in train mode), and say so.

    Returns:
        Names of the inputs that nobody reads.

    Raises:
        CaptureError: it writes to a weight as such, so that each call would change it (RWKV in eval mode).
    """
    graph = program.graph_module.graph
    specs = program.graph_signature.input_specs
    weights = {
        s.arg.name: s.target for s in specs if s.kind in (InputKind.PARAMETER, InputKind.BUFFER)
    }
    for node in reversed(graph.find_nodes(op="placeholder")):
        for user in list(node.users):
            if not writes(user) or user.args[0] is not node:
                continue
            if node.name in weights and len(node.users) == 1 and not user.users:
                graph.erase_node(user)  # bookkeeping that nothing reads: a batch norm's count
                continue
            if node.name in weights:
                raise CaptureError(
                    f"{model} changes {weights[node.name]} during forward ({user.target._schema.name}): each call of a captured graph "
                    "would change it again. Accepted: models whose forward does not write to their weights"
                )
            if user.users:
                continue
            warnings.warn(
                f"{model} changes a weight of its own during forward ({user.target._schema.name}); that is left out: the base "
                "is frozen",
                stacklevel=2,
            )
            graph.erase_node(user)
    return {n.name for n in graph.find_nodes(op="placeholder") if not n.users}
