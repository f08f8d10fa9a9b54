"""CUDA graphs: what a part of a program launches is recorded once for a shape, and then launched as one.

# Note [What may be recorded]
A recording repeats the launches that it saw, on the addresses that it saw. So the part's own work must depend on nothing else:

- weights and adapters are read where they lie, and their addresses are a part of the key; so are a cache's buffers
  (capture/cache_layers.py lends the next cache the same). What flows into the part is copied to a place of its own before each replay;
- numbers, and tensors on the CPU that stand for one (``qlora_fx::mask_kind``), are a part of the key, and so is all that decides
  what is launched: shapes, strides, dtypes, what needs a gradient, how many blocks are recomputed;
- nothing in it may wait for the device (``operators.waits``), or write to what it was given: it is done once before it is recorded.
  What waits all the same is found then, before PyTorch would fail in a recording, which it does not recover from.

# Note [One step at a time]
All recordings of a part share their memory. What a forward has kept for its backward is overwritten by the next replay,
so while a backward is to come every other call runs without a recording: slower, never wrong. A backward that comes twice,
with another forward in between, is refused.

Results are copied out of the recording, and gradients with one launch for all: a caller may keep them, or add to them.
Keys and values of new tokens are not: a cache has copied them itself before the next call.
"""

from __future__ import annotations

import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch._utils import _unflatten_dense_tensors
from torch.autograd.function import once_differentiable

from ..errors import GraphError, users_stacklevel

BEFORE = 2
"""Calls of a shape that run before it is recorded: they compile, and load what is launched."""
LIMIT = 8
"""Shapes that are recorded at the same time."""
COUNTED = 256
"""Shapes whose calls are counted; then counting begins anew."""

Work = Callable[[], list[Tensor]]


class WaitsForDevice(Exception):
    """What was to be recorded waits for the device."""


class Recorder:
    """Records on one GPU; all that it has recorded shares memory.

    Attributes:
        replays: how many forwards have been replayed: the last one's memory is still as it left it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.replays = 0
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.pool = torch.cuda.graph_pool_handle()

    def warm_up(self, work: Work) -> None:
        """Do it once where it will be recorded.

        Raises:
            WaitsForDevice: it cannot be recorded.
        """
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        mode = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
            torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.cuda.stream(self.stream):
                work()
        except RuntimeError as error:
            if "synchronizing CUDA operation" in str(error):
                raise WaitsForDevice(str(error)) from error
            raise
        finally:
            torch.cuda.set_sync_debug_mode(mode)
            current.wait_stream(self.stream)

    def record(self, work: Work) -> tuple[list[Tensor], Callable[[], None]]:
        """Where its results will lie, and what does it again."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
        ):
            results = work()
        return results, graph.replay


class Hold:
    """A forward whose backward is to come: it lives as long as its autograd graph."""

    done = False


class Recording:
    """A part at one key.

    Args:
        run: takes tensors and numbers, returns tensors.
        values: of the call at hand.
        moving: positions among them of what flows in.
    """

    def __init__(
        self,
        recorder: Recorder,
        run: Callable[..., Sequence[Tensor]],
        values: Sequence[Any],
        moving: Sequence[int],
    ) -> None:
        self.recorder, self.run, self.grad = recorder, run, torch.is_grad_enabled()
        self.values = list(values)
        self.places: list[tuple[int, Tensor]] = []
        for i in moving:
            self.values[i] = place_for(values[i])
            self.places.append((i, unexpanded(self.values[i].detach())))
        self.fill(values)
        self.places_of_wanted = [
            i
            for i, v in enumerate(self.values)
            if self.grad and isinstance(v, Tensor) and v.requires_grad
        ]
        self.wanted = [self.values[i] for i in self.places_of_wanted]
        self.live: Sequence[Tensor] = []
        self.groups: list[list[int]] = []
        recorder.warm_up(self.forward)
        self.given = [torch.zeros_like(t) for t in self.live if t.requires_grad]
        if self.given:
            recorder.warm_up(self.backward)
        self.live = []
        self.results, self.replay = recorder.record(self.forward)
        self.differentiable: list[bool] = [t.requires_grad for t in self.live]
        if self.given:
            self.sums, self.replay_backward = recorder.record(self.backward)
        self.live = []

    def fill(self, values: Sequence[Any]) -> None:
        with torch.no_grad():
            for i, place in self.places:
                place.copy_(unexpanded(values[i]))

    def run_forward(self, values: Sequence[Any]) -> None:
        self.fill(values)
        self.replay()
        self.recorder.replays += 1

    def forward(self) -> list[Tensor]:
        with torch.set_grad_enabled(self.grad):
            self.live = self.run(*self.values)
        return [t.detach() for t in self.live]

    def backward(self) -> list[Tensor]:
        """Of each group, those of one dtype, the gradients one behind the other."""
        live = [t for t in self.live if t.requires_grad]
        found = torch.autograd.grad(live, self.wanted, self.given, allow_unused=True)
        dtypes = dict.fromkeys(g.dtype for g in found if g is not None)
        self.groups = [
            [i for i, g in enumerate(found) if g is not None and g.dtype == dtype]
            for dtype in dtypes
        ]
        return [torch.cat([found[i].reshape(-1) for i in group]) for group in self.groups]

    def gradients(self, given: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Of what is wanted, for gradients of the differentiable results; the recorded forward is used up."""
        for place, value in zip(self.given, given, strict=True):
            if value is None:
                place.zero_()
            else:
                place.copy_(value)
        self.replay_backward()
        found: list[Tensor | None] = [None] * len(self.wanted)
        for group, together in zip(self.groups, self.sums, strict=True):
            like = [self.wanted[i] for i in group]
            parts: Any = _unflatten_dense_tensors(together.clone(), like)  # type: ignore[no-untyped-call]
            for i, part in zip(group, parts, strict=True):
                found[i] = part
        return found


class Replayed(torch.autograd.Function):
    """The results of a replay, as functions of what is wanted."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, recording: Recording, hold: Hold, *wanted: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.recording, ctx.hold, ctx.number = recording, hold, recording.recorder.replays
        ctx.set_materialize_grads(False)
        results = [t.clone() for t in recording.results]
        plain = [t for t, d in zip(results, recording.differentiable, strict=True) if not d]
        ctx.mark_non_differentiable(*plain)
        return tuple(results)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor | None) -> Any:  # type: ignore[override]
        recording: Recording = ctx.recording
        if ctx.number != recording.recorder.replays:
            raise GraphError(
                "backward a second time, after another forward: a recorded step keeps only its last one. Accepted: "
                "cuda_graphs = False"
            )
        pairs = zip(grads, recording.differentiable, strict=True)
        found = recording.gradients([grad for grad, given in pairs if given])
        ctx.hold.done = True
        return None, None, *found


@dataclass(frozen=True)
class Places:
    """What a part's arguments and results are.

    Attributes:
        stored: of each argument, whether it is one of the model's own tensors.
        cached: positions of arguments that are a cache's buffers, read where they lie.
        read_at_once: of each result, whether nobody reads it after the next call.
    """

    stored: Sequence[bool]
    cached: Sequence[int] = ()
    read_at_once: Sequence[bool] = ()


class Graphed(nn.Module):
    """A part of a program whose launches are recorded for each shape. Note [What may be recorded].

    Args:
        part: takes tensors and numbers, returns a tuple of tensors.
        places: what these are.
        setting: what else decides what is launched.
        recorder: makes the recorder, once there is something to record.

    Attributes:
        recordings: by key.
        waits: whether it was found that the part waits for the device, so that it is not recorded.
    """

    def __init__(
        self,
        part: nn.Module,
        places: Places,
        setting: Callable[[], Any],
        recorder: Callable[[], Recorder],
    ) -> None:
        super().__init__()
        self.part, self.places, self.setting = part, places, setting
        resting = set(places.cached)
        self.flowing = [i for i, own in enumerate(places.stored) if not own and i not in resting]
        self.make_recorder = recorder
        self.recorder: Recorder | None = None
        self.recordings: dict[Any, Recording] = {}
        self.seen: Counter[Any] = Counter()
        self.outstanding: weakref.ref[Hold] | None = None
        self.warned = self.waits = False

    def forward(self, *values: Any) -> tuple[Tensor, ...]:
        if self.waits or self.is_busy():
            return self.run(*values)
        key, moving = self.key(values)
        recording = self.recordings.get(key)
        if recording is None:
            recording = self.record(key, values, moving)
            if recording is None:
                return self.run(*values)
        recording.run_forward(values)  # what follows is done while the GPU works
        if recording.wanted and any(recording.differentiable):
            hold = Hold()
            self.outstanding = weakref.ref(hold)
            wanted = [values[i] for i in recording.places_of_wanted]
            found: tuple[Tensor, ...] = Replayed.apply(recording, hold, *wanted)  # type: ignore[no-untyped-call]
            return found
        if not any(self.places.read_at_once):
            return tuple(t.clone() for t in recording.results)
        pairs = zip(recording.results, self.places.read_at_once, strict=True)
        return tuple(t if at_once else t.clone() for t, at_once in pairs)

    def run(self, *values: Any) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = self.part(*values)
        return found

    def is_busy(self) -> bool:
        """True while a recorded forward waits for its backward. Note [One step at a time]."""
        hold = None if self.outstanding is None else self.outstanding()
        return hold is not None and not hold.done

    def forget(self) -> None:
        """Give up what was recorded, and its memory; a backward that is to come still has its own."""
        self.recordings.clear()
        self.seen.clear()
        self.recorder = None

    def key(self, values: Sequence[Any]) -> tuple[Any, list[int]]:
        """What a recording is right for, and the positions of what flows in."""
        stored = [value for value, own in zip(values, self.places.stored, strict=True) if own]
        with_grad = torch.is_grad_enabled()
        key: list[Any] = [with_grad, torch.is_inference_mode_enabled(), self.setting()]
        key += map(Tensor.data_ptr, stored)
        if with_grad:
            key += map(attrgetter("requires_grad"), stored)
        key += [(values[i].data_ptr(), values[i].shape) for i in self.places.cached]
        moving = []
        for i in self.flowing:
            value = values[i]
            if not isinstance(value, Tensor):
                key.append(value)
            elif value.device.type == "cpu" and not value.dim():
                key.append(value.item())
            else:
                moving.append(i)
                key.append((value.shape, value.stride(), value.dtype, value.requires_grad))
        return tuple(key), moving

    def record(self, key: Any, values: Sequence[Any], moving: Sequence[int]) -> Recording | None:
        """Record a call that came often enough."""
        if key not in self.seen and len(self.seen) == COUNTED:
            self.seen.clear()
        self.seen[key] += 1
        if self.seen[key] <= BEFORE:
            return None
        if len(self.recordings) == LIMIT:
            if not self.warned:
                self.warned = True
                warnings.warn(
                    f"cuda_graphs: {LIMIT} shapes are recorded, and others run without; rows padded to few lengths "
                    "(pad_to_multiple_of) or packed have fewer",
                    stacklevel=users_stacklevel(),
                )
            return None
        if self.recorder is None:
            self.recorder = self.make_recorder()
        try:
            recording = Recording(self.recorder, self.part, values, moving)
        except WaitsForDevice as error:
            self.waits = True
            warnings.warn(
                "cuda_graphs: these blocks are launched one by one, for an operator in them waits for the device "
                f"({error}); please report the model",
                stacklevel=users_stacklevel(),
            )
            return None
        self.recordings[key] = recording
        return recording


def unexpanded(t: Tensor) -> Tensor:
    """One of each element: dimensions that repeat are taken once."""
    for dim, (size, step) in enumerate(zip(t.shape, t.stride(), strict=True)):
        if size > 1 and not step:
            t = t.narrow(dim, 0, 1)
    return t


def place_for(t: Tensor) -> Tensor:
    """A tensor of the same layout, which needs a gradient where ``t`` does."""
    once = unexpanded(t.detach())
    new = torch.empty_strided(once.shape, once.stride(), dtype=t.dtype, device=t.device)
    return new.expand(t.shape).requires_grad_(t.requires_grad)
