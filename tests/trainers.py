"""Trainers of transformers and TRL over small models: one run of either stack, and what it logged."""

from __future__ import annotations

import random
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from default_path import ours
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

WORDS = [f"w{i}" for i in range(95)]
SPECIAL = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>", "bos_token": "<bos>"}
CHAT = (
    "{% for m in messages %}{{ '<bos> ' + m['role'] + ' ' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + ' <eos> ' }}{% endgeneration %}{% else %}{{ m['content'] + ' ' }}{% endif %}{% endfor %}"
)
"""A chat template that marks what the assistant says."""


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word; ids below 101, as ``small_models.tiny_llama`` takes them."""
    names = ["<pad>", "<eos>", "<unk>", "<bos>", "user", "assistant", *WORDS]
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, chat_template=CHAT, **SPECIAL)


def rows(kind: str, count: int = 96) -> Dataset:
    """A dataset as each trainer expects it; documents of 3 to 20 words."""
    draw = random.Random(0)

    def text(least: int, most: int) -> str:
        return " ".join(draw.choice(WORDS) for _ in range(draw.randint(least, most)))

    made: dict[str, Any] = {
        "tokens": lambda: {
            "input_ids": (ids := [draw.randint(6, 100) for _ in range(16)]),
            "labels": ids,
        },
        "text": lambda: {"text": text(3, 20)},
        "completion": lambda: {"prompt": text(3, 6), "completion": " " + text(3, 12)},
        "chat": lambda: {
            "messages": [
                {"role": "user", "content": text(3, 6)},
                {"role": "assistant", "content": text(3, 9)},
            ]
        },
        "preference": lambda: {
            "prompt": text(3, 5),
            "chosen": " " + text(4, 9),
            "rejected": " " + text(4, 9),
        },
        "prompt": lambda: {"prompt": text(3, 7)},
    }
    return Dataset.from_list([made[kind]() for _ in range(count)])


@dataclass(frozen=True)
class Recipe:
    """One way to train: the trainer's classes, its data, its own settings and arguments."""

    trainer: Any
    config: Any
    data: str
    options: dict[str, Any] = field(default_factory=dict)
    words: dict[str, Any] = field(default_factory=dict)


SAMPLED: list[list[str]] = []
"""What ``even_words`` was asked about, in order."""


def even_words(completions: list[str], **others: Any) -> list[float]:
    """A reward: the share of words with an even number."""
    SAMPLED.append(completions)
    numbers = [[int(w[1:]) for w in text.split() if w[1:].isdigit()] for text in completions]
    return [sum(n % 2 == 0 for n in found) / max(len(found), 1) for found in numbers]


RECIPES = {
    "Trainer": Recipe(Trainer, TrainingArguments, "tokens"),
    "SFT": Recipe(SFTTrainer, SFTConfig, "text"),
    "SFT on completions": Recipe(SFTTrainer, SFTConfig, "completion"),
    "SFT on the assistant": Recipe(SFTTrainer, SFTConfig, "chat", {"assistant_only_loss": True}),
    "SFT, packed": Recipe(SFTTrainer, SFTConfig, "text", {"packing": True, "max_length": 32}),
    "DPO": Recipe(DPOTrainer, DPOConfig, "preference"),
    "DPO, precomputed": Recipe(
        DPOTrainer, DPOConfig, "preference", {"precompute_ref_log_probs": True}
    ),
    "Reward": Recipe(RewardTrainer, RewardConfig, "preference"),
    "GRPO": Recipe(
        GRPOTrainer,
        GRPOConfig,
        "prompt",
        {"num_generations": 2, "max_completion_length": 6, "beta": 0.05, "num_iterations": 2},
        {"reward_funcs": even_words},
    ),
}
SUPERVISED = [name for name in RECIPES if name != "GRPO"]
"""Those whose data say what is right: their losses are not near zero."""


def trained(
    model: Any,
    recipe: str,
    folder: Path,
    *,
    steps: int = 20,
    optimizer: Any = None,
    resume: str | None = None,
    evaluated: bool = False,
    metrics: Any = None,
    **options: Any,
) -> Any:
    """The trainer after ``steps`` steps.

    Args:
        optimizer: instead of the one that ``optim`` names.
        resume: a checkpoint to go on from.
        evaluated: on the training data, too.
        metrics: ``compute_metrics`` of what is evaluated.

    Raises:
        AssertionError: qlora_fx warned on the way.
    """
    one = RECIPES[recipe]
    settings = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": steps,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "warmup_steps": 3,
        "max_grad_norm": 0.05,
        "optim": "adamw_torch",
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }
    args = one.config(str(folder), **(settings | one.options | options))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        words = dict(one.words)
        if one.trainer is not Trainer:
            words["processing_class"] = tokenizer()
        if evaluated:
            words["eval_dataset"] = rows(one.data, 16)
        if metrics is not None:
            words["compute_metrics"] = metrics
        if optimizer is not None:
            words["optimizers"] = (optimizer, None)
        trainer = one.trainer(model=model, args=args, train_dataset=rows(one.data), **words)
        trainer.train(resume_from_checkpoint=resume)
    said = [str(w.message) for w in caught if "qlora_fx" in w.filename or ours(w)]
    assert not said, said
    return trainer


def logged(trainer: Any, name: str) -> torch.Tensor:
    """What was logged at each step."""
    return torch.tensor(
        [float(row[name]) for row in trainer.state.log_history if name in row], dtype=torch.float64
    )
