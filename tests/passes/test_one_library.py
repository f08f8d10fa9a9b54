"""Kernels of a program share a file: each computes what it did alone, and the compiler runs once."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import sympy
import torch
from qlora_fx.passes.lowering import one_library
from qlora_fx.passes.lowering.index_arithmetic import polynomials_expanded
from torch._inductor import async_compile, codecache, cpp_builder
from torch._inductor.codegen.cpp import stride_at_vec_range
from torch._inductor.compile_fx import compile_fx
from torch._inductor.utils import fresh_cache
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._sympy.functions import FloorDiv, ModularIndexing


@pytest.fixture
def compiler_runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Files that the C++ compiler was run for."""
    runs: list[str] = []
    original = cpp_builder.run_compile_cmd

    def run(command: str, cwd: str) -> Any:
        runs.extend(word for word in command.split() if word.endswith(".main.cpp"))
        return original(command, cwd)

    monkeypatch.setattr(cpp_builder, "run_compile_cmd", run)
    return runs


def scaling(factor: int) -> one_library.Kernel:
    """``out[i] = factor * in[i] + shift``, by a function whose name other kernels use too."""
    source = f"""
        #include <torch/csrc/inductor/cpp_prefix.h>
        static float scaled(float x) {{ return {factor} * x; }}
        extern "C" void kernel(const float* in, float* out, const int64_t n, float shift)
        {{
            for (int64_t i = 0; i < n; ++i) out[i] = scaled(in[i]) + shift;
        }}
    """
    return one_library.Kernel(["const float*", "float*", "const int64_t", "const float"], source)


@pytest.mark.parametrize(("threads", "files"), [(1, 1), (4, 3)])
def test_each_kernel_is_its_own(
    threads: int, files: int, compiler_runs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(one_library, "get_compile_threads", lambda: threads)
    monkeypatch.setattr(one_library, "TOGETHER", 2)
    factors = [threads + 10 * i for i in range(5)]  # other files for other numbers of threads
    with fresh_cache():
        functions = one_library.compiled([scaling(factor) for factor in factors])
        x = torch.randn(7)
        for function, factor in zip(functions, factors, strict=True):
            y = torch.empty(7)
            function(x, y, 7, 0.5)
            torch.testing.assert_close(y, factor * x + 0.5)
    assert len(compiler_runs) == files


def two_kernels(x: torch.Tensor) -> tuple[torch.Tensor]:
    y = torch.softmax(x @ x, -1)
    return (torch.relu(y @ x) + 1,)


def compiled(x: torch.Tensor) -> Any:
    with one_library.one_library():
        return compile_fx(make_fx(two_kernels)(x), [x])


def test_a_program_is_one_run_of_the_compiler_and_none_where_it_is_cached(
    compiler_runs: list[str],
) -> None:
    x = torch.randn(5, 5)
    with fresh_cache():
        for _ in range(2):
            (y,) = compiled(x)(x)
            torch.testing.assert_close(y, two_kernels(x)[0])
            assert len(compiler_runs) == 1
            torch._dynamo.reset()


def test_what_cannot_share_a_file_is_compiled_alone(
    compiler_runs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = one_library.source
    monkeypatch.setattr(one_library, "source", lambda kernels: source(kernels) + "nonsense")
    x = torch.randn(6, 6)
    with fresh_cache(), pytest.warns(UserWarning, match="kernels are compiled one by one: "):
        run = compiled(x)
    torch.testing.assert_close(run(x), two_kernels(x))
    assert len(compiler_runs) == 3, "Inductor's own way is one run for each kernel"


def test_headers_are_those_of_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled with other flags they would be compiled again, when the first program is."""
    found: list[Any] = []

    def compiled_header(*header: Any, **how: Any) -> str:
        found.append((header, {name: str(value) for name, value in how.items()}))
        return "header.h"

    monkeypatch.setattr(codecache, "_precompile_header", compiled_header)
    kernels = [k._replace(source=k.source + "// at::vec::") for k in (scaling(1), scaling(2))]
    with fresh_cache():
        one_library.compile_headers()
        one_library.Library.load_async(one_library.source(kernels), submit_fn=lambda work: None)
    ahead, needed = found
    assert ahead == needed


def test_inductor_is_left_as_it_was() -> None:
    own = async_compile.AsyncCompile.cpp_pybinding, async_compile.AsyncCompile.wait
    with one_library.one_library():
        assert async_compile.AsyncCompile.wait is not own[1]
    assert (async_compile.AsyncCompile.cpp_pybinding, async_compile.AsyncCompile.wait) == own


def test_polynomials_are_multiplied_out_and_nothing_else_changes() -> None:
    simplify = sympy.simplify
    rows, length, place = sympy.symbols("rows length place", integer=True)
    height, width = FloorDiv(length - 1, 4) + 1, FloorDiv(place - 1, 4) + 1  # patches
    polynomials = (
        32 * length * (rows + 1) - 32 * length * rows,
        rows * length**2 + place - 8,
        (rows + 1) * (length + 2),
        sympy.Integer(3),
        32 * height * (width + rows) - 32 * height * width,
        width * FloorDiv(rows + 1, height * width) - width * FloorDiv(rows, height * width),
        ModularIndexing(rows, 1, height * width) - height * (rows + 1) + height * rows,
        FloorDiv(8 * (rows + 1) - 8, 8) * place - rows * place,
    )
    others = (
        FloorDiv(rows, length) + ModularIndexing(rows, 1, length),
        rows / length - 1 / length,
        sympy.sqrt(length) ** 2,
        rows >= length,
        sympy.expand(32 * height * width) / sympy.expand(height * width),
        sympy.sin(rows) ** 2 + sympy.cos(rows) ** 2,
    )
    with polynomials_expanded():
        for polynomial in polynomials:
            found = sympy.simplify(polynomial)
            assert found == sympy.expand(simplify(polynomial)) == sympy.simplify(found)
        for other in others:
            assert sympy.simplify(other) == simplify(other)
    assert sympy.simplify is simplify


def test_strides_of_a_loop_are_inductors() -> None:
    stride_at = sys.modules[stride_at_vec_range.__module__].stride_at  # its place has moved
    rows, length, place = sympy.symbols("rows length place", integer=True)
    index = 32 * rows * length + 16 * place * length + 4 * place + 7
    for variable, expected in {rows: 32 * length, place: 16 * length + 4}.items():
        stride_at.cache_clear()
        with polynomials_expanded():
            quick = stride_at(index, variable)
        stride_at.cache_clear()
        assert (
            sympy.expand(quick - stride_at(index, variable)) == 0 == sympy.expand(quick - expected)
        )
