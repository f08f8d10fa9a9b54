"""``qlora-fx plan``, ``explain``, ``check``, ``merge``, ``generate`` and ``chat``."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import LoraConfig

from ..errors import AdapterError, ConfigError
from .main import COMMANDS, UsageError
from .parser import Parser
from .settings import (
    AdapterSettings,
    ChatSettings,
    CheckSettings,
    ExplainSettings,
    GenerateSettings,
    MergeSettings,
    PlanSettings,
)
from .train import budget


def run(command: str, args: list[str]) -> None:
    kinds: dict[str, tuple[type, ...]] = {
        "plan": (PlanSettings,),
        "explain": (ExplainSettings,),
        "check": (CheckSettings,),
        "merge": (AdapterSettings, MergeSettings),
        "generate": (AdapterSettings, GenerateSettings),
        "chat": (AdapterSettings, ChatSettings),
    }
    word = "--adapter" if AdapterSettings in kinds[command] else "--model"
    parser = Parser(
        command,
        kinds[command],
        positional={".yaml": "--config", ".yml": "--config", "": word},
        text=COMMANDS[command][1],
    )
    runs: dict[str, Callable[..., None]] = {
        "plan": plan,
        "explain": explain,
        "check": check,
        "merge": merge,
        "generate": generate,
        "chat": chat,
    }
    runs[command](*parser.parse(args))


def lora_of(settings: Any, targets: Any = "all-linear") -> LoraConfig:
    return LoraConfig(
        r=settings.lora_r,
        lora_alpha=2 * settings.lora_r,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )


def plan(settings: PlanSettings) -> None:
    from ..memory.plan import plan

    made = plan(
        settings.model,
        lora_of(settings),
        batch_size=settings.batch_size,
        sequence_length=settings.sequence_length,
        optimizer=settings.optimizer,
        memory_budget=budget(settings.memory_budget) or 0.0,
        fit=settings.fit,
        compute_dtype=settings.compute_dtype,
        also_quantize=settings.also_quantize,
        blocksize=settings.blocksize,
        device=settings.device,
    )
    print(made)
    if settings.plot:
        made.plot(settings.plot)
        print(f"\nlive bytes along the step: {settings.plot}")


def explain(settings: ExplainSettings) -> None:
    from ..compiler.compile import prepare
    from ..compiler.request import Request
    from ..explain import explain
    from ..memory.plan import model_of

    targets = settings.lora_target_modules
    request = Request.check(
        lora_of(settings, targets[0] if len(targets) == 1 else targets),
        None,
        compute_dtype="bfloat16",
        blocksize=settings.blocksize,
        also_quantize=settings.also_quantize,
        backend="eager",
    )
    prepared = prepare(model_of(settings.model, "auto", None, None, None), request)
    print(explain(prepared.base, prepared.compute))


def check(settings: CheckSettings) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ..testing import check

    model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32)
    try:
        batch = dict(
            AutoTokenizer.from_pretrained(settings.model)(settings.text, return_tensors="pt")
        )
    except (OSError, ValueError):
        ids = torch.arange(24)[None] % model.config.vocab_size
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    batch["labels"] = batch["input_ids"].clone()
    report = check(
        model.eval(),
        batch,
        lora_of(settings),
        compute_dtype=settings.compute_dtype,
        backend=settings.backend,
    )
    if not report.passed:
        raise SystemExit(1)


def merge(which: AdapterSettings, settings: MergeSettings) -> None:
    if which.adapter is None:
        raise UsageError("merge: accepted: qlora-fx merge ADAPTER, or --adapter")
    qmodel, _ = loaded(which, "eager", training=True)
    report = qmodel.merge(
        settings.output_dir, settings.mode, max_shard_size=settings.max_shard_size
    )
    print(report)
    print(f"written: {settings.output_dir}")


def generate(which: AdapterSettings, settings: GenerateSettings) -> None:
    import torch
    from transformers import AutoTokenizer

    from .chat import choice

    if not settings.prompt:
        raise UsageError("generate: accepted: --prompt 'some text'")
    qmodel, source = loaded(which, settings.backend)
    tokenizer = AutoTokenizer.from_pretrained(source)
    text = settings.prompt
    if tokenizer.chat_template:
        message = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=not tokenizer.chat_template)
    inputs = {
        k: v.to(qmodel.device) for k, v in inputs.items() if k in ("input_ids", "attention_mask")
    }
    chosen = choice(tokenizer, settings.temperature)
    with torch.no_grad():
        ids = qmodel.generate(**inputs, max_new_tokens=settings.max_new_tokens, **chosen)
    print(
        tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    )


def chat(which: AdapterSettings, settings: ChatSettings) -> None:
    from transformers import AutoTokenizer

    from .chat import NEW, Conversation, talk, typed

    qmodel, source = loaded(which, settings.backend)
    conversation = Conversation(qmodel, AutoTokenizer.from_pretrained(source), settings)
    print(f"{source}: {NEW} begins anew, Ctrl-C stops an answer, Ctrl-D ends")
    with contextlib.suppress(KeyboardInterrupt):
        talk(conversation, typed())
    print()  # the shell's prompt gets a line of its own


def loaded(which: AdapterSettings, backend: str, *, training: bool = False) -> tuple[Any, str]:
    """The model with the adapter, and where the model came from.

    Args:
        training: as in ``from_pretrained``.

    Raises:
        ConfigError: neither says which model.
    """
    from ..from_pretrained import from_pretrained

    lora, source = None, which.model
    if which.adapter is not None:
        file = Path(which.adapter) / "adapter_config.json"
        try:
            named = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
        except (OSError, ValueError) as error:
            raise AdapterError(f"{file} cannot be read: {error}") from error
        lora = LoraConfig.from_pretrained(which.adapter)
        lora.inference_mode = False
        source = source or named
    if not source:
        raise ConfigError("no model; accepted: --model, or an adapter that names its model")
    qmodel = from_pretrained(source, lora, backend=backend, training=training)
    if which.adapter is not None:
        qmodel.load_adapter(which.adapter)
    return qmodel, source
