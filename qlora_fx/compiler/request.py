"""What the user asked for: the arguments of ``transform``, ``from_pretrained`` and ``plan``, checked once for all.

Every field of ``peft.LoraConfig`` (``check_lora.py``) and ``transformers.BitsAndBytesConfig`` is honoured or refused by
name; nothing is ignored.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from transformers import BitsAndBytesConfig

from ..config import DENSE, ROLES, Quantization
from ..errors import ConfigError
from ..passes.lower import BACKENDS
from ..runtime.fastest_dtype import ComputeDtype, fastest
from ..units import SIZES, parse_size
from .check_lora import check_lora
from .pipeline import OPTIONAL

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STORAGE_DTYPES = (torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Request:
    """The arguments of the doors, checked. Made by ``Request.check``.

    Attributes:
        lora: the user's, or the default.
        quantization: how weights are stored.
        compute_dtype: a dtype, "auto" (measure), or None (``quantization_dtype``).
        quantization_dtype: of the ``BitsAndBytesConfig`` or the checkpoint; None where there is none: measure.
        also_quantize: members of ``config.ROLES``.
        example_inputs: arguments of one call, or None: made from the model's signature.
        memory_budget: as ``check_memory_budget`` returns it.
        disabled: names of stages that are left out.
        backend: one of ``BACKENDS``.
        cuda_graphs: whether launches of blocks are recorded.
        training: whether the first capture is of a training step; else of the prompt of a generation.
    """

    lora: LoraConfig
    quantization: Quantization
    compute_dtype: torch.dtype | str | None
    quantization_dtype: torch.dtype | None
    also_quantize: frozenset[str]
    example_inputs: Mapping[str, Any] | None
    memory_budget: int | float | None
    disabled: frozenset[str]
    backend: str
    cuda_graphs: bool
    training: bool = True

    @classmethod
    def check(
        cls,
        lora: LoraConfig | None = None,
        quantization: BitsAndBytesConfig | bool | None = None,
        *,
        compute_dtype: torch.dtype | str | None = None,
        blocksize: int = 64,
        also_quantize: Iterable[str] = (),
        example_inputs: Mapping[str, Any] | None = None,
        memory_budget: int | float | str | None = None,
        disable: Iterable[str] = (),
        backend: str = "inductor",
        cuda_graphs: bool = False,
        training: bool = True,
    ) -> Request:
        """The arguments, if each can be honoured. ``transform`` says what they mean.

        Raises:
            ConfigError: naming the argument, its value, and what is accepted.
        """
        lora = check_lora(lora)
        storage, dtype = check_quantization(quantization, blocksize)
        if backend not in BACKENDS:
            raise ConfigError(f"backend={backend!r}; accepted: {', '.join(BACKENDS)}")
        return cls(
            lora=lora,
            quantization=storage,
            compute_dtype=None if compute_dtype is None else check_compute_dtype(compute_dtype),
            quantization_dtype=dtype,
            also_quantize=check_roles(also_quantize, storage),
            example_inputs=example_inputs,
            memory_budget=check_memory_budget(memory_budget, backend),
            disabled=check_disabled(disable, OPTIONAL),
            backend=backend,
            cuda_graphs=check_cuda_graphs(cuda_graphs, backend),
            training=check_flag(training, "training"),
        )

    def compute(self, device: torch.device, model_dtype: torch.dtype) -> ComputeDtype:
        """The dtype in which linears multiply: the argument's, the quantization's, or the fastest on ``device``.

        Without quantization the model's own, where none was asked for.
        """
        if self.quantization.is_dense and self.compute_dtype is None:
            return ComputeDtype(model_dtype, "the model's own: nothing is quantized")
        if isinstance(self.compute_dtype, torch.dtype):
            return ComputeDtype(self.compute_dtype, "as asked for by compute_dtype")
        if self.compute_dtype is None and self.quantization_dtype is not None:
            dtype = check_compute_dtype(self.quantization_dtype)
            assert isinstance(dtype, torch.dtype)
            return ComputeDtype(dtype, "as asked for by bnb_4bit_compute_dtype")
        return fastest(str(device))


def check_flag(value: Any, name: str) -> bool:
    """The value.

    Raises:
        ConfigError: it is no bool.
    """
    if not isinstance(value, bool):
        raise ConfigError(f"{name}={value!r}; accepted: True, False")
    return value


def check_memory_budget(value: Any, backend: str = "inductor") -> int | float | None:
    """The budget as bytes (int), as a fraction of what keeping everything takes (float), or None: from free memory.

    Raises:
        ConfigError: for anything else, or where the backend cannot honour it.
    """
    if value is None:
        return None
    if backend == "eager":
        raise ConfigError(
            f"memory_budget={value!r} with backend='eager': plain autograd keeps what it likes, and nothing is "
            "computed again. Accepted: None, or backend 'inductor' or 'aot_eager'"
        )
    if isinstance(value, float) and 0 <= value <= 1:
        return value
    return parse_size(
        value,
        "memory_budget",
        accepted=f"{SIZES}, a fraction from 0.0 to 1.0 of what keeping everything takes, or None (as much as is free)",
    )


def check_cuda_graphs(
    value: Any, backend: str = "inductor", device: torch.device | None = None
) -> bool:
    """The value.

    Args:
        device: of the model, where it is known.

    Raises:
        ConfigError: for anything but True and False, or where the backend or the device has none.
    """
    wanted = check_flag(value, "cuda_graphs")
    if wanted and backend == "eager":
        raise ConfigError(
            "cuda_graphs=True with backend='eager'; accepted: False, or backend 'inductor' or 'aot_eager'"
        )
    if wanted and device is not None and device.type != "cuda":
        raise ConfigError(f"cuda_graphs=True and the model is on {device}; accepted: False")
    return wanted


def check_compute_dtype(dtype: Any) -> torch.dtype | str:
    """The dtype, by itself or by its name, or ``"auto"``.

    Raises:
        ConfigError: for anything else.
    """
    if dtype == "auto":
        return "auto"
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, dtype)
    if dtype not in COMPUTE_DTYPES:
        names = ", ".join(str(d) for d in COMPUTE_DTYPES)
        raise ConfigError(f"compute_dtype={dtype!r}; accepted: 'auto', {names}")
    result: torch.dtype = dtype
    return result


def check_quantization(
    quantization: BitsAndBytesConfig | bool | None, blocksize: int
) -> tuple[Quantization, torch.dtype | None]:
    """Storage settings, and the compute dtype the config asks for (None where there is no config).

    Raises:
        ConfigError: naming the field, its value, and what is accepted.
    """
    if blocksize not in BLOCKSIZES:
        raise ConfigError(f"blocksize={blocksize!r}; accepted: {', '.join(map(str, BLOCKSIZES))}")
    if quantization is None:
        return Quantization(blocksize=blocksize), None
    if quantization is False:
        return Quantization(DENSE), None
    if not isinstance(quantization, BitsAndBytesConfig):
        raise ConfigError(
            f"quantization={quantization!r} is a {type(quantization).__name__}; accepted: a "
            "transformers.BitsAndBytesConfig(load_in_4bit=True, ...), None for NF4 with double quantization, or False for "
            "none"
        )
    q = quantization
    if q.load_in_8bit or not q.load_in_4bit:
        raise ConfigError(
            f"BitsAndBytesConfig.load_in_4bit={q.load_in_4bit}, load_in_8bit={q.load_in_8bit}; "
            "accepted: load_in_4bit=True"
        )
    plain = BitsAndBytesConfig()
    for name in (
        "llm_int8_threshold",
        "llm_int8_enable_fp32_cpu_offload",
        "llm_int8_has_fp16_weight",
    ):
        if getattr(q, name) != getattr(plain, name):
            raise ConfigError(
                f"BitsAndBytesConfig.{name}={getattr(q, name)!r} has no meaning in 4 bits; "
                f"accepted: {getattr(plain, name)!r} (its default)"
            )
    if q.bnb_4bit_quant_type not in ("nf4", "fp4"):
        raise ConfigError(
            f"BitsAndBytesConfig.bnb_4bit_quant_type={q.bnb_4bit_quant_type!r}; accepted: 'nf4', 'fp4'"
        )
    if q.bnb_4bit_quant_storage not in STORAGE_DTYPES:
        raise ConfigError(
            f"BitsAndBytesConfig.bnb_4bit_quant_storage={q.bnb_4bit_quant_storage}; accepted: "
            + ", ".join(map(str, STORAGE_DTYPES))
        )
    checked = Quantization(
        quant_type=q.bnb_4bit_quant_type,
        blocksize=blocksize,
        double_quant=q.bnb_4bit_use_double_quant,
        storage_dtype=q.bnb_4bit_quant_storage,
        skip=tuple(q.llm_int8_skip_modules or ()),
    )
    return checked, q.bnb_4bit_compute_dtype


def check_roles(roles: Iterable[str], quantization: Quantization) -> frozenset[str]:
    """``also_quantize`` as a set.

    Raises:
        ConfigError: for a member that is not one of ``ROLES``.
    """
    listed = [roles] if isinstance(roles, str) else list(roles)
    for role in listed:
        if role not in ROLES:
            raise ConfigError(
                f"also_quantize has {role!r}; accepted: {', '.join(map(repr, ROLES))}"
            )
    if listed and quantization.is_dense:
        raise ConfigError(f"also_quantize={listed!r} with quantization=False; accepted: ()")
    return frozenset(listed)


def check_disabled(names: Iterable[str], optional: Iterable[str]) -> frozenset[str]:
    """``disable`` as a set.

    Raises:
        ConfigError: for a member that is no optional stage.
    """
    listed = [names] if isinstance(names, str) else list(names)
    for name in listed:
        if name not in optional:
            raise ConfigError(f"disable has {name!r}; accepted: {', '.join(map(repr, optional))}")
    return frozenset(listed)
