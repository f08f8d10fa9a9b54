"""explain: what was quantized and adapted, what was not, and why."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from .passes.adapt import is_adapter_key
from .passes.graph.site import Site, Verdict
from .runtime.fastest_dtype import ComputeDtype
from .weights.base import Base


@dataclass(frozen=True)
class Row:
    """One linear operation of the model.

    Attributes:
        name: module path of its weight.
        op: how the model spelled it.
        shape: ``[out, in]``, ``[experts, out, in]``; empty where the operation was not recognised.
        flops_share: its part of the multiplications with weights in one forward, 0 to 1, at the sizes of the
            example the model was captured with. Where the data decide how many rows there are, those count as 0.
        quantized, adapted: what was done.
        reason: why something was not done.
        bytes_before, bytes_after: of the weight as loaded, and as held now (without the adapter).
        adapter_bytes: of ``lora_A`` and ``lora_B``.
        weight: store key of the weight; two rows with the same one share it.
    """

    name: str
    op: str
    shape: tuple[int, ...]
    flops_share: float
    quantized: bool
    adapted: bool
    reason: str
    bytes_before: int
    bytes_after: int
    adapter_bytes: int
    weight: str = ""


class Explanation:
    """A printable, iterable table of ``Row``."""

    def __init__(self, title: str, rows: list[Row], other_bytes: int, notes: list[str]) -> None:
        self.title, self.rows, self.other_bytes, self.notes = title, rows, other_bytes, notes

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def to_dicts(self) -> list[dict[str, Any]]:
        """Rows as dicts, for ``pandas.DataFrame``."""
        return [asdict(row) for row in self.rows]

    @property
    def totals(self) -> dict[str, int]:
        """Counts, and bytes over distinct weights (a weight read by two linears counts once).

        ``held_bytes`` is the sum of the three that follow ``bytes_before``: all that the model holds.
        """
        distinct = {row.weight: row for row in self.rows}.values()
        after = sum(r.bytes_after for r in distinct)
        adapters = sum(r.adapter_bytes for r in self.rows)
        return {
            "linears": len(self.rows),
            "quantized": sum(r.quantized for r in self.rows),
            "adapted": sum(r.adapted for r in self.rows),
            "bytes_before": sum(r.bytes_before for r in distinct),
            "bytes_after": after,
            "adapter_bytes": adapters,
            "other_bytes": self.other_bytes,
            "held_bytes": after + adapters + self.other_bytes,
        }

    def __str__(self) -> str:
        header = (
            "name",
            "op",
            "shape",
            "flops",
            "quantized",
            "adapted",
            "before",
            "after",
            "reason",
        )
        body = [
            (
                name,
                row.op,
                "x".join(map(str, row.shape)),
                f"{100 * row.flops_share * count:.1f} %",
                "yes" if row.quantized else "no",
                "yes" if row.adapted else "no",
                size(row.bytes_before * count),
                size(row.bytes_after * count),
                row.reason,
            )
            for name, count, row in by_layer(self.rows)
        ]
        widths = [max(len(line[i]) for line in [header, *body]) for i in range(len(header))]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
            for line in [header, *body]
        ]
        t = self.totals
        lines.insert(1, "  ".join("-" * w for w in widths))
        summary = (
            f"{t['quantized']} of {t['linears']} linears quantized, {t['adapted']} adapted; weights "
            f"{size(t['bytes_before'])} -> {size(t['bytes_after'])}, adapters {size(t['adapter_bytes'])}, "
            f"other tensors {size(t['other_bytes'])}"
        )
        return "\n".join([self.title, *self.notes, "", *lines, "", summary])


def by_layer(rows: list[Row]) -> Iterator[tuple[str, int, Row]]:
    """Rows that differ only in layer numbers, as one line: ``model.layers.{0..29}.mlp.up_proj``.

    Yields:
        the line's name, how many rows it stands for, and the first of them.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        pattern = tuple("*" if part.isdigit() else part for part in row.name.split("."))
        key = (pattern, row.op, row.shape, row.quantized, row.adapted, row.reason, row.bytes_after)
        groups.setdefault(key, []).append(row)
    for (pattern, *_), members in groups.items():
        if len(members) == 1:
            yield members[0].name, 1, members[0]
            continue
        paths = [row.name.split(".") for row in members]
        name = [
            part if part != "*" else numbers(sorted({int(path[i]) for path in paths}))
            for i, part in enumerate(pattern)
        ]
        yield ".".join(name), len(members), members[0]


def numbers(values: list[int]) -> str:
    if len(values) == 1:
        return str(values[0])
    if values == list(range(values[0], values[-1] + 1)):
        return f"{{{values[0]}..{values[-1]}}}"
    return "{" + ",".join(map(str, values)) + "}"


def size(count: int) -> str:
    """Bytes with three digits and a binary unit."""
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"


def explain(base: Base, compute: ComputeDtype) -> Explanation:
    """What was quantized and adapted, what was not, and why.

    Args:
        compute: the dtype in which linears multiply, and how it came about.
    """
    flops = sum(verdict.flops for verdict in base.verdicts.values())
    dense = base.skeleton.dense_bytes()
    rows = [
        row_of(verdict, base, dense.get(verdict.weight, 0), verdict.flops / max(flops, 1))
        for verdict in base.verdicts.values()
    ]
    counted = {k for v in base.verdicts.values() for k in base.store.keys_of(v.weight)}
    by_key = {key: tensor.nbytes for key, tensor in base.store.items()} or dense
    other = sum(n for k, n in by_key.items() if k not in counted and not is_adapter_key(k))
    lora, is_dense = base.config.lora, base.config.quantization.is_dense
    notes = [
        f"storage: {'dense, as loaded' if is_dense else base.scheme.describe()}",
        f"compute: {str(compute.dtype).removeprefix('torch.')} ({compute.reason}); "
        f"activations {str(base.activation_dtype).removeprefix('torch.')}",
        f"adapters: float32, r={lora.r}, lora_alpha={lora.lora_alpha}, dropout {lora.lora_dropout}",
    ]
    if base.trained:
        held = sum(base.store[copy].nbytes for copy in base.trained)
        notes.append(
            f"trained as a whole: {len(base.trained)} tensors, {size(held)} more (bias={lora.bias!r}, "
            f"modules_to_save={lora.modules_to_save!r})"
        )
    return Explanation(f"{base.skeleton.name} as qlora_fx runs it", rows, other, notes)


def held_bytes(site: Site | None, weight: str, base: Base, dense_bytes: int) -> int:
    """Of a weight, without the parts that others share; also where it is not loaded."""
    if not weight or weight in base.store:
        return base.store.bytes_of(weight) if weight else 0
    if site is None or not site.quantize:
        return dense_bytes
    parts = base.scheme.parts(site.shape, name=site.name).values()
    return sum(part.nbytes for part in parts if not part.shared)


def row_of(verdict: Verdict, base: Base, dense_bytes: int, flops_share: float) -> Row:
    site = verdict if isinstance(verdict, Site) else None
    tensors = base.adapter.tensors(site).values() if site and site.adapt else ()
    return Row(
        name=verdict.name,
        op=verdict.op,
        shape=site.shape if site else (),
        flops_share=flops_share,
        quantized=bool(site and site.quantize),
        adapted=bool(site and site.adapt),
        reason=verdict.reason,
        bytes_before=dense_bytes,
        bytes_after=held_bytes(site, verdict.weight, base, dense_bytes),
        adapter_bytes=sum(4 * math.prod(t.shape) for t in tensors),
        weight=verdict.weight,
    )
