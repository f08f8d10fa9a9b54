"""A call of a model: which graphs it runs, with which adapters, over which cache."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from ..capture.adapter_rows import tell_slots
from ..capture.arguments import Call
from ..capture.cache import START, filled
from ..capture.cache_layers import Buffers
from ..compiler.programs import Programs
from ..errors import CaptureError, InputError
from .adapter_graphs import WHOLE, AdapterGraphs
from .named_adapters import DEFAULT
from .peft_model import StorePeftModel


class Calls:
    """Runs what is called.

    Args:
        model: whether it trains, and which adapter is active, is asked at each call.
        graphs: those that were captured; a new set of arguments is captured into them.
    """

    def __init__(self, model: StorePeftModel, graphs: AdapterGraphs) -> None:
        self.model, self.graphs = model, graphs
        self.slots_of_rows: torch.Tensor | None = None

    @property
    def adapter(self) -> str:
        """Whose graphs are run; while adapters are disabled those of the first, whichever is active."""
        return DEFAULT if self.model.adapters_disabled else self.model.named_adapters.active

    def run(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], path: str = WHOLE, *, compiled: bool
    ) -> Any:
        """Run the whole model, or the part at a path."""
        kwargs = dict(kwargs)
        slots = self._slots(kwargs.pop("adapter_names", None))
        if slots is None:
            programs = self.graphs.of(self.adapter, path)
        else:
            programs = self.graphs.for_rows(path)
        call = self._bind(programs, args, kwargs, slots, programs.buffers)
        try:
            return self._run(programs, call, compiled)
        except (CaptureError, InputError) as error:
            if START not in call.values:
                raise
            call = self._bind(programs, args, kwargs, slots, None)
            output = self._run(programs, call, compiled)
            programs.take_no_rings(error)
            return output

    @contextlib.contextmanager
    def rows_with(self, names: Sequence[str] | None) -> Iterator[None]:
        """Calls whose rows have these adapters."""
        before, self.slots_of_rows = self.slots_of_rows, self._slots(names)
        try:
            yield
        finally:
            self.slots_of_rows = before

    def _slots(self, names: Sequence[str] | None) -> torch.Tensor | None:
        """The slots of a call's rows; None where all have the active adapter, or adapters are disabled."""
        if self.model.adapters_disabled:
            return None
        if names is None:
            return self.slots_of_rows
        if self.slots_of_rows is not None:
            raise InputError("adapter_names within a generate(adapter_names=...) that is running")
        if self.model.twin.training:
            raise InputError("adapter_names in train mode; accepted: in eval mode, model.eval()")
        return self.graphs.rows(names)

    def _bind(
        self,
        programs: Programs,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        slots: torch.Tensor | None,
        buffers: Buffers | None,
    ) -> Call:
        call = programs.base.skeleton.bind(args, kwargs, buffers)
        if slots is not None:
            tell_slots(call.values, slots, repeated=self.slots_of_rows is not None)
        return call

    def _run(self, programs: Programs, call: Call, compiled: bool) -> Any:
        skeleton, training = programs.base.skeleton, self.model.twin.training
        skeleton.check(call)
        if call.cache is not None and training:
            raise InputError("use_cache=True in train mode; accepted: in eval mode, model.eval()")
        signature = call.signature(training=training, adapter=not self.model.adapters_disabled)
        # The model's dtypes are decided: a trainer's autocast must neither be captured nor compiled.
        with torch.autocast(skeleton.device.type, enabled=False):
            output = programs.run(call, signature, compiled=compiled)
        return output if call.cache is None else filled(call.cache, output, programs.buffers)
