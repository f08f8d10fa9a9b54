"""``qlora-fx sft`` and ``qlora-fx dpo``: TRL's trainers over a compiled model, with TRL's flags."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..transformers_internals import last_checkpoint
from .data import dataset
from .logs import JsonLines, plot
from .main import COMMANDS, UsageError
from .parser import Parser
from .settings import DEFAULT_MODEL, CompilerSettings, DataSettings

SHOWN = (
    "output_dir",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "max_length",
    "packing",
    "assistant_only_loss",
    "beta",
    "optim",
    "weight_decay",
    "max_grad_norm",
    "logging_steps",
    "report_to",
    "eval_strategy",
    "eval_steps",
    "save_steps",
    "save_total_limit",
    "resume_from_checkpoint",
    "seed",
)
"""Flags of the trainer that ``--help`` shows."""


OUTPUT = "folder: PEFT's files, checkpoints, log.jsonl, loss.png"
RATE = {"sft": 2e-4, "dpo": 5e-5}
CHANGED: dict[str, tuple[Any, str]] = {
    "model_name_or_path": (DEFAULT_MODEL, "folder or hub id"),
    "dtype": ("auto", "of the dense weights; auto: the checkpoint's"),
    "use_peft": (True, "always: what trains is an adapter"),
    "load_in_4bit": (True, "False: the base stays dense (plain LoRA)"),
    "use_bnb_nested_quant": (True, "double quantization"),
    "lora_target_modules": (["all-linear"], "names, or one pattern, as PEFT takes them"),
    "optim": ("paged_adamw_32bit", "paged_adamw_8bit, paged_lion_32bit, adamw_torch, ..."),
    "gradient_checkpointing": (None, "older name of --activation_checkpointing"),
    "activation_checkpointing": (
        False,
        "True is --memory_budget 0.0; otherwise that decides what is computed again",
    ),
    "bf16": (False, "has no effect: --compute_dtype decides"),
    "logging_steps": (1, "steps between two lines of the log"),
    "report_to": ("none", "tensorboard, wandb, ...; log.jsonl is always written"),
    "save_steps": (100, "steps between two checkpoints"),
    "save_total_limit": (2, "checkpoints that are kept"),
    "resume_from_checkpoint": (
        None,
        "a checkpoint, or auto: the last one in --output_dir if there is one",
    ),
}
"""Flags of TRL's with another default here, those of QLoRA (arXiv:2305.14314) or of this project, or another meaning."""


def run(command: str, args: list[str]) -> None:
    import torch

    try:
        import trl
    except ImportError:
        raise UsageError(f"qlora-fx {command} needs TRL: pip install 'qlora_fx[trl]'") from None
    kind, config = {
        "sft": (trl.SFTTrainer, trl.SFTConfig),
        "dpo": (trl.DPOTrainer, trl.DPOConfig),
    }[command]
    parser = Parser(
        command,
        (CompilerSettings, DataSettings, trl.ModelConfig, config),
        positional={
            **dict.fromkeys((".yaml", ".yml"), "--config"),
            **dict.fromkeys((".jsonl", ".json"), "--dataset_name"),
        },
        shown=SHOWN,
        text=COMMANDS[command][1],
        changed={
            **CHANGED,
            "output_dir": (f"out/{command}", OUTPUT),
            "learning_rate": (RATE[command], ""),
            "dataloader_pin_memory": (torch.cuda.is_available(), ""),
        },
    )
    compiler, data, model, settings = parser.parse(args)
    check(model, settings)
    resume = where_to_resume(settings)
    train(command, kind, compiler, data, model, settings, resume)


def check(model: Any, settings: Any) -> None:
    """Flags of TRL's that mean nothing here, or something else.

    Raises:
        ConfigError: for those.
    """
    refused = {
        "load_in_8bit": (model.load_in_8bit, "False"),
        "use_peft": (not model.use_peft, "True: what trains is an adapter"),
        "trust_remote_code": (settings.trust_remote_code, "False: no code of a checkpoint is run"),
    }
    for name, (wrong, accepted) in refused.items():
        if wrong:
            raise ConfigError(f"--{name}: accepted: {accepted}")
    if model.attn_implementation is not None:
        print(
            f"note: --attn_implementation {model.attn_implementation} has no effect: attention is compiled"
        )


def where_to_resume(settings: Any) -> str | None:
    """The checkpoint to go on from.

    Raises:
        ConfigError: ``output_dir`` has checkpoints of a run that nothing is said about.
    """
    folder, wish = settings.output_dir, settings.resume_from_checkpoint
    last = last_checkpoint(folder)
    settings.resume_from_checkpoint = None
    if wish is None and last is not None:
        raise ConfigError(
            f"{folder} has {Path(last).name} of an earlier run; accepted: --resume_from_checkpoint auto to go on "
            "with it, or another --output_dir"
        )
    if wish is not None and wish.lower() in ("auto", "true"):
        return last
    return None if wish is None or wish.lower() == "false" else wish


def train(
    command: str, kind: Any, compiler: Any, data: Any, model: Any, settings: Any, resume: str | None
) -> None:
    """Load, train, save."""
    from transformers import AutoTokenizer, set_seed
    from trl import get_peft_config

    from ..from_pretrained import from_pretrained
    from ..training import reliable

    started = time.perf_counter()
    examples = dataset(command, data.dataset_name, data.dataset_config, data.dataset_train_split)
    held_out: Any = None
    if data.held_out:
        if not 0 < data.held_out < len(examples):
            raise ConfigError(
                f"--held_out {data.held_out}; accepted: below the number of examples, {len(examples)}"
            )
        held_out = examples.select(range(len(examples) - data.held_out, len(examples)))
        examples = examples.select(range(len(examples) - data.held_out))
    tokenizer = AutoTokenizer.from_pretrained(
        model.model_name_or_path, revision=model.model_revision
    )
    set_seed(settings.seed)  # of the new adapter, too
    qmodel = from_pretrained(
        model.model_name_or_path,
        get_peft_config(model),
        quantization(model),
        dtype=model.dtype,
        compute_dtype=compiler.compute_dtype,
        backend=compiler.backend,
        memory_budget=budget(compiler.memory_budget),
        also_quantize=compiler.also_quantize,
        blocksize=compiler.blocksize,
        cuda_graphs=compiler.cuda_graphs,
        revision=model.model_revision,
    )
    totals = qmodel.explain().totals
    print(
        f"{type(qmodel.get_base_model()).__name__}: {totals['quantized']} of {totals['linears']} linears in 4 bits, "
        f"{totals['adapted']} adapted; {totals['held_bytes'] / 1e9:.2f} GB; {len(examples)} examples"
    )
    trainer = reliable(kind, on_non_finite=data.on_non_finite)(
        model=qmodel,
        args=settings,
        train_dataset=examples,
        eval_dataset=held_out,
        processing_class=tokenizer,
        callbacks=[JsonLines(settings.output_dir)],
    )
    before = trainer.evaluate() if held_out is not None and resume is None else None
    trainer.train(resume)
    after = trainer.evaluate() if held_out is not None else None
    trainer.save_model(settings.output_dir)
    picture = plot(settings.output_dir)
    if after is not None:
        was = "" if before is None else f"{before['eval_loss']:.3f} -> "
        print(f"loss on {len(held_out)} held-out examples: {was}{after['eval_loss']:.3f}")
    print(
        f"done in {time.perf_counter() - started:.0f} s: {settings.output_dir}"
        + (f", {picture}" if picture else "")
    )
    print(f"try it: qlora-fx generate --adapter {settings.output_dir} --prompt '...'")


def quantization(model: Any) -> Any:
    """For ``from_pretrained``; TRL's own function cannot say that the dtype is to be found out."""
    from transformers import BitsAndBytesConfig

    return model.load_in_4bit and BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=model.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=model.use_bnb_nested_quant,
        bnb_4bit_quant_storage=model.bnb_4bit_quant_storage,
    )


def budget(text: str | None) -> float | str | None:
    """A memory budget from a command line: a fraction where it is a number."""
    if text is None:
        return None
    try:
        return float(text)
    except ValueError:
        return text
