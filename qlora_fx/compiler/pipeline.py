"""The compiler in one list, and the runner that checks it.

    capture -> normalize -> select -> quantize -> adapt -> fuse -> outline -> lower

``capture`` makes the first graph (qlora_fx/capture) and ``lower`` makes it run (passes/lower.py); what stands
between them is this list. ``fuse`` is several passes, each of which may be left out by name
(``transform(..., disable=["attention"])``) without changing what is computed.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from ..config import Config
from ..errors import GraphError
from ..passes.adapt import adapt
from ..passes.attention import attention
from ..passes.convolutions import convolutions
from ..passes.few_rows import few_rows
from ..passes.loss_head import loss_head
from ..passes.masked_rows import masked_rows
from ..passes.normalize import normalize
from ..passes.outline import outline
from ..passes.quantize import quantize
from ..passes.select import select
from ..passes.siblings import siblings
from ..passes.thaw import thaw
from . import invariants, printer

log = logging.getLogger("qlora_fx")


@dataclass(frozen=True)
class Stage:
    """One pass and the invariants that hold from then on."""

    run: Callable[..., PassResult]
    establishes: tuple[invariants.Invariant, ...] = ()
    optional: bool = False

    @property
    def name(self) -> str:
        return self.run.__name__


CAPTURED: tuple[invariants.Invariant, ...] = (
    invariants.every_node_has_a_value,
    invariants.graph_holds_no_tensor,
)

PIPELINE: tuple[Stage, ...] = (
    # First: every later stage knows two forms of a product only.
    Stage(normalize, (invariants.only_canonical_linears_multiply_by_weights,)),
    # While weights are read as the model reads them: the verdict looks at each reader of a weight.
    Stage(select, (invariants.every_linear_has_a_verdict,)),
    # After select, for bias="lora_only" is that of adapted linears; before quantize and loss_head, which must not
    # take a tensor for frozen that trains.
    Stage(thaw),
    # Before adapt: the branch joins the result where quantize cast it, and takes the input from before its cast.
    Stage(quantize, (invariants.no_dense_copy_of_a_selected_weight,)),
    Stage(
        adapt,
        (
            invariants.only_adapters_are_trainable,
            invariants.every_adapted_site_has_a_live_branch,
        ),
    ),
    # After adapt, whose marks it reads; before siblings, which takes branches apart.
    Stage(few_rows, optional=True),
    # After adapt, whose marks it reads. Those that may be left out look at different nodes.
    Stage(siblings, optional=True),
    Stage(attention, optional=True),
    Stage(convolutions, optional=True),
    Stage(masked_rows, optional=True),
    # After quantize: it reads the storage that the head's weight was made from.
    Stage(loss_head, optional=True),
    # Last: two blocks share a body only when all rewrites of both are done.
    Stage(outline, (invariants.each_distinct_body_occurs_once,)),
)


OPTIONAL = tuple(stage.name for stage in PIPELINE if stage.optional)
"""What ``disable`` accepts."""


@dataclass
class Result:
    """What the pipeline made of a capture.

    Attributes:
        gm: the final graph, with one submodule per distinct body.
        flat: the graph before it was outlined; all sites are in it.
    """

    gm: fx.GraphModule
    flat: fx.GraphModule


def run(
    gm: fx.GraphModule,
    config: Config,
    *,
    stages: tuple[Stage, ...] = PIPELINE,
    title: str = "graph",
    observe: Callable[[str, fx.GraphModule], None] | None = None,
) -> Result:
    """Run ``stages`` in order; lint and check all invariants held so far after each.

    Each stage's diff is logged at debug level on the logger ``qlora_fx`` (``TORCH_LOGS="+qlora_fx"``), and
    its graph written to ``$QLORA_FX_DUMP/<title>.<n>_<stage>.txt`` if that variable names a folder.

    Args:
        observe: called with each stage's name and its graph, which the next stage will change.

    Raises:
        GraphError: an invariant is broken.
        Exception: what a pass raised, with a note that names the pass.
    """
    held = list(CAPTURED)
    flat = gm
    wanted = log.isEnabledFor(logging.DEBUG) or dump_folder() is not None
    before = printer.text(gm) if wanted else ""
    report(0, "capture", title, "", before)
    check(gm, held, config, "capture")
    if observe is not None:
        observe("capture", gm)
    for number, stage in enumerate(stages, 1):
        if stage.name in config.disabled or (stage.run in (thaw, adapt) and not config.adapter):
            continue
        try:
            result = stage.run(gm, config=config)
        except Exception as error:
            error.add_note(f"raised by the pass {stage.name} on {title}")
            raise
        gm = result.graph_module
        gm.graph.lint()
        if observe is not None:
            gm.recompile()
        held += stage.establishes
        check(gm, held, config, stage.name)
        after = printer.text(gm) if wanted and result.modified else before
        report(number, stage.name, title, before, after)
        before = after
        if observe is not None:
            observe(stage.name, gm)
        if stage.run is not outline:
            flat = gm
    gm.recompile()  # once: writing out the code of a deep model takes as long as a pass
    return Result(gm, flat)


def check(gm: fx.GraphModule, held: list[invariants.Invariant], config: Config, stage: str) -> None:
    """Raise for the first broken invariant, in the outer graph or in a body it calls."""
    for graph in (gm, *(m for m in gm.children() if isinstance(m, fx.GraphModule))):
        for invariant in held:
            for node, fault, remedy in invariant(graph, config):
                raise violation(graph, invariant.__name__, stage, node, fault, remedy)


def violation(
    gm: fx.GraphModule, invariant: str, stage: str, node: fx.Node | None, fault: str, remedy: str
) -> GraphError:
    where = f"%{node.name} " if node is not None else ""
    error = GraphError(f"after {stage}, {invariant} is broken: {where}{fault}. Remedy: {remedy}")
    around = printer.excerpt(gm, node)
    if around:
        error.add_note(around)
    return error


def dump_folder() -> Path | None:
    """The folder named by ``QLORA_FX_DUMP``, if set."""
    folder = os.environ.get("QLORA_FX_DUMP")
    return Path(folder) if folder else None


def report(number: int, stage: str, title: str, before: str, after: str) -> None:
    if log.isEnabledFor(logging.DEBUG):
        log.debug(
            "%s: %s\n%s", title, stage, printer.diff(before, after, stage=stage) or "unchanged"
        )
    folder = dump_folder()
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{title}.{number:02}_{stage}.txt").write_text(after, encoding="ascii")
