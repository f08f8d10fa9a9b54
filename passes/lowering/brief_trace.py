"""What AOTAutograd does for programs that are not like ours, left out: two fifths of a trace's time, a sixth for Inductor.

A body has been captured, and writes to nothing: what it computes is traced as it stands.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch._functorch import aot_autograd
from torch._functorch._aot_autograd import graph_capture, graph_compile
from torch._functorch._aot_autograd.schemas import AOTConfig
from torch._logging._internal import trace_log
from torch.fx._lazy_graph_module import _use_lazy_graph_module

from ..graph.nodes import writes
from ..graph.values import view_value

LOGS = (graph_compile.aot_graphs_log, graph_compile.aot_joint_log)
prepared = aot_autograd.prepare_aot_module_simplified
created = graph_capture._create_graph


class WritesError(Exception):
    """A gradient, or what an operator is made of, writes to a tensor: the graph has to be made functional."""


@contextlib.contextmanager
def brief_trace(functional: bool) -> Iterator[None]:
    """While it holds AOTAutograd traces with less ado.

    - What is ``functional`` is not made so: ``FunctionalTensorMode`` would wrap each tensor and replay each view.
    - A graph's Python is written when it is called, not whenever it is changed; nor is it printed for a log that
      nobody keeps. (Inductor sees to the first itself.)
    - A dense tensor is seen as another shape without a search (``view_value``).

    Raises:
        WritesError: something was not functional, after all.
    """

    def prepare(*args: Any, **kwargs: Any) -> Any:
        found = prepared(*args, **kwargs | {"disable_functionalization": functional})
        return tuple(
            dataclasses.replace(part, enable_log=is_logged())
            if isinstance(part, AOTConfig)
            else part
            for part in found
        )

    def create(*args: Any, **kwargs: Any) -> Any:
        gm = created(*args, **kwargs)
        if functional and any(map(writes, gm.graph.nodes)):
            raise WritesError
        return gm

    with (
        mock.patch.object(aot_autograd, "prepare_aot_module_simplified", prepare),
        mock.patch.object(graph_capture, "_create_graph", create),
        mock.patch.object(torch._refs, "_reshape_view_helper", view_value),
        _use_lazy_graph_module(True),
    ):
        yield


def is_logged() -> bool:
    """Whether somebody reads the graphs: ``TORCH_LOGS="aot_graphs"``, ``TORCH_TRACE``."""
    return bool(trace_log.handlers) or any(log.isEnabledFor(logging.INFO) for log in LOGS)
