"""Blocks that are walked once give the graph that walking them all gives, name by name; and what is not equal is walked."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import torch
from families import FAMILIES, Family, build
from families.exceptions import REFUSED
from qlora_fx.capture import skeleton
from qlora_fx.capture.cache import caches
from qlora_fx.capture.dynamic_shapes import automatic_dims
from qlora_fx.capture.export_patches import ways
from qlora_fx.capture.repeated_blocks import Walk, walked_once
from qlora_fx.capture.skeleton import Capture, Skeleton
from qlora_fx.capture.written_out import NotAlone
from qlora_fx.compiler import printer
from slow import only_slow_but
from small_models import TOY_INPUT, captured
from torch import nn
from transformers import DynamicCache

Ways = Callable[[], Iterator[Any]]


@pytest.fixture(autouse=True)
def repeated(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths of the blocks that were not walked."""
    found: list[str] = []
    again = Walk.again

    def noted(self: Walk, *args: Any) -> Any:
        found.append(self.path)
        return again(self, *args)

    monkeypatch.setattr(Walk, "again", noted)
    return found


def captured_by(ways: Ways, *args: Any, **options: Any) -> Capture:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(skeleton, "ways", ways)
        return captured(*args, **options)


def whole() -> Iterator[Any]:
    first, *others = ways()
    assert first is walked_once
    yield from others


def once() -> Iterator[Any]:
    yield walked_once


def text(capture: Capture) -> list[str]:
    """The graph, its modules and guards."""
    modules = [
        f"{n.name} {n.meta.get('module')} {n.meta.get('nn_module_stack')}"
        for n in capture.gm.graph.nodes
    ]
    return [*printer.text(capture.gm).splitlines(), *modules, *sorted(capture.guards)]


def structure(capture: Capture) -> list[str]:
    """As ``text``, but for the numbers in nodes' names: sizes that a later block does not ask for again have one, too."""
    numbers: dict[Any, str] = {}
    lines = []
    for node in capture.gm.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, (torch.SymInt, torch.SymBool)):
            numbers[node] = str(value)
            continue
        numbers[node] = f"%{len(numbers)}"
        args = torch.fx.map_arg((node.args, dict(node.kwargs)), lambda n: f"{numbers[n]}")
        told = [node.meta.get(k) for k in ("stored", "input", "module", "nn_module_stack")]
        line = f"{numbers[node]} {node.op} {node.target if node.op == 'call_function' else ''} {args} {value} {told}"
        lines.append(re.sub(r"on node '\w+'", "", line))
    return [*lines, *sorted(capture.guards)]


# -- small blocks, one question each ----------------------------------------------------------------


class Block(nn.Module):
    """Non-square linears, a table of its own, and its place."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self.place = place
        self.up, self.down = nn.Linear(8, 6), nn.Linear(6, 8)
        self.register_buffer("table", torch.full((8,), float(place)))

    def forward(self, x: torch.Tensor, **_: Any) -> Any:
        return self.down(torch.relu(self.up(x))) + self.table


class Stack(nn.Module):
    def __init__(self, block: Any = Block, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config, self.options = object(), options
        self.entry = nn.Linear(8, 8)  # from there on sizes are what they are
        self.layers = nn.ModuleList(block(i) for i in range(4))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        first = x = self.entry(x)
        for layer in self.layers:
            x = layer(x, **{k: first if v is None else v for k, v in self.options.items()})
            x = x if isinstance(x, torch.Tensor) else x["y"] if isinstance(x, dict) else x[0]
        return {"y": x}


class Dropping(Block):
    def forward(self, x: torch.Tensor, **_: Any) -> Any:
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


class Named(Block):
    def forward(self, x: torch.Tensor, **_: Any) -> Any:
        return {"y": super().forward(x), "no": None, "name": "block"}


class HandsOn(Block):
    def forward(self, x: torch.Tensor, mask: Any = None, **_: Any) -> Any:
        return super().forward(x) * mask, (mask, 3)


class Detached(Block):
    def forward(self, x: torch.Tensor, **_: Any) -> Any:
        with torch.no_grad():
            size = self.up(x).abs().mean(-1, keepdim=True)
        return super().forward(x) / (size + 1)


class InPlace(Block):
    def forward(self, x: torch.Tensor, **_: Any) -> Any:
        y = self.up(x)
        y += 1
        y[..., :2].mul_(2)
        return self.down(y)


@pytest.mark.parametrize(
    ("block", "options", "walked"),
    [
        (Block, {}, 1),
        (Dropping, {}, 1),
        (Named, {"flag": True}, 1),
        (HandsOn, {"mask": None}, 2),  # to the first block, mask and input are one tensor
        (Detached, {}, 1),
        (InPlace, {"pair": (1, "a", None)}, 1),
    ],
)
def test_blocks_that_are_alike_are_walked_once(
    block: Any, options: Any, walked: int, repeated: list[str]
) -> None:
    model = Stack(block, **options)
    graph = captured_by(once, model)
    assert len(repeated) == 4 - walked
    assert text(graph) == text(captured_by(whole, model))
    stored = {n.meta["stored"] for n in graph.gm.graph.nodes if "stored" in n.meta}
    assert {f"layers.{i}.up.weight" for i in range(4)} <= stored


class Doubled(Block):
    def forward(self, x: torch.Tensor, **_: Any) -> Any:
        return super().forward(x + self.down(self.up(x)))


class Twice(Stack):
    """All blocks, and then all of them again; each calls its parts twice."""

    def __init__(self) -> None:
        super().__init__(Doubled)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.entry(x)
        for layer in (*self.layers, *self.layers):
            x = layer(x)
        return {"y": x}


class Pyramid(Stack):
    """Stages, no two of which are alike, of blocks that are."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Stack() for _ in range(2))
        cast(Stack, self.layers[1]).layers.append(Block(4))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.entry(x)
        for stage in self.layers:
            x = stage(x)["y"]
        return {"y": x}


@pytest.mark.parametrize(("kind", "walked", "calls"), [(Twice, 1, 8), (Pyramid, 2, 9)])
def test_blocks_that_are_called_again_and_blocks_in_stages(
    kind: Any, walked: int, calls: int, repeated: list[str]
) -> None:
    graph = captured_by(once, kind())
    assert len(repeated) == calls - walked
    assert text(graph) == text(captured_by(whole, kind()))


class Scaled(Block):
    def forward(self, x: torch.Tensor, **_: Any) -> Any:
        return super().forward(x) * (self.place + 1)


class Alternating(Block):
    def forward(self, x: torch.Tensor, **_: Any) -> Any:
        return super().forward(x) if self.place % 2 else self.down(self.up(x))


class Looked(Block):
    def forward(self, x: torch.Tensor, **_: Any) -> Any:
        return super().forward(x) * [2.0, 3.0, 4.0, 5.0][self.place]


class NamedByPlace(Block):
    def forward(self, x: torch.Tensor, **_: Any) -> Any:
        return super().forward(x) * {"0": 2.0}.get(f"{self.place}", 1.0)


class Typed(Block):
    def forward(self, x: torch.Tensor, **_: Any) -> Any:
        return super().forward(x) * (2.0 if isinstance(self.place, int) else 3.0)


class OwnScale(Block):
    def __init__(self, place: int) -> None:
        super().__init__(place)
        self.scale = 1.0 / (place + 1)

    def forward(self, x: torch.Tensor, **_: Any) -> Any:
        return super().forward(x) * self.scale


class Remembering(Block):
    calls: Any = None

    def forward(self, x: torch.Tensor, **_: Any) -> Any:
        self.calls = (self.calls or 0) + 1
        return super().forward(x)


class Listing(Block):
    def __init__(self, place: int) -> None:
        super().__init__(place)
        self.calls: list[Any] = []

    def forward(self, x: torch.Tensor, **_: Any) -> Any:
        self.calls.append(x.shape)
        return super().forward(x)


ACCOUNT = {"calls": 0}


class Sharing(Block):
    """All hold one object, and each changes it."""

    def __init__(self, place: int) -> None:
        super().__init__(place)
        self.account = ACCOUNT
        ACCOUNT["calls"] = 0

    def forward(self, x: torch.Tensor, **_: Any) -> Any:
        self.account["calls"] += 1
        return super().forward(x) * self.account["calls"]


class Noting(Block):
    def forward(self, x: torch.Tensor, notes: Any = None, **_: Any) -> Any:
        notes["calls"] = notes.get("calls", 0) + 1
        return super().forward(x) * notes["calls"]


class Tied(Block):
    def __init__(self, place: int) -> None:
        super().__init__(place)
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)
        if place % 2:
            self.down.weight = self.up.weight


@pytest.mark.parametrize(
    ("block", "options", "walked"),
    [
        (Scaled, {}, 4),
        (Alternating, {}, 4),
        (Looked, {}, 4),
        (NamedByPlace, {}, 4),
        (Typed, {}, 4),
        (OwnScale, {}, 4),
        (Remembering, {}, 4),
        (Listing, {}, 4),
        (Sharing, {}, 4),
        (Noting, {"notes": {}}, 4),
        (Noting, {"notes": {"calls": 3}}, 4),
        (Tied, {}, 2),
    ],
)
def test_blocks_that_differ_are_walked(
    block: Any, options: Any, walked: int, repeated: list[str]
) -> None:
    def model() -> Stack:
        return Stack(block, **{k: dict(v) for k, v in options.items()})

    graph = captured_by(once, model())
    assert len(repeated) == 4 - walked
    found, expected = text(graph), text(captured_by(whole, model()))
    if block is Tied:  # its one weight comes before its biases, or after them
        found, expected = sorted(found), sorted(expected)
    assert found == expected


HANDED_ON: list[torch.Tensor] = []


class Reading(Block):
    """What was left behind the model's back."""

    def forward(self, x: torch.Tensor, **_: Any) -> Any:
        return super().forward(x) + HANDED_ON[0]


class WritingItsInput(Block):
    def forward(self, x: torch.Tensor, first: Any = None, **_: Any) -> Any:
        first[..., :1].add_(1)
        return super().forward(x) + first


class Counting(Block):
    def forward(self, x: torch.Tensor, **_: Any) -> Any:
        many = (x > 0).nonzero()
        return super().forward(x) + many.shape[0]


@pytest.mark.parametrize(
    ("block", "options", "why"),
    [
        (Reading, {}, "is not the block's own"),
        (WritingItsInput, {"first": None}, "writes to what is not the block's own"),
        (Counting, {}, "sizes that depend on data"),
    ],
)
def test_a_graph_that_shows_that_they_differ_is_walked_anew(
    block: Any, options: Any, why: str, repeated: list[str]
) -> None:
    class Leaving(Stack):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            HANDED_ON[:] = [self.entry(x) * 2]
            return super().forward(x * 1)

    model = Leaving(block, **options)
    tried = Skeleton(model)
    program = tried.export(TOY_INPUT, True, torch.float32, automatic_dims, walked_once)
    with pytest.raises(NotAlone, match=why):
        tried.finish(program)
    assert repeated, "it was tried"
    assert text(captured_by(ways, model)) == text(captured_by(whole, model))


def test_hooks_and_forwards_of_their_own_are_called(repeated: list[str]) -> None:
    seen: list[int] = []

    class Hooked(Stack):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            handles = [
                layer.register_forward_hook(lambda m, args, y, i=i: seen.append(i) or y * 2)  # type: ignore[misc]
                for i, layer in enumerate(self.layers)
            ]
            y = super().forward(x)
            for handle in handles:
                handle.remove()
            return y

    captured_by(once, Hooked())
    assert seen == [0, 1, 2, 3]
    model = Stack()
    model.layers[1].up.forward = lambda x: torch.zeros(*x.shape[:-1], 6)  # type: ignore[method-assign, assignment]
    captured_by(once, model)
    assert not repeated


def test_what_export_is_given_is_as_it_was() -> None:
    model = Stack()
    captured_by(once, model)
    assert all(
        "forward" not in vars(layer) and layer.place == i for i, layer in enumerate(model.layers)
    )  # type: ignore[union-attr]


# -- types of models --------------------------------------------------------------------------------

DEPTHS = {
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth"),
    *("encoder_layers", "decoder_layers", "num_encoder_layers", "num_decoder_layers"),
}


def deeper(settings: Any, layers: int = 4) -> Any:
    """Settings with four layers for two, of two kinds where there were two."""
    if not isinstance(settings, dict):
        return settings
    return {
        key: layers
        if key in DEPTHS and value == 2
        else [layers] * len(value)
        if key == "depths"
        else [value[i % 2] for i in range(layers)]
        if isinstance(value, list) and len(value) == 2 and key.endswith("layer_types")
        else deeper(value, layers)
        for key, value in settings.items()
    }


def deep(family: Family) -> Any:
    try:
        return build(dataclasses.replace(family, config=deeper(family.config)))
    except Exception:
        return build(family)  # a list of its config is of another length then


OTHER_NODES = {
    "xlnet": "a cast that changes nothing, of what all layers read: each reads the one of the layer before, or of the first",
    "blip": "so, too",
    "canine": "so, too",
    "deepseek_v2": "so, too",
    "falcon": "constants that each layer makes are one",
    "deberta": "so, too",
    "pegasus_x": "sizes by formulas, of which one layer's guards are all layers'",
}
"""Types whose graphs compute the same by other nodes."""


# Of the models themselves: what tests/families/exceptions.py has as said.
@pytest.mark.filterwarnings("ignore:Version v4.12.0 introduces a better way:FutureWarning")
@pytest.mark.filterwarnings("ignore:The tensor attributes? :UserWarning")
@pytest.mark.parametrize(
    "family",
    only_slow_but(
        [f for f in FAMILIES if f.model_type == "openai-gpt"],
        [f for f in FAMILIES if f.model_type not in {*OTHER_NODES, *REFUSED}],
    ),
    ids=lambda f: f.model_type,
)
def test_every_type_has_the_graph_of_the_whole_walk(family: Family, repeated: list[str]) -> None:
    """In training; and for a prompt and one more token where there is a cache."""
    model = deep(family)
    assert_equal(model, family.batch(2, 17), training=True)
    if not caches(model) or Skeleton(model).encoder_decoder:
        return
    values = {k: v for k, v in family.batch(2, 17).items() if k != "labels"}
    graph = assert_equal(model, values | {"use_cache": True}, training=False)
    cache = DynamicCache()
    for i, shapes in enumerate(rows_of(graph)):
        cache.update(*(torch.zeros(2, shape[2], 7, shape[3]) for shape in shapes), i)
    token = {"input_ids": values["input_ids"][:, :1], "use_cache": True, "past_key_values": cache}
    assert_equal(model, token, training=False)


def rows_of(capture: Capture) -> list[Any]:
    """Sizes of the keys and of the values that each layer puts into the cache; they may differ."""
    output = next(n for n in capture.gm.graph.nodes if n.op == "output")
    leaves = [getattr(n, "meta", {}).get("val", n) for n in output.args[0]]
    found = torch.utils._pytree.tree_unflatten(leaves, capture.out_spec)
    return [tuple(t.shape for t in rows) for rows in found["past_key_values"][0]]


def assert_equal(model: Any, values: Any, *, training: bool) -> Capture:
    found = []
    for way in (once, whole):
        call = Skeleton(model).bind((), dict(values))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(skeleton, "ways", ways if way is once else way)
            made = Skeleton(model).capture(call.values, training=training, dtype=torch.float32)
        found.append(made)
    assert structure(found[0]) == structure(found[1])
    return found[1]
