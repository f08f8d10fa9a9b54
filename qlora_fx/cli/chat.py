"""``qlora-fx chat``: a conversation in the terminal, whose answers appear as they are made."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from transformers import TextStreamer

from ..errors import ConfigError
from .settings import ChatSettings

PROMPT, NEW = "> ", "/new"


def typed() -> Iterator[str]:
    """Lines from the terminal, or from a pipe, until they end."""
    while True:
        try:
            yield input(PROMPT)
        except EOFError:
            return


class Conversation:
    """What was said, and the keys and values of it, so that a turn computes only what is new.

    Args:
        model: a ``QLoRAModel``.
        tokenizer: its tokenizer, with a chat template.
        settings: how answers are made.

    Raises:
        ConfigError: the tokenizer has no chat template.
    """

    def __init__(self, model: Any, tokenizer: Any, settings: ChatSettings) -> None:
        if not tokenizer.chat_template:
            raise ConfigError(
                f"chat: the tokenizer of {tokenizer.name_or_path} has no chat template; accepted: a model that was made "
                "for conversations, or qlora-fx generate --prompt"
            )
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.begin()

    def begin(self) -> None:
        """Forget what was said, but for the system's message."""
        system = self.settings.system
        self.messages = [{"role": "system", "content": system}] if system else []
        self.ids: torch.Tensor | None = None
        self.cache: Any = None

    def answer(self, text: str, streamer: Any = None) -> str:
        """What the model says to ``text``; the turn is forgotten if it is interrupted."""
        before = len(self.messages)
        self.messages.append({"role": "user", "content": text})
        try:
            said = self.generate(streamer)
        except BaseException:
            del self.messages[before:]
            self.cache = None  # holds a part of the turn
            raise
        self.messages.append({"role": "assistant", "content": said})
        return said

    def generate(self, streamer: Any) -> str:
        rendered = self.tokenizer.apply_chat_template(
            self.messages, tokenize=False, add_generation_prompt=True
        )
        encoded = self.tokenizer(rendered, return_tensors="pt", add_special_tokens=False)
        ids = encoded["input_ids"].to(self.model.device)
        out = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=self.cache if self.goes_on(ids) else None,
            streamer=streamer,
            max_new_tokens=self.settings.max_new_tokens,
            return_dict_in_generate=True,
            **choice(self.tokenizer, self.settings.temperature),
        )
        self.ids, self.cache = out.sequences, out.get("past_key_values")
        new = out.sequences[0, ids.shape[1] :]
        return str(self.tokenizer.decode(new, skip_special_tokens=True)).strip()

    def goes_on(self, ids: torch.Tensor) -> bool:
        """Whether the cache is of a beginning of these ids; a template may write an earlier turn in another way."""
        if self.cache is None or self.ids is None:
            return False
        known = self.cache.get_seq_length()
        return known < ids.shape[1] and torch.equal(ids[:, :known], self.ids[:, :known])


def choice(tokenizer: Any, temperature: float) -> dict[str, Any]:
    """How ``generate`` chooses tokens, and what it pads with."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {}
    return {"pad_token_id": pad, "do_sample": False} | sampling


def talk(conversation: Conversation, lines: Iterable[str]) -> None:
    """Answer each line; ``/new`` begins anew, an empty line is passed over, Ctrl-C stops an answer."""
    streamer = TextStreamer(conversation.tokenizer, skip_prompt=True, skip_special_tokens=True)
    for line in lines:
        text = line.strip()
        if text == NEW:
            conversation.begin()
        elif text:
            try:
                conversation.answer(text, streamer)
            except KeyboardInterrupt:
                print("\n(stopped; this turn is forgotten)")
