"""Which repeated block of the model a node belongs to.

# Note [What a block is]
A block is an element of the outermost list of modules that a node stands in, ``model.layers.3``. In a pyramid (Swin, SegFormer,
ConvNeXt) that is a stage, ``encoder.stages.1``: no two of them are equal, and what repeats is in a list of its own,
``encoder.stages.1.layers.0``. So the inner list's elements are the blocks where several are of one class, each reads what the
one before it gave, and together they are most of the outer list. Experts do not read each other; T5's attention and feed-forward,
a list in each block, are of one class each; what a stage does beside (``downsample``) lies between its blocks.

A module that is called again with the same weights (ALBERT has one layer, called twelve times) is another block each time.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import fx

INDEXED = re.compile(r"^(?P<list>.*?)\.(?P<index>\d+)(?=\.|$)")


class Block(NamedTuple):
    """One call of one block.

    Attributes:
        path: of its module; empty outside of all blocks.
        call: which call of that module it is, from 0.
    """

    path: str
    call: int = 0


NONE = Block("")


class Place(NamedTuple):
    """An element of a list of modules."""

    container: str
    element: str

    @property
    def kind(self) -> str:
        """The list, of whatever stage: ``encoder.stages.1.layers`` and ``encoder.stages.0.layers`` are of one kind."""
        return re.sub(r"\b\d+\b", "*", self.container)


def blocks(graph: fx.Graph) -> dict[fx.Node, Block]:
    """The block of each operation that is in one. Note [What a block is]."""
    outer: dict[fx.Node, Place] = {}
    inner: dict[fx.Node, Place] = {}
    for node in graph.nodes:
        path = node.meta.get("module", "")
        place = element(path)
        if node.op == "call_function" and place is not None:
            outer[node] = place
            within = element(path, behind=place.element)
            if within is not None:
                inner[node] = within
    stages = repeated_inside(outer, inner) if inner else {}

    def block(node: fx.Node) -> Place | None:
        place = outer[node]
        if place.kind not in stages:
            return place
        within = inner.get(node)
        return within if within is not None and within.kind in stages[place.kind] else None

    places = {node: block(node) for node in outer}
    return {n: Block(p.element, call(n, p.element)) for n, p in places.items() if p is not None}


def element(path: str, *, behind: str = "") -> Place | None:
    """The outermost element of a list on a module's path, below the module ``behind``."""
    match = INDEXED.match(path.removeprefix(behind))
    return None if match is None else Place(behind + match["list"], behind + match[0])


def numbered(key: str) -> tuple[str, int]:
    """torch.export's key of a module in ``nn_module_stack``, and which call of it that is: ``...layers.0@2``."""
    name, _, number = key.partition("@")
    return name, int(number or 0)


def on_stack(node: fx.Node, path: str) -> tuple[str, Any]:
    """Key and class of the module at a path, where a node stands in it; empty if that was not called as a module."""
    for key, (module, kind) in (node.meta.get("nn_module_stack") or {}).items():
        if module == path:
            return key, kind
    return "", ""


def call(node: fx.Node, path: str) -> int:
    """Which call of a module a node is from."""
    return numbered(on_stack(node, path)[0])[1]


def class_of(node: fx.Node, path: str) -> str:
    """The class of the module at a path, with the module that defines it."""
    kind = on_stack(node, path)[1]
    return kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"


@dataclass
class Inner:
    """All inner lists of one kind.

    Attributes:
        outer: the kind of list that they are in.
        classes: by list, of its elements in the order in which they are run.
        chained: elements that read from the one before.
        nodes: how many they hold.
    """

    outer: str
    classes: dict[str, dict[str, str]] = field(default_factory=lambda: defaultdict(dict))
    chained: set[str] = field(default_factory=set)
    nodes: int = 0

    def repeats(self) -> bool:
        """Whether each element reads from the one before, and some are of one class."""
        lists = self.classes.values()
        later = [element for elements in lists for element in list(elements)[1:]]
        alike = any(len(set(elements.values())) < len(elements) for elements in lists)
        return alike and self.chained.issuperset(later)


def repeated_inside(
    outer: dict[fx.Node, Place], inner: dict[fx.Node, Place]
) -> dict[str, set[str]]:
    """Kinds of outer lists whose elements are stages; of each, the kinds of inner lists that hold its blocks."""
    found: dict[str, Inner] = {}
    # By value and inner list: the last element that the value depends on.
    latest: dict[fx.Node, dict[str, int]] = {}
    for node, place in outer.items():
        reached: dict[str, int] = {}
        for read in node.all_input_nodes:
            if outer.get(read) == place:
                for container, position in latest[read].items():
                    reached[container] = max(position, reached.get(container, -1))
        latest[node] = reached
        within = inner.get(node)
        if within is None:
            continue
        kind = found.setdefault(within.kind, Inner(place.kind))
        kind.nodes += 1
        elements = kind.classes[within.container]
        elements[within.element] = elements.get(within.element) or class_of(node, within.element)
        position = list(elements).index(within.element)
        if position and reached.get(within.container) == position - 1:
            kind.chained.add(within.element)
        reached[within.container] = position
    sizes = Counter(place.kind for place in outer.values())
    stages: dict[str, set[str]] = {}
    for outside in {kind.outer for kind in found.values()}:
        blocks = {k: v for k, v in found.items() if v.outer == outside and v.repeats()}
        if 2 * sum(kind.nodes for kind in blocks.values()) > sizes[outside]:
            stages[outside] = set(blocks)
    return stages
