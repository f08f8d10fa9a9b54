"""Our text form of a graph: ASCII, typed on every line, nothing numbered that a neighbour would renumber."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any

import sympy
import torch
from torch import fx

from ..passes.graph.nodes import verdict_of
from ..passes.graph.site import Skipped, Verdict

DTYPES = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
}
INDENT = "    "


def text(gm: fx.GraphModule, *, title: str = "") -> str:
    """The graph, and behind it each distinct body it calls.

    Stored tensors that are only read are listed where they are first used, not in the signature.
    Symbolic sizes are ``B`` (batch), ``S`` (sequence), then ``D0``, ``D1``... in order of appearance.
    """
    symbols = Symbols(gm)
    parts = [one(gm, title or type(gm).__name__, symbols)]
    seen: set[str] = set()
    for node in gm.graph.find_nodes(op="call_module"):
        if node.target not in seen:
            seen.add(node.target)
            body = gm.get_submodule(node.target)
            assert isinstance(body, fx.GraphModule)
            parts.append(one(body, node.target, symbols))
    return "\n".join(parts)


def one(gm: fx.GraphModule, title: str, symbols: Symbols) -> str:
    lines = []
    inputs = []
    for node in gm.graph.nodes:
        if node.op == "placeholder" and "stored" not in node.meta:
            inputs.append(f"%{node.name}: {type_of(node.meta.get('val'), symbols)}")
    lines.append(f"def {title}({', '.join(inputs)}):")
    lines += [INDENT + line for node in gm.graph.nodes for line in lines_of(node, symbols)]
    return "\n".join(lines) + "\n"


def lines_of(node: fx.Node, symbols: Symbols) -> Iterator[str]:
    if node.op == "placeholder":
        if "stored" in node.meta:
            kind = "adapter" if node.meta.get("trainable") else "stored"
            shown = node.meta["stored"] if "body" not in node.meta else node.meta["body"]
            yield f"%{node.name}: {type_of(node.meta['val'], symbols)} = {kind}[{shown}]"
        return
    if node.op == "output":
        yield f"return {argument(node.args[0], symbols)}"
        return
    args = [argument(a, symbols) for a in node.args]
    args += [f"{k}={argument(v, symbols)}" for k, v in node.kwargs.items()]
    if node.op == "call_module":
        args = [argument(a, symbols) for a in node.args if not is_stored(a)]
        stored = sum(is_stored(a) for a in node.args)
        args += [f"<{stored} stored>"] if stored else []
    line = f"%{node.name}: {type_of(node.meta.get('val'), symbols)} = {target(node)}({', '.join(args)})"
    verdict = verdict_of(node)
    if verdict is not None:
        line += f"  # site {verdict.name}: {words_of(verdict)}"
    yield line


def is_stored(arg: Any) -> bool:
    return isinstance(arg, fx.Node) and "stored" in arg.meta


def words_of(verdict: Verdict) -> str:
    if isinstance(verdict, Skipped):
        return verdict.reason
    words = ["quantize"] if verdict.quantize else []
    words += [f"adapt r={verdict.r}"] if verdict.adapt else []
    words += [verdict.reason] if verdict.reason else []
    return ", ".join(words)


def target(node: fx.Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        name = str(node.target).removesuffix(".default")
        base, _, overload = name.rpartition(".")
        # aten.add.Tensor -> aten.add: the overload follows from the argument types shown.
        return (
            base
            if base.count(".") == 1 and overload in ("Tensor", "Scalar", "int", "dim")
            else name
        )
    if isinstance(node.target, str):
        return node.target
    return getattr(node.target, "__name__", str(node.target))


def argument(arg: Any, symbols: Symbols) -> str:
    if isinstance(arg, fx.Node):
        return f"%{arg.name}"
    if isinstance(arg, torch.dtype):
        return DTYPES.get(arg, str(arg))
    if isinstance(arg, (list, tuple)):
        inner = ", ".join(argument(a, symbols) for a in arg)
        return f"[{inner}]" if isinstance(arg, list) else f"({inner})"
    if isinstance(arg, (torch.SymInt, torch.SymFloat)):
        return symbols.name(arg)
    return str(arg)


def type_of(val: Any, symbols: Symbols) -> str:
    if isinstance(val, torch.Tensor):
        sizes = ", ".join(symbols.name(s) for s in val.shape)
        return f"{DTYPES.get(val.dtype, str(val.dtype))}[{sizes}]"
    if isinstance(val, (list, tuple)):
        return f"({', '.join(type_of(v, symbols) for v in val)})"
    if isinstance(val, torch.SymInt):
        return f"int({symbols.name(val)})"
    return type(val).__name__


class Symbols:
    """Stable names for symbolic sizes: by the place they first appear in the inputs' shapes."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.names: dict[sympy.Symbol, str] = {}
        for node in gm.graph.nodes:
            val = node.meta.get("val")
            if (
                node.op == "placeholder"
                and "stored" not in node.meta
                and isinstance(val, torch.Tensor)
            ):
                for i, size in enumerate(val.shape):
                    self.see(size, "BS"[i] if i < 2 and val.dim() <= 3 else "")

    def see(self, size: Any, wanted: str) -> None:
        if not isinstance(size, torch.SymInt):
            return
        for symbol in sorted(size.node.expr.free_symbols, key=str):
            if symbol not in self.names:
                free = wanted and wanted not in self.names.values()
                self.names[symbol] = wanted if free else f"D{len(self.names)}"

    def name(self, size: Any) -> str:
        if not isinstance(size, (torch.SymInt, torch.SymFloat)):
            return str(size)
        self.see(size, "")
        expr = size.node.expr
        renamed = expr.xreplace(
            {s: sympy.Symbol(self.names[s]) for s in expr.free_symbols if s in self.names}
        )
        return str(renamed)


def diff(before: str, after: str, *, stage: str) -> str:
    """A unified diff of two graph texts with one line of context."""
    lines = difflib.unified_diff(
        before.splitlines(),
        after.splitlines(),
        f"before {stage}",
        f"after {stage}",
        lineterm="",
        n=1,
    )
    return "\n".join(lines)


def excerpt(gm: fx.GraphModule, node: fx.Node | None, *, around: int = 5) -> str:
    """The lines of the graph around ``node``, the node marked with ``>``."""
    symbols = Symbols(gm)
    nodes = [n for n in gm.graph.nodes if n.op != "placeholder" or n is node]
    if node is None or node not in nodes:
        return ""
    i = nodes.index(node)
    lines = []
    for n in nodes[max(0, i - around) : i + around]:
        for line in lines_of(n, symbols):
            lines.append(("> " if n is node else "  ") + line)
    return "\n".join(lines)
