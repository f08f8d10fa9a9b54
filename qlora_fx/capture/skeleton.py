"""capture: from a Hugging Face model to one flat ATen graph, on fake weights.

The graph that leaves this stage holds no tensor: parameters, buffers and constants are placeholders with
``meta["stored"]`` (their key in the parameter store), the user's tensors are placeholders with
``meta["input"]``, and every node has ``meta["val"]`` and a name made of its module path and its operation.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo import config as dynamo_config
from torch._subclasses.fake_tensor import FakeTensorMode, is_fake
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from ..errors import CaptureError
from ..runtime.gpu import numbered
from ..runtime.program import holds
from ..transformers_internals import experts_implementation, set_experts_implementation
from .arguments import Call, bind_call, is_encoder_decoder, vocabulary_size
from .cache import is_past
from .cache_layers import Buffers
from .check_call import check_call
from .dynamic_shapes import (
    automatic_dims,
    example,
    has_free_pictures,
    has_pictures,
    is_about_dims,
    of_fixed_pictures,
    resized,
    shared_dims,
)
from .export import capture_error, export, quiet, without_writes
from .export_patches import Patches, always, ways
from .export_shortcuts import LongFormulaError
from .flat_graph import Flattener
from .holders import holders, transposed_stacks
from .known_arguments import KnownArguments
from .picture_counts import picture_counts
from .positions import check_positions, longest_rows
from .repeated_blocks import walked_once
from .written_out import NotAlone


@dataclass
class Capture:
    """One captured signature.

    Attributes:
        gm: the flat graph.
        out_spec: pytree spec of the model's own output class.
        guards: Python expressions over ``L[name]`` (the user's tensors) that must hold for a call.
        constants: tensors the model made itself, by store key.
    """

    gm: fx.GraphModule
    out_spec: pytree.TreeSpec
    guards: list[str] = field(default_factory=list)
    constants: dict[str, torch.Tensor] = field(default_factory=dict)

    def fits(self, inputs: Mapping[str, Any]) -> bool:
        """Whether a call of these arguments has the sizes that the graph is written for."""
        return all(holds(guard, inputs) for guard in self.guards)


UNTRACEABLE_EXPERTS = ("eager", "deepgemm", "sonicmoe")
"""transformers' ways to run experts that depend on the data in Python, or call kernels of their own."""


def named_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter and buffer, also under its tied names."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


class Skeleton:
    """The model's Python without its weights: what is traced for each new signature.

    Args:
        model: a ``transformers.PreTrainedModel``; read, never changed.
        device: where its weights will be when it runs; default: where they are.

    Attributes:
        model: a copy of the model whose tensors are on the meta device.
        signature, known_arguments: of its forward.
        pictures: what is counted in them before a call.
        keys: canonical store key of every parameter and buffer name (tied names share one).
        dtype: dtype of the model's first floating-point parameter.
        dtypes: of every tensor, by name.
        parameters: store keys of parameters; the others are of buffers.
        vocabulary: rows of the input embedding; None where there is none.
        encoder_decoder: whether the target has a length of its own.
        longest: tokens of a row that learned positions have room for, by argument.
        captures: numbers of the captures, one sequence for all skeletons of a model.
    """

    def __init__(self, model: nn.Module, device: torch.device | None = None) -> None:
        tensors = dict(named_tensors(model))
        self.device = numbered(next(iter(tensors.values())).device if device is None else device)
        self.dtype = next(t.dtype for t in tensors.values() if t.is_floating_point())
        first: dict[int, str] = {}
        self.keys = {name: first.setdefault(id(t), name) for name, t in tensors.items()}
        memo: dict[int, Any] = {}
        for tensor in tensors.values():
            empty: torch.Tensor = torch.empty_like(tensor, device="meta", requires_grad=False)
            if isinstance(tensor, nn.Parameter):
                empty = nn.Parameter(empty, requires_grad=False)
            memo.setdefault(id(tensor), empty)
        self.model: Any = copy.deepcopy(model, memo)
        self.signature = inspect.signature(model.forward)
        self.dtypes = {name: t.dtype for name, t in tensors.items()}
        self.parameters = {self.keys[name] for name, _ in model.named_parameters()}
        self.known_arguments = KnownArguments(self.model, self.signature)
        self.pictures = picture_counts(self.model)
        self.vocabulary = vocabulary_size(self.model)
        self.encoder_decoder = is_encoder_decoder(self.model)
        self.longest = longest_rows(self.model)
        self.captures = itertools.count(1)

    def submodel(self, path: str) -> Skeleton:
        """The same model, of which the module at ``path`` is called: its backbone, without the head, or its encoder."""
        module = self.model.get_submodule(path)
        other = copy.copy(self)
        other.model = copy.copy(self.model)
        cls = type(self.model)

        def forward(model: Any, *args: Any, **kwargs: Any) -> Any:
            return model.get_submodule(path)(*args, **kwargs)

        other.model.__class__ = type(cls.__name__, (cls,), {"forward": forward})
        other.signature = inspect.signature(module.forward)
        other.known_arguments = KnownArguments(module, other.signature)
        other.pictures = picture_counts(module)
        other.encoder_decoder &= "decoder_input_ids" in other.signature.parameters
        return other

    @property
    def name(self) -> str:
        """The class of the model."""
        return type(self.model).__name__

    def dense_bytes(self) -> dict[str, int]:
        """Bytes of every tensor before it is quantized, by store key."""
        return {self.keys[name]: tensor.nbytes for name, tensor in named_tensors(self.model)}

    def bind(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], buffers: Buffers | None = None
    ) -> Call:
        """The call ``forward(*args, **kwargs)``, its arguments by name. See ``bind_call``."""
        known = self.known_arguments
        call = bind_call(
            self.signature, args, kwargs, known=known, device=self.device, buffers=buffers
        )
        self.pictures.add(call.values)
        return call

    def check(self, call: Call) -> None:
        """Raise ``InputError`` if the call's tensors do not fit the model. See ``check_call``."""
        check_call(call.values, self.device, self.vocabulary, self.encoder_decoder)
        past = 0 if call.cache is None else call.cache.get_seq_length()
        check_positions(call.values, self.longest, past)

    def fake(self, mode: FakeTensorMode, dtype: torch.dtype) -> nn.Module:
        """A copy with fake tensors on the real device; tensors of the model's dtype become ``dtype``."""
        memo: dict[int, Any] = {}
        with mode:
            for _, tensor in named_tensors(self.model):
                new_dtype = dtype if tensor.dtype == self.dtype else tensor.dtype
                fake = torch.empty_strided(
                    tensor.shape, tensor.stride(), dtype=new_dtype, device=self.device
                )
                if isinstance(tensor, nn.Parameter):
                    fake = nn.Parameter(fake, requires_grad=False)
                memo.setdefault(id(tensor), fake)
        model = copy.deepcopy(self.model, memo)
        for module in model.modules():
            config: Any = getattr(module, "config", None)
            if getattr(config, "use_cache", False):
                config.use_cache = False  # for models that take no such argument
            if experts_implementation(config) in UNTRACEABLE_EXPERTS:
                set_experts_implementation(config, "grouped_mm")  # the same numbers
        return model  # type: ignore[no-any-return]

    def capture(self, inputs: Mapping[str, Any], *, training: bool, dtype: torch.dtype) -> Capture:
        """Trace ``forward(**inputs)``.

        Args:
            inputs: the call's arguments by name. Tensors give shape and dtype only, their values are
                not read. Dimensions equal to batch and sequence of the main input become dynamic.
            training: train or eval mode of the model while it is traced (dropout is baked in).
            dtype: dtype of activations.

        Raises:
            CaptureError: naming the line of the model that stopped the trace.
        """
        errors: list[Exception] = []
        found = None
        for examples, fixed in self.examples(inputs):
            capture = self.tried(examples, training, dtype, fixed, errors)
            if capture and capture.fits(inputs):
                return capture
            found = capture or found
        if found is None:
            # The first error is about the model as it is; the last may be about a patch.
            raise capture_error(self.model, errors[0], inputs) from errors[0]
        return found

    def examples(self, inputs: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], bool]]:
        """Arguments to trace with, and whether pictures keep their sizes: each for where what was traced before does not fit.

        Of pictures of any size, formulas may tell one from several. Of free sizes, code may depend on how many rows there
        are, and where that is one it is traced with one.
        """
        free = resized(inputs, self.encoder_decoder, self.pictures.patches_per_token)
        yield free, False
        pictures = has_pictures(inputs)
        if pictures:
            yield free, True
        tensors = [(t, free[k]) for k, t in inputs.items() if isinstance(t, torch.Tensor)]
        if any(t.shape != other.shape for t, other in tensors):
            yield inputs, pictures

    def tried(
        self,
        inputs: Mapping[str, Any],
        training: bool,
        dtype: torch.dtype,
        fixed: bool,
        errors: list[Exception],
    ) -> Capture | None:
        """What the first way that works gives, for pictures of a ``fixed`` size or of any; adds to ``errors`` why others do not."""
        for patches in ways():
            for free in (shared_dims, automatic_dims):
                dims = of_fixed_pictures(free) if fixed else free
                try:
                    program = self.export(inputs, training, dtype, dims, patches)
                except CaptureError:
                    raise  # a refusal of ours: no other way would be right
                except LongFormulaError:
                    return None  # with all patches
                except Exception as error:
                    if patches is not walked_once:
                        errors.append(error)
                    if not is_about_dims(error):
                        break
                else:
                    with contextlib.suppress(NotAlone):  # then all blocks are walked
                        return self.finish(program)
                    break
        return None

    def export(
        self,
        inputs: Mapping[str, Any],
        training: bool,
        dtype: torch.dtype,
        dims: Callable[..., dict[str, Any]],
        patches: Patches,
    ) -> ExportedProgram:
        """One attempt, with one choice of free sizes and with or without patches."""
        mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
        mode.cache_enabled = False  # as in passes/lowering/example.py
        told = (self.encoder_decoder, self.pictures.patches_per_token)
        # torch.export makes a mode of its own, too.
        uncached = dynamo_config.patch(fake_tensor_cache_enabled=False)
        # Where the first call has no gradients, later ones may.
        with torch.inference_mode(False), torch.enable_grad():
            model = self.fake(mode, dtype).train(training)
            with mode:
                examples = {k: example(v) for k, v in inputs.items()}
            spec = dims(examples, *told)
            with mode, uncached, quiet(), always(model), patches(model):
                return export(model, examples, spec, has_free_pictures(examples, spec))

    def finish(self, program: ExportedProgram) -> Capture:
        """Flatten the exported program into our form."""
        signature = program.graph_signature
        foreign = [s for s in signature.output_specs if s.kind is not OutputKind.USER_OUTPUT]
        if foreign:
            raise CaptureError(
                f"the model changes {foreign[0].target!r} during forward; a captured graph must only "
                "return values. Accepted: models whose forward does not write to their buffers"
            )
        number = next(self.captures)
        stored: dict[str, str] = {}
        names: dict[str, str] = {}
        constants: dict[str, torch.Tensor] = {}
        unread = without_writes(program, type(self.model).__name__)
        keywords = program.call_spec.in_spec.children()[1]
        user = iter(keywords.context)
        for item in signature.input_specs:
            if item.kind in (InputKind.PARAMETER, InputKind.BUFFER):
                stored[item.arg.name] = self.keys[str(item.target)]
            elif item.kind is InputKind.CONSTANT_TENSOR and item.arg.name not in unread:
                key = f"constants.{number}.{item.target}"  # each capture has its own
                value = program.constants[str(item.target)]
                value = getattr(value, "constant", None) if is_fake(value) else value
                if type(value) is not torch.Tensor:
                    raise CaptureError(
                        f"the model made the constant {item.target} from a traced value"
                    )
                stored[item.arg.name] = key
                constants[key] = value
            elif item.kind is InputKind.USER_INPUT:
                names[item.arg.name] = next(user)
        graph = Flattener(stored, names, self.dtypes, self.parameters, self.keys).run(
            program.graph_module
        )
        for node in graph.find_nodes(op="placeholder"):
            if is_past(node.meta.get("input", "")):
                node.meta["past"] = True
        gm = fx.GraphModule(nn.Module(), graph, class_name=self.name)
        gm.meta.update(holders=holders(self.model), transposed_stacks=transposed_stacks(self.model))
        out_spec = program.call_spec.out_spec
        assert out_spec is not None
        guards = list(getattr(program, "_guards_code", None) or [])
        return Capture(gm, out_spec, guards, constants)
