"""capture: from a Hugging Face model to one flat ATen graph, on fake weights.

The graph that leaves this stage holds no tensor: parameters, buffers and constants are placeholders with
``meta["stored"]`` (their key in the parameter store), the user's tensors are placeholders with
``meta["input"]``, and every node has ``meta["val"]`` and a name made of its module path and its operation.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import os
import traceback
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from .errors import CaptureError
from .passes.nodes import aten, identifier

BATCH, SEQUENCE = "batch", "sequence"
PRODUCES_GRADIENT = frozenset({aten.linear.default, aten.addmm.default, aten.matmul.default})


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

    @property
    def inputs(self) -> list[fx.Node]:
        return [n for n in self.gm.graph.nodes if "input" in n.meta]

    @property
    def stored(self) -> list[fx.Node]:
        return [n for n in self.gm.graph.nodes if "stored" in n.meta]


class Blueprint:
    """The model's Python without its weights: what is traced for each new signature.

    Args:
        model: a ``transformers.PreTrainedModel``; read, never changed.

    Attributes:
        keys: canonical store key of every parameter and buffer name (tied names share one).
        dtype: dtype of the model's first floating-point parameter.
    """

    def __init__(self, model: nn.Module) -> None:
        tensors = dict(named_tensors(model))
        self.device = next(iter(tensors.values())).device
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
        self.captures = 0

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
        return copy.deepcopy(self.model, memo)  # type: ignore[no-any-return]

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
        for dims in (shared_dims, automatic_dims):
            mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
            model = self.fake(mode, dtype).train(training)
            with mode:
                examples = {k: example(v) for k, v in resized(inputs).items()}
            take_exactly(model, list(examples))
            spec = dims(examples)
            try:
                with mode, quiet():
                    program = torch.export.export(
                        model, (), examples, dynamic_shapes=spec, strict=False
                    )
            except Exception as error:
                errors.append(error)
                if not is_about_dims(error):
                    break
                continue
            return self.finish(program)
        raise capture_error(self.model, errors[-1], inputs) from errors[-1]

    def finish(self, program: ExportedProgram) -> Capture:
        """Flatten the exported program into our form."""
        signature = program.graph_signature
        foreign = [s for s in signature.output_specs if s.kind is not OutputKind.USER_OUTPUT]
        if foreign:
            raise CaptureError(
                f"the model changes {foreign[0].target!r} during forward; a captured graph must only "
                "return values. Accepted: models whose forward does not write to their buffers"
            )
        self.captures += 1
        stored: dict[str, str] = {}
        names: dict[str, str] = {}
        constants: dict[str, torch.Tensor] = {}
        keywords = program.call_spec.in_spec.children()[1]
        user = iter(keywords.context)
        for item in signature.input_specs:
            if item.kind in (InputKind.PARAMETER, InputKind.BUFFER):
                stored[item.arg.name] = self.keys[str(item.target)]
            elif item.kind is InputKind.CONSTANT_TENSOR:
                key = f"constants.{self.captures}.{item.target}"  # each capture has its own
                value = program.constants[str(item.target)]
                if not isinstance(value, torch.Tensor) or type(value) is not torch.Tensor:
                    raise CaptureError(
                        f"the model made the constant {item.target} from a traced value"
                    )
                stored[item.arg.name] = key
                constants[key] = value
            elif item.kind is InputKind.USER_INPUT:
                names[item.arg.name] = next(user)
        graph = Flattener(stored, names, self).run(program.graph_module)
        gm = fx.GraphModule(nn.Module(), graph, class_name=type(self.model).__name__)
        out_spec = program.call_spec.out_spec
        assert out_spec is not None
        guards = list(getattr(program, "_guards_code", None) or [])
        return Capture(gm, out_spec, guards, constants)


def take_exactly(model: Any, names: list[str]) -> None:
    """Give the copy that is traced a forward of just these arguments.

    torch.export 2.13 mistakes the place of arguments that go into the model's ``**kwargs``.
    """
    original = model.forward

    def forward(**kwargs: Any) -> Any:
        return original(**kwargs)

    parameters = [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in names]
    forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    model.forward = forward


class Flattener:
    """Copies an exported graph into a new one: our placeholders, our names, nested regions inlined."""

    def __init__(self, stored: dict[str, str], names: dict[str, str], blueprint: Blueprint) -> None:
        self.stored, self.names, self.blueprint = stored, names, blueprint
        self.dtypes = {k: t.dtype for k, t in named_tensors(blueprint.model)}
        self.graph = fx.Graph()
        self.env: dict[fx.Node, Any] = {}
        self.tainted: set[fx.Node] = set()

    def run(self, exported: fx.GraphModule) -> fx.Graph:
        nodes = list(exported.graph.nodes)
        inputs = [n for n in nodes if n.op == "placeholder"]
        for node in sorted(inputs, key=lambda n: n.name not in self.stored):
            self.placeholder(node)
        self.inline(exported)
        output = self.env[next(n for n in nodes if n.op == "output")]
        self.graph.output(tuple(output))
        self.graph.lint()
        return self.graph

    def placeholder(self, node: fx.Node) -> None:
        val = node.meta.get("val")
        if not isinstance(val, torch.Tensor):
            self.env[node] = val  # None, a flag or a number: already acted on while tracing
            return
        key = self.stored.get(node.name)
        if key is not None and not node.users:
            return
        name = key if key is not None else self.names[node.name]
        new = self.graph.create_node("placeholder", identifier(name), name=identifier(name))
        new.meta["val"] = val
        if key is not None:
            new.meta["stored"] = key
            new.meta["stored_dtype"] = self.dtypes.get(key, val.dtype)
        else:
            new.meta["input"] = name
            if val.is_floating_point():
                self.tainted.add(new)
        self.env[node] = new

    def inline(self, gm: fx.GraphModule) -> None:
        for node in gm.graph.nodes:
            if node in self.env or node.op == "placeholder":
                continue
            if node.op == "get_attr":
                self.env[node] = getattr(gm, str(node.target))
            elif node.op == "output":
                self.env[node] = fx.map_arg(node.args[0], lambda n: self.env[n])
            elif is_region(node):
                self.region(node)
            elif isinstance(node.args and self.env.get(node.args[0]), (tuple, list)):
                self.env[node] = self.env[node.args[0]][node.args[1]]  # getitem of a region
            else:
                self.env[node] = self.copy(node)

    def region(self, node: fx.Node) -> None:
        """Inline ``with torch.no_grad()`` and disabled-autocast blocks."""
        position = next(
            i for i, a in enumerate(node.args) if isinstance(self.value(a), fx.GraphModule)
        )
        body = self.value(node.args[position])
        for inner, outer in zip(
            body.graph.find_nodes(op="placeholder"), node.args[position + 1 :], strict=True
        ):
            self.env[inner] = self.value(outer)
        self.inline(body)
        outputs = self.env[next(n for n in body.graph.nodes if n.op == "output")]
        if "set_grad" in str(node.target) and node.args[0] is False:
            outputs = [self.detached(o) for o in outputs]
        self.env[node] = outputs

    def detached(self, node: Any) -> Any:
        if node not in self.tainted:
            return node
        new = self.graph.create_node(
            "call_function", aten.detach.default, (node,), name=f"{node.name}_detach"
        )
        new.meta.update(node.meta)
        return new

    def value(self, arg: Any) -> Any:
        return self.env[arg] if isinstance(arg, fx.Node) else arg

    def copy(self, node: fx.Node) -> fx.Node:
        path = module_path(node)
        args = fx.map_arg(node.args, lambda n: self.env[n])
        kwargs = fx.map_arg(node.kwargs, lambda n: self.env[n])
        new = self.graph.create_node(
            node.op, node.target, args, kwargs, name=node_name(path, node.target)
        )
        for key in ("val", "nn_module_stack", "stack_trace"):
            if key in node.meta:
                new.meta[key] = node.meta[key]
        new.meta["module"] = path
        if node.target in PRODUCES_GRADIENT or any(n in self.tainted for n in new.all_input_nodes):
            self.tainted.add(new)
        return new


def named_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter and buffer, also under its tied names."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def is_region(node: fx.Node) -> bool:
    name = str(node.target)
    if "wrap_with_set_grad_enabled" in name:
        return True
    # Positional: device_type, dtype, enabled, cache_enabled, body, *args. An enabled region changes dtypes.
    return "wrap_with_autocast" in name and node.args[2] is False


def module_path(node: fx.Node) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = str(stack[-1][0]) if stack else ""
    return "" if path.startswith("_empty_nn_module_stack") else path


def node_name(path: str, target: Any) -> str:
    """``model.layers.0.q_proj`` and ``aten.linear`` -> ``model_layers_0_q_proj``; other ops append their name."""
    op = getattr(target, "overloadpacket", target)
    op_name = getattr(op, "__name__", str(op)).strip("_")
    if op_name == "linear" and path:
        return identifier(path)
    return identifier(f"{path}.{op_name}" if path else op_name)


def resized(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Shapes to trace with: sizes 0 and 1 of batch and sequence become 2, which export can keep dynamic."""
    main = main_shape(inputs)
    if main is None:
        return dict(inputs)
    batch, sequence = main

    def shape_of(t: torch.Tensor) -> list[int]:
        shape = list(t.shape)
        for i, size in enumerate(shape):
            if i == 0 and size == batch:
                shape[i] = max(batch, 2)
            elif i > 0 and size == sequence and is_text(t):
                shape[i] = max(sequence, 2)
        return shape

    return {
        k: v.new_empty(shape_of(v)) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()
    }


def main_shape(inputs: Mapping[str, Any]) -> tuple[int, int] | None:
    """``(batch, sequence)`` of the model's main text input, or None where there is none."""
    for name in ("input_ids", "inputs_embeds"):
        tensor = inputs.get(name)
        if isinstance(tensor, torch.Tensor) and tensor.dim() >= 2:
            return tensor.shape[0], tensor.shape[1]
    return None


def is_text(t: torch.Tensor) -> bool:
    return not t.is_floating_point() or t.dim() <= 4


def example(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return torch.ones(value.shape, dtype=value.dtype, device=value.device)


def shared_dims(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """One named ``Dim`` for batch and one for sequence, shared by all inputs that have them."""
    main = main_shape(inputs)
    if main is None:
        return automatic_dims(inputs)
    batch, sequence = Dim(BATCH), Dim(SEQUENCE)
    spec: dict[str, Any] = {}
    for name, value in inputs.items():
        if not isinstance(value, torch.Tensor):
            spec[name] = None
            continue
        dims: dict[int, Any] = {}
        for i, size in enumerate(value.shape):
            if i == 0 and size == main[0]:
                dims[i] = batch
            elif i > 0 and size == main[1] and not (name == "inputs_embeds" and i == 2):
                dims[i] = sequence
            elif size > 1 and not (name == "inputs_embeds" and i == 2):
                dims[i] = Dim.AUTO
        spec[name] = dims
    return spec


def automatic_dims(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Let export decide: sizes the model depends on become static."""
    return {
        name: {i: Dim.AUTO for i, size in enumerate(value.shape) if size > 1}
        if isinstance(value, torch.Tensor)
        else None
        for name, value in inputs.items()
    }


def is_about_dims(error: Exception) -> bool:
    text = str(error)
    return "Constraints violated" in text or "dynamic_shapes" in text or "specialized" in text


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep export's advice to its own developers out of the user's terminal."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch")
        warnings.filterwarnings("ignore", message=".*lru_cache.*")
        yield


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
