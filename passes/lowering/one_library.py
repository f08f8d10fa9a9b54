"""The C++ kernels of a program, compiled together.

Inductor gives each kernel a file and a run of the compiler, and nearly all of such a run goes to what kernels have in
common, headers and vector types: the 15 kernels of a Llama block's backward take 22 s one by one and 3 s as one file.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import ExtensionFileLoader, ModuleSpec
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

from torch._inductor.async_compile import AsyncCompile, get_compile_threads, kernel_code_log
from torch._inductor.codecache import CppPythonBindingsCodeCache

TOGETHER = 8
"""Kernels in a file where several files are compiled at the same time: each takes a tenth of what a file takes."""
HEADERS = "#define PY_SSIZE_T_CLEAN\n#include <Python.h>\n#include <sstream>\n#include <cstdlib>\n#include <cerrno>\n"
"""What Inductor's bindings include, outside of any namespace."""

one_by_one = AsyncCompile.cpp_pybinding
wait_for_others = AsyncCompile.wait


class Kernel(NamedTuple):
    """What Inductor says of a kernel; stands for it until all of its program are known.

    Attributes:
        argtypes: in C++, ``"const float*"``.
        source: a file that defines the function ``kernel``.
    """

    argtypes: list[str]
    source: str


class Library(CppPythonBindingsCodeCache):
    """A file of several kernels, each a Python module: ``kernel_0``, which Inductor loads, and so on."""

    entry_function = "kernel_0"


@contextlib.contextmanager
def one_library() -> Iterator[None]:
    """While it holds Inductor compiles the C++ kernels of a program together.

    What cannot be compiled together is compiled one by one, with a warning.
    """
    with (
        mock.patch.object(AsyncCompile, "cpp_pybinding", later),
        mock.patch.object(AsyncCompile, "wait", wait),
    ):
        yield


def later(self: AsyncCompile, argtypes: list[str], source_code: str) -> Kernel:
    kernel_code_log.info("CPP+Bindings Kernel:\n%s", source_code)
    return Kernel(argtypes, source_code)


def wait(self: AsyncCompile, scope: dict[str, Any]) -> None:
    """Put functions where kernels are named in a program's globals."""
    kernels = {name: value for name, value in scope.items() if isinstance(value, Kernel)}
    if len(kernels) > 1:
        try:
            scope.update(zip(kernels, compiled(list(kernels.values())), strict=True))
            kernels = {}
        except Exception as error:  # whatever it is, the other way may do
            reason = str(error).strip().partition("\n")[0]
            warnings.warn(f"kernels are compiled one by one: {reason}", stacklevel=2)
    scope.update({name: one_by_one(self, *kernel) for name, kernel in kernels.items()})
    wait_for_others(self, scope)


def compiled(kernels: Sequence[Kernel]) -> list[Callable[..., None]]:
    """The functions of kernels, compiled in as many files as are worth it."""
    files = -(-len(kernels) // TOGETHER) if get_compile_threads() > 1 else 1
    parts = [kernels[i::files] for i in range(files)]
    with ThreadPoolExecutor(files) as threads:
        submit = threads.submit if files > 1 else None
        loads = [Library.load_async(source(part), submit_fn=submit) for part in parts]
        of_parts = [functions(load(), len(part)) for load, part in zip(loads, parts, strict=True)]
    return [of_parts[i % files][i // files] for i in range(len(kernels))]


def source(kernels: Sequence[Kernel]) -> str:
    """One file of them; each has a namespace, for functions and bindings of its own."""
    lines = [line for kernel in kernels for line in kernel.source.splitlines()]
    included = dict.fromkeys(line for line in lines if line.startswith("#include"))
    return "\n".join((HEADERS, *included, *(of_one(i, k) for i, k in enumerate(kernels))))


def of_one(i: int, kernel: Kernel) -> str:
    own = "\n".join(line for line in kernel.source.splitlines() if not line.startswith("#include"))
    arguments = ", ".join(
        f"parse_arg<{argtype.replace('const ', '')}>(args, {n})"
        for n, argtype in enumerate(kernel.argtypes)
    )
    bindings = Library.suffix_template.format(
        arg_len=len(kernel.argtypes),
        call_entry_func=Library.call_entry_function.format(arguments),
        entry_func="kernel",
        extra_parse_arg="",
    )
    named = re.sub(r"\b(kernel|kernel_py|PyInit_kernel)\b", rf"\1_{i}", own + bindings)
    return f"namespace of_kernel_{i} {{\n{named}\n}}"


def compile_headers() -> None:
    """What every file begins with, which takes longer than most files: compiled beforehand."""
    Library.load_async("// at::vec::", submit_fn=lambda compile_it: None)


def functions(first: ModuleType, number: int) -> list[Callable[..., None]]:
    """Those of the modules in a library, of which the first has been loaded."""
    modules = [first]
    for i in range(1, number):
        name = first.__name__.removesuffix("_0") + f"_{i}"
        loader = ExtensionFileLoader(name, str(first.__file__))
        modules.append(
            importlib.util.module_from_spec(ModuleSpec(name, loader, origin=loader.path))
        )
        loader.exec_module(modules[-1])
    return [getattr(module, f"kernel_{i}") for i, module in enumerate(modules)]
