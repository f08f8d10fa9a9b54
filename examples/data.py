"""Training data: JSONL with ``prompt``/``completion`` or chat ``messages``, to batches with masked prompts."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from qlora_fx import DataError

IGNORE = -100
"""Label of tokens that give no loss, as in transformers."""

ORDINALS = [
    "first",
    "second",
    "third",
    "fourth",
    "fifth",
    "sixth",
    "seventh",
    "eighth",
    "ninth",
    "tenth",
    "eleventh",
    "twelfth",
    "thirteenth",
    "fourteenth",
    "fifteenth",
    "sixteenth",
    "seventeenth",
    "eighteenth",
    "nineteenth",
    "twentieth",
    "twenty-first",
    "twenty-second",
    "twenty-third",
    "twenty-fourth",
    "twenty-fifth",
    "twenty-sixth",
    "twenty-seventh",
    "twenty-eighth",
]
MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]


@dataclass(frozen=True)
class Example:
    """A conversation; the last message is the answer that exact match compares."""

    messages: tuple[dict[str, str], ...]

    @property
    def question(self) -> str:
        return self.messages[-2]["content"] if len(self.messages) > 1 else ""

    @property
    def answer(self) -> str:
        return self.messages[-1]["content"]


def dates(count: int, seed: int = 0) -> list[Example]:
    """The built-in task, all different: ``Write in words: 14.03.`` -> ``the fourteenth of March``."""
    days = [(d, m) for d in range(1, 29) for m in range(1, 13)]
    random.Random(seed).shuffle(days)
    if count > len(days):
        raise DataError(f"{count} examples asked for; accepted: at most {len(days)}")
    return [
        pair(f"Write in words: {d:02d}.{m:02d}.", f"the {ORDINALS[d - 1]} of {MONTHS[m - 1]}")
        for d, m in days[:count]
    ]


def pair(prompt: str, completion: str) -> Example:
    return Example(
        ({"role": "user", "content": prompt}, {"role": "assistant", "content": completion})
    )


def read_jsonl(path: str | Path) -> list[Example]:
    """One example per line: ``{"prompt": ..., "completion": ...}`` or ``{"messages": [...]}``.

    Raises:
        DataError: naming the file, the line, and what is accepted.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path} is not a file; accepted: a JSONL file")
    examples = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            examples.append(parse(line, f"{path}:{number}"))
    if len(examples) < 2:
        raise DataError(
            f"{path} has {len(examples)} examples; accepted: at least 2, one is held out"
        )
    return examples


def parse(line: str, where: str) -> Example:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({error}): {line[:80]!r}") from None
    if isinstance(record, dict) and isinstance(record.get("messages"), list):
        messages = record["messages"]
        good = messages and all(
            isinstance(m, dict)
            and isinstance(m.get("role"), str)
            and isinstance(m.get("content"), str)
            for m in messages
        )
        if good and messages[-1]["role"] == "assistant":
            return Example(tuple({"role": m["role"], "content": m["content"]} for m in messages))
        raise DataError(
            f"{where}: accepted: messages with role and content, the last one the assistant's: {line[:80]!r}"
        )
    if isinstance(record, dict) and all(
        isinstance(record.get(k), str) for k in ("prompt", "completion")
    ):
        return pair(record["prompt"], record["completion"])
    raise DataError(
        f"{where}: accepted: an object with 'prompt' and 'completion', or with 'messages': {line[:80]!r}"
    )


class Formatter:
    """Text of examples in the model's own chat template, or plainly where it has none."""

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length
        self.pad = (
            tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        )

    def render(self, messages: tuple[dict[str, str], ...], *, answer_next: bool) -> str:
        if self.tokenizer.chat_template:
            text: str = self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=answer_next
            )
            return text
        return "".join(
            m["content"] + ("\n" if m["role"] != "assistant" else self.tokenizer.eos_token or "")
            for m in messages
        )

    def tokens(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def encode(self, example: Example) -> tuple[list[int], list[int]]:
        """Token ids, and labels that are ``IGNORE`` outside of the assistant's turns."""
        ids: list[int] = []
        labels: list[int] = []
        done = ""
        for i, message in enumerate(example.messages):
            if message["role"] != "assistant":
                continue
            asked = self.render(example.messages[:i], answer_next=True)
            said = self.render(example.messages[: i + 1], answer_next=False)
            if not (asked.startswith(done) and said.startswith(asked)):
                raise DataError(
                    "the chat template rewrites earlier turns, so the loss cannot be limited to answers; "
                    "accepted: templates that only append"
                )
            for text, learn in ((asked[len(done) :], False), (said[len(asked) :], True)):
                new = self.tokens(text)
                ids += new
                labels += new if learn else [IGNORE] * len(new)
            done = said
        return ids[: self.max_length], labels[: self.max_length]

    def batch(self, examples: list[Example]) -> dict[str, torch.Tensor]:
        """``input_ids``, ``attention_mask``, ``labels``, int64 ``[batch, longest]``, padded on the right."""
        rows = [self.encode(e) for e in examples]
        longest = max(len(ids) for ids, _ in rows)
        full = torch.full((len(rows), longest), self.pad, dtype=torch.int64)
        batch = {
            "input_ids": full,
            "attention_mask": torch.zeros_like(full),
            "labels": torch.full_like(full, IGNORE),
        }
        for i, (ids, labels) in enumerate(rows):
            batch["input_ids"][i, : len(ids)] = torch.tensor(ids)
            batch["attention_mask"][i, : len(ids)] = 1
            batch["labels"][i, : len(ids)] = torch.tensor(labels)
        return batch

    def prompts(self, examples: list[Example]) -> dict[str, torch.Tensor]:
        """``input_ids`` and ``attention_mask`` of the questions, padded on the left for generation."""
        rows = [self.tokens(self.render(e.messages[:-1], answer_next=True)) for e in examples]
        longest = max(map(len, rows))
        ids = torch.full((len(rows), longest), self.pad, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, longest - len(row) :] = torch.tensor(row)
            mask[i, longest - len(row) :] = 1
        return {"input_ids": ids, "attention_mask": mask}


def batches(count: int, batch_size: int, seed: int) -> Iterator[list[int]]:
    """Endless batches of example indices, each epoch in its own order; the same for the same seed."""
    order: list[int] = []
    epoch = 0
    while True:
        while len(order) < batch_size:
            more = list(range(count))
            random.Random(f"{seed}-{epoch}").shuffle(more)
            order += more
            epoch += 1
        yield order[:batch_size]
        order = order[batch_size:]
