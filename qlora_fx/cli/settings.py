"""The flags of each command. Names and defaults are TRL's where it has them, but for what QLoRA sets otherwise."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def flag(default: Any, text: str) -> Any:
    """A dataclass field with help."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class CompilerSettings:
    """Of ``from_pretrained``; those that a checkpoint, an adapter and a trainer do not decide."""

    compute_dtype: str = flag(
        "auto", "dtype of products: auto (measured), bfloat16, float16, float32"
    )
    backend: Literal["inductor", "aot_eager", "eager"] = flag(
        "inductor", "what runs the graph; the others start sooner and step slower"
    )
    memory_budget: str | None = flag(
        None,
        "what a step may hold from forward to backward: '6GB', or a fraction of everything, 0.0 to 1.0; "
        "default: what is free",
    )
    also_quantize: list[str] = flag([], "head, embeddings or both: 4 bits there too")
    blocksize: int = flag(64, "values per scale of 4-bit weights")
    cuda_graphs: bool = flag(
        False, "record what blocks launch on a GPU; for short steps of few shapes (packing)"
    )


@dataclass
class DataSettings:
    """Where examples come from."""

    dataset_name: str | None = flag(
        None,
        "JSONL file or hub id; lines have 'messages', 'prompt' and 'completion', or 'text'; "
        "for dpo 'prompt', 'chosen' and 'rejected'",
    )
    dataset_config: str | None = flag(None, "configuration of a hub dataset")
    dataset_train_split: str = flag("train", "split of a hub dataset")
    held_out: int = flag(0, "examples that are kept for evaluation, the last ones of the file")
    on_non_finite: Literal["stop", "skip"] = flag(
        "stop", "when a loss or gradient is not finite: stop the run, or skip the step"
    )


@dataclass
class PlanSettings:
    """Of ``qlora_fx.plan``."""

    model: str = flag(DEFAULT_MODEL, "folder or hub id; only config.json is read")
    batch_size: int = flag(1, "rows of a batch")
    sequence_length: int = flag(512, "tokens of a row")
    lora_r: int = flag(16, "LoRA rank")
    optimizer: str = flag("PagedAdamW32bit", "as bitsandbytes names it")
    memory_budget: str = flag(
        "1.0", "held from forward to backward: '6GB' or a fraction of everything"
    )
    fit: str | None = flag(
        None, "memory that the peak shall fit, as '24GB'; what has to give is changed"
    )
    compute_dtype: str = flag("bfloat16", "dtype of products")
    also_quantize: list[str] = flag([], "head, embeddings or both: 4 bits there too")
    blocksize: int = flag(64, "values per scale of 4-bit weights")
    device: Literal["cuda", "cpu"] = flag("cuda", "where it will be trained")
    plot: str | None = flag(None, "file for a picture of live bytes along the step, as plan.png")


@dataclass
class ExplainSettings:
    """Of ``qlora_fx.explain``."""

    model: str = flag(DEFAULT_MODEL, "folder or hub id; only config.json is read")
    lora_r: int = flag(16, "LoRA rank")
    lora_target_modules: list[str] = flag(
        ["all-linear"], "names or one pattern, as PEFT takes them"
    )
    also_quantize: list[str] = flag([], "head, embeddings or both: 4 bits there too")
    blocksize: int = flag(64, "values per scale of 4-bit weights")


@dataclass
class CheckSettings:
    """Of ``qlora_fx.testing.check``."""

    model: str = flag(
        DEFAULT_MODEL, "folder or hub id; the whole model is held in float64 meanwhile"
    )
    text: str = flag(
        "The quick brown fox jumps over the lazy dog.",
        "what the step is taken with, where there is a tokenizer",
    )
    lora_r: int = flag(16, "LoRA rank")
    compute_dtype: str = flag("float32", "dtype of products")
    backend: Literal["inductor", "aot_eager", "eager"] = flag("inductor", "what runs the graph")


@dataclass
class AdapterSettings:
    """A model and an adapter of it."""

    adapter: str | None = flag(None, "folder with adapter_config.json; default: none")
    model: str | None = flag(None, "folder or hub id; default: the one that the adapter names")


@dataclass
class MergeSettings:
    """Of ``QLoRAModel.merge``."""

    output_dir: str = flag("merged", "folder that is written, whole or not at all")
    mode: Literal["dequantized", "base16", "requantized"] = flag(
        "dequantized",
        "the values that 4 bits stand for plus the adapter (what was trained), the original weights plus the "
        "adapter, or the first in 4 bits again",
    )
    max_shard_size: str = flag("5GB", "bytes of tensors per file")


@dataclass
class DoctorSettings:
    """Of the report on a machine."""

    out: str | None = flag(None, "file that the report is written to, too")
    quick: bool = flag(False, "leave out the training steps, which take a minute each")


@dataclass
class ChatSettings:
    """Of a conversation."""

    system: str = flag("", "what the system says first, where the chat template has a place for it")
    max_new_tokens: int = flag(512, "most tokens of an answer")
    temperature: float = flag(0.0, "0 takes the likeliest token")
    backend: Literal["inductor", "aot_eager", "eager"] = flag(
        "eager", "what runs the graph; inductor compiles first, which pays for long conversations"
    )


@dataclass
class GenerateSettings:
    """Of ``QLoRAModel.generate``."""

    prompt: str = flag("", "text; the chat template is applied where there is one")
    max_new_tokens: int = flag(64, "most tokens that are generated")
    temperature: float = flag(0.0, "0 takes the likeliest token")
    backend: Literal["inductor", "aot_eager", "eager"] = flag(
        "eager", "what runs the graph; inductor compiles first, which pays for long texts"
    )
