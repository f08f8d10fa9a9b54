"""A GPU that is asked and never runs: Inductor writes its code for it where there is none.

``fake_gpu()`` answers PyTorch's questions about the device as an H100 would; fake tensors on "cuda" can be traced forward
and backward, and kernels are written but not compiled. Needs Triton beside PyTorch, g++, and no real GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

SOURCE = Path(__file__).with_suffix(".cpp")
H100 = {
    "name": "NVIDIA H100 (pretended)",
    "major": 9,
    "minor": 0,
    "multi_processor_count": 132,
    "total_memory": 80 << 30,
    "warp_size": 32,
    "regs_per_multiprocessor": 65536,
    "max_threads_per_multi_processor": 2048,
    "max_threads_per_block": 1024,
    "shared_memory_per_block": 49152,
    "shared_memory_per_block_optin": 232448,
    "shared_memory_per_multiprocessor": 233472,
    "L2_cache_size": 50 << 20,
    "is_integrated": False,
    "is_multi_gpu_board": False,
    "gcnArchName": "",
    "uuid": "none",
    "clock_rate": 1_980_000,
    "memory_clock_rate": 2_619_000,
    "memory_bus_width": 5120,
}
"""What ``torch.cuda.get_device_properties`` says of one (NVIDIA H100 data sheet; CUDA C++ Programming Guide, table 27)."""


def library() -> Path:
    """The compiled shim, kept between runs for each PyTorch."""
    root = Path(torch.__path__[0])
    key = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode() + bytes(root)).hexdigest()
    built = Path(tempfile.gettempdir()) / f"qlora_fx_fake_gpu_{key[:16]}.so"
    if not built.exists():
        new = built.with_suffix(".new")
        command = ["g++", "-O1", "-std=c++20", "-fPIC", "-shared", f"-I{root}/include", SOURCE]
        command += ["-o", new, f"-L{root}/lib", "-lc10", "-ltorch_cpu"]
        subprocess.run(command, check=True)
        new.rename(built)
    return built


@contextlib.contextmanager
def fake_gpu() -> Iterator[None]:
    """While this holds, "cuda" is an H100 for whoever asks; what the shim changes stays for the process.

    Raises:
        RuntimeError: there is a real GPU.
    """
    if torch.cuda.is_available():
        raise RuntimeError("there is a GPU here: nothing has to be pretended")
    from torch._dynamo import device_interface
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.runtime import triton_helpers
    from torch._subclasses import fake_tensor
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    if hasattr(torch._C, "_ensureCUDADeviceGuardSet"):  # it would put PyTorch's guard back
        torch._C._ensureCUDADeviceGuardSet = lambda: None
    if not hasattr(torch._C, "_cuda_getCurrentRawStream"):
        torch._C._cuda_getCurrentRawStream = lambda device: 0
    ctypes.CDLL(str(library()), mode=ctypes.RTLD_GLOBAL).pretend()
    properties = SimpleNamespace(**H100)
    said: dict[str, Any] = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_properties": properties,
        "get_device_capability": (9, 0),
        "get_device_name": properties.name,
        "is_bf16_supported": True,
        "is_tf32_supported": True,
        "is_initialized": False,
        "mem_get_info": (properties.total_memory, properties.total_memory),
        "synchronize": None,
        "set_rng_state": None,
        "_lazy_init": None,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        "is_current_stream_capturing": False,
    }
    interface = device_interface.CudaInterface
    replaced: list[tuple[Any, str, Any]] = [
        *((torch.cuda, name, answer(value)) for name, value in said.items()),
        (torch.cuda, "get_rng_state", lambda *_: torch.get_rng_state()),
        *(
            (interface, name, staticmethod(answer(said[name])))
            for name in ("current_device", "device_count", "get_device_properties", "synchronize")
        ),
        (interface, "is_bf16_supported", staticmethod(answer(True))),
        (interface.Worker, "current_device", staticmethod(answer(0))),
        (interface.Worker, "get_device_properties", staticmethod(answer(properties))),
        (fake_tensor, "init_gpu_context", answer(None)),
        (fake_tensor.FakeTensorMode, "avoid_device_init", property(answer(True))),
        (triton_helpers, "set_driver_to_gpu", answer(None)),
        (AsyncCompile, "triton", answer(SimpleNamespace(run=None))),
    ]
    target = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_active_torch_device=lambda: torch.device("cuda", 0),
    )
    with contextlib.ExitStack() as stack:
        for owner, name, value in replaced:
            if hasattr(owner, name):
                stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(mock.patch.object(driver, "_active", target))
        clear_what_was_asked()
        stack.callback(clear_what_was_asked)
        yield


def answer(value: Any) -> Any:
    return lambda *args, **kwargs: value


def clear_what_was_asked() -> None:
    """Answers about the device are kept by whoever asked."""
    from torch._inductor import utils
    from torch._inductor.runtime import hints
    from torch.utils import _triton

    for function in (*vars(_triton).values(), *vars(utils).values()):
        if hasattr(function, "cache_clear"):
            function.cache_clear()
    create: Any = hints.DeviceProperties.create
    getattr(create, "__func__", create).cache_clear()
