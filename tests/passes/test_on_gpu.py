"""What Inductor is given for a GPU: the same values, by fewer launches. Run here on a CPU, as graphs and compiled."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import warnings
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import qlora_fx
import bitsandbytes.functional as bnb
import pytest
import torch
from functorch.compile import make_boxed_func
from qlora_fx.passes.lowering import compiled_body, on_gpu
from qlora_fx.passes.normalize import on_one_device
from qlora_fx.runtime.ops import NESTED_BLOCKSIZE, whole_rows
from qlora_fx.testing.check import randomize_adapter
from small_models import batch, peer_llama
from torch import Tensor, fx
from torch._inductor.choices import InductorChoices
from torch._inductor.compile_fx import compile_fx
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

ops, aten, prims = torch.ops.bitsandbytes, torch.ops.aten, torch.ops.prims


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the passes take CPU tensors for a GPU's."""
    monkeypatch.setattr(on_gpu, "on_gpu", lambda val: True)


def traced(function: Any, *args: Any, mode: str = "fake") -> fx.GraphModule:
    """As Inductor's passes see it: casts in its words."""
    table = {aten._to_copy.default: select_decomp_table()[aten._to_copy.default]}
    return make_fx(function, decomposition_table=table, tracing_mode=mode)(*args)


def rewrite(gm: fx.GraphModule) -> None:
    vals = [n.meta.get("val") for n in gm.graph.find_nodes(op="placeholder")]
    with next(val.fake_mode for val in vals if isinstance(val, FakeTensor)):
        on_gpu.OnGpu()(gm.graph)
    gm.graph.lint()
    gm.recompile()


def stored(shape: tuple[int, int], kind: str, blocksize: int, double: bool) -> dict[str, Any]:
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    packed, state = bnb.quantize_4bit(
        weight, blocksize=blocksize, quant_type=kind, compress_statistics=double
    )
    found = {"packed": packed, "absmax": state.absmax}
    if double:
        found |= {"nested_absmax": state.state2.absmax, "nested_quant_map": state.state2.code}
        found |= {"offset": state.offset}
    return found


def by_bitsandbytes(
    parts: dict[str, Any], shape: tuple[int, int], kind: str, blocksize: int, dtype: torch.dtype
) -> Tensor:
    absmax = parts["absmax"]
    if "offset" in parts:
        nested = (parts["nested_absmax"], parts["nested_quant_map"], NESTED_BLOCKSIZE)
        absmax = ops.dequantize_blockwise(absmax, *nested, torch.float32) + parts["offset"]
    rows = whole_rows(shape, blocksize)
    dense: Tensor = ops.dequantize_4bit(parts["packed"], absmax, blocksize, kind, rows, dtype)
    return dense.view(shape)


def making(
    parts: dict[str, Any], shape: tuple[int, int], kind: str, blocksize: int, dtype: torch.dtype
) -> fx.GraphModule:
    """The graph that makes a weight of its parts."""

    def weight(*values: Tensor) -> Tensor:
        given = dict(zip(parts, values, strict=True))
        return by_bitsandbytes(given, shape, kind, blocksize, dtype)

    return traced(weight, *parts.values())


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize(
    ("shape", "blocksize"), [((64, 48), 64), ((300, 128), 64), ((33, 7), 64), ((48, 160), 128)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_is_bitwise_bitsandbytes_in_a_graph_without_its_operators(
    everywhere: None,
    shape: tuple[int, int],
    blocksize: int,
    kind: str,
    double: bool,
    dtype: torch.dtype,
) -> None:
    parts = stored(shape, kind, blocksize, double)
    gm = making(parts, shape, kind, blocksize, dtype)
    assert theirs(gm.graph)
    true = gm(*parts.values())
    rewrite(gm)
    assert not theirs(gm.graph)
    assert torch.equal(gm(*parts.values()), true)


def theirs(graph: fx.Graph) -> list[str]:
    return [str(n.target) for n in graph.nodes if "bitsandbytes" in str(n.target)]


def test_nothing_changes_on_a_cpu() -> None:
    gm = making(stored((64, 64), "nf4", 64, True), (64, 64), "nf4", 64, torch.float32)
    before = str(gm.graph)
    rewrite(gm)
    assert str(gm.graph) == before


def test_bytes_held_as_another_dtype_stay_bitsandbytes(everywhere: None) -> None:
    parts = stored((64, 64), "nf4", 64, False)
    parts["packed"] = parts["packed"].view(-1, 2).view(torch.bfloat16)
    gm = making(parts, (64, 64), "nf4", 64, torch.float32)
    rewrite(gm)
    assert len(theirs(gm.graph)) == 1


class Scheduled:
    """As much of one of Inductor's nodes as is asked for its buffers."""

    def __init__(self, *buffers: str) -> None:
        self.used_buffer_names = lambda: set(buffers)


def test_no_kernel_dequantizes_two_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(InductorChoices, "can_fuse_horizontal", staticmethod(lambda *_: True))
    weights = [Scheduled(f"{on_gpu.TABLE}_nf4", name) for name in ("buf0", "buf1")]
    fusible = on_gpu.OneWeightAtATime.can_fuse_horizontal
    assert not fusible(None, *weights, 1000)
    assert fusible(None, weights[0], Scheduled("buf2"), 1000)
    assert fusible(None, Scheduled("buf2"), Scheduled("buf3"), 1000)


def products(x: Tensor, *parameters: Tensor) -> list[Tensor]:
    """As the linears of a block: two parameters are stacked, and the last lies otherwise."""
    *factors, odd = [p.to(torch.bfloat16) for p in parameters[2:]]
    both = torch.cat(parameters[:2]).to(torch.bfloat16)
    return [x @ both.t(), *(x @ f.t() for f in factors), x @ odd.t()]


def test_parameters_are_cast_by_one_kernel_for_eight(everywhere: None) -> None:
    x = torch.randn(5, 16).to(torch.bfloat16)
    parameters = [torch.randn(n, 16) for n in (2, 2, 4, 6, 8, 3, 5, 7, 9)] + [torch.randn(3, 16)]
    parameters[-1] = parameters[-1].t().contiguous().t()  # is cast by itself
    gm = traced(products, x, *parameters)
    true = gm(x, *parameters)
    assert targets(gm)[prims.convert_element_type.default] == 9
    rewrite(gm)
    counts = targets(gm)
    # Seven together; the two that are stacked would make nine; the one that lies otherwise.
    assert counts[prims.convert_element_type.default] == 3
    assert counts[aten.cat.default] == 2
    assert all(torch.equal(a, b) for a, b in zip(gm(x, *parameters), true, strict=True))


def targets(gm: fx.GraphModule) -> Counter[Any]:
    return Counter(n.target for n in gm.graph.nodes)


def test_a_product_of_the_size_of_a_parameter_writes_float32_itself(everywhere: None) -> None:
    def gradients(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return (grad.t() @ x).float(), grad @ x.t()

    half = torch.zeros(6, 4, dtype=torch.bfloat16)
    gm = traced(gradients, half, half)
    rewrite(gm)
    counts = targets(gm)
    assert counts[aten.mm.dtype] == 1
    assert counts[aten.mm.default] == 1
    assert counts[prims.convert_element_type.default] == 0
    node = next(iter(gm.graph.find_nodes(op="call_function", target=aten.mm.dtype)))
    assert node.args[2] is torch.float32
    assert node.meta["val"].dtype == torch.float32


def test_activations_keep_their_product_and_cast(everywhere: None) -> None:
    """A result with a row per token costs more to write in float32 than the launch of a cast that is fused anyway."""

    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return (x @ weight).float()

    half = torch.zeros(6, 6, dtype=torch.bfloat16)
    gm = traced(forward, half, half, mode="symbolic")
    rewrite(gm)
    assert targets(gm)[aten.mm.default] == 1


@pytest.mark.slow
@torch._inductor.config.patch(force_disable_caches=True)
def test_a_compiled_step_is_the_same_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through Inductor, which has to fuse it, with the passes and without. In float32: nothing is cast."""
    found = []
    for taken in (False, True):
        monkeypatch.setattr(on_gpu, "on_gpu", lambda val, taken=taken: taken)
        # Compilations are shared between tests where the compiler is the same: tests/sharing.py.
        monkeypatch.setattr(compiled_body, "compile_fx", partial(compile_fx))
        qmodel = qlora_fx.transform(peer_llama(1), compute_dtype=torch.float32)
        randomize_adapter(qmodel)
        qmodel(**batch()).loss.backward()
        qmodel.zero_grad()
        with Operators() as called, warnings.catch_warnings():
            warnings.simplefilter("error")
            qmodel(**batch()).loss.backward()
        gradients = {n: p.grad for n, p in qmodel.adapter_parameters()}
        found.append((sum("bitsandbytes" in n for n in called.names), gradients))
    (before, true), (after, got) = found
    assert (before, after) == (22, 0)
    for name, gradient in true.items():
        assert gradient is not None
        assert gradient.norm() > 0, name
        assert torch.equal(gradient, got[name]), name


class Operators(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes what is called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_what_a_step_of_a_llama_block_launches(
    everywhere: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Per weight one kernel, for all parameters two casts, per adapter's gradient one product into float32."""
    found: dict[bool, fx.GraphModule] = {}

    def seen(gm: fx.GraphModule, inputs: Any, *, is_backward: bool = False, **_: Any) -> Any:
        assert isinstance(V.choices, on_gpu.OneWeightAtATime)
        copied = fx.GraphModule(gm, copy.deepcopy(gm.graph))
        rewrite(copied)
        if targets(copied)[aten._unsafe_index.Tensor]:
            found[is_backward] = copied
        return make_boxed_func(gm.forward)

    monkeypatch.setattr(compiled_body, "compile_fx", partial(compile_fx, inner_compile=seen))
    qmodel = qlora_fx.transform(peer_llama(2).bfloat16(), compute_dtype=torch.bfloat16)
    qmodel(**batch()).loss.backward()
    forward, backward = targets(found[False]), targets(found[True])
    for gm in found.values():
        assert not theirs(gm.graph)
        casts = gm.graph.find_nodes(op="call_function", target=prims.convert_element_type.default)
        assert sum(bool(on_gpu.sources(cast)) for cast in casts) == 0
    weights = 7
    # Each looks up the levels of its absmax and the 16 values.
    assert forward[aten._unsafe_index.Tensor] == backward[aten._unsafe_index.Tensor] == 2 * weights
    # A of q, k and v are one factor, and so are those of gate and up.
    assert forward[aten.mm.default] + forward[aten.addmm.default] == weights + 4 + weights
    assert backward[aten.mm.dtype] == 4 + weights
    rotary = 2
    assert (forward[aten.cat.default], backward[aten.cat.default]) == (2 + rotary, 2)


@pytest.mark.slow
def test_what_inductor_writes_for_a_gpu_launches_a_third_of_the_reference(tmp_path: Path) -> None:
    """An 8B model's step, counted in the code for an H100; the reference's was profiled on an H200."""
    pytest.importorskip("triton")  # PyTorch for CPUs comes without it
    root = Path(__file__).resolve().parents[2]
    figures = tmp_path / "cost.json"
    command = [sys.executable, "benchmarks/cuda_cost.py", "--models", "8b", "--shapes", "1x512"]
    done = subprocess.run(
        [*command, "--json", str(figures)], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(figures.read_text())
    layers, weights = 32, 7
    assert found["kinds"]["qlora_fx.attention"] == layers
    assert found["kinds"]["mm"] + found["kinds"].get("addmm", 0) > 2 * weights * layers
    assert found["launches"] < found["likely"] < 0.35 * found["reference"]


def test_numbers_are_made_on_the_models_device() -> None:
    """Also what is computed of them; a number that is asked for on the CPU stays there."""
    graph = fx.Graph()
    x, mode = graph.placeholder("x"), FakeTensorMode()
    with mode:
        x.meta.update(input="x", val=torch.empty(3, device="cuda"))
        made = graph.call_function(aten.full.default, ([], 2.0))
        made.meta["val"] = torch.full([], 2.0)
        view = graph.call_function(aten.expand.default, (made, []))
        view.meta["val"] = made.meta["val"].expand([])
        scaled = graph.call_function(aten.mul.Tensor, (x, view))
        scaled.meta["val"] = x.meta["val"] * view.meta["val"]
        there = graph.call_function(aten.to.device, (view, "cpu", torch.float32))
        there.meta["val"] = view.meta["val"].to("cpu")
    graph.output((scaled, there))
    assert on_one_device(graph)
    assert [n.meta["val"].device.type for n in (made, view, scaled, there)] == [
        *["cuda"] * 3,
        "cpu",
    ]
    assert made.kwargs["device"] == torch.device("cuda", 0)
    assert not on_one_device(graph)
