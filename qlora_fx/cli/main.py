"""``qlora-fx``: finds the command, and says errors in one line."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Any

COMMANDS = {
    "sft": (
        "train",
        "fine-tune on text, prompts with completions, or conversations (TRL's SFTTrainer)",
    ),
    "dpo": ("train", "train on preferences (TRL's DPOTrainer)"),
    "plan": ("inspect", "memory of one training step, from the config alone"),
    "explain": ("inspect", "which linears are quantized and adapted, which are not, and why"),
    "check": ("inspect", "a compiled training step beside float64"),
    "merge": ("inspect", "an ordinary checkpoint with the adapter in its weights"),
    "generate": ("inspect", "text from a model, with or without an adapter"),
    "chat": ("inspect", "a conversation in the terminal, with or without an adapter"),
    "doctor": ("doctor", "what is installed, what answers, and whether a step is right here"),
}
"""By name: the module, and what it does."""


class UsageError(Exception):
    """A command line that says what is not accepted."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; exits with 2 for a command line that is wrong, 1 for what fails later."""
    args = list(sys.argv[1:] if arguments is None else arguments)
    traceback = "--traceback" in args
    args = [arg for arg in args if arg != "--traceback"]
    try:
        command = find(args[:1])
        if command is None:
            print(overview())
            return
        run(command, args[0], args[1:])
    except UsageError as error:
        fail(f"{error}", 2)
    except Exception as error:
        if traceback or not expected(error):
            raise
        fail(one_line(error), 1)


def find(name: Sequence[str]) -> Callable[[str, list[str]], None] | None:
    """The function that runs a command; None for a wish for help."""
    if not name or name[0] in ("-h", "--help", "help"):
        return None
    if name[0] not in COMMANDS:
        near = get_close_matches(name[0], COMMANDS, 1)
        meant = f"; did you mean {near[0]!r}?" if near else ""
        raise UsageError(f"no command {name[0]!r}{meant} accepted: {', '.join(COMMANDS)}")
    module: Any = importlib.import_module(f"qlora_fx.cli.{COMMANDS[name[0]][0]}")
    return module.run  # type: ignore[no-any-return]


def run(command: Callable[[str, list[str]], None], name: str, args: list[str]) -> None:
    # A warning is a line for the reader here, not a place in the source.
    warnings.formatwarning = lambda message, *_, **__: f"note: {message}\n"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    command(name, args)


def expected(error: Exception) -> bool:
    """What a user can do something about, here or in a library: no traceback."""
    from qlora_fx import QLoRAError

    return isinstance(error, (QLoRAError, ValueError, OSError, ImportError))


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def fail(text: str, status: int) -> None:
    print(f"qlora-fx: error: {text}", file=sys.stderr)
    raise SystemExit(status)


def overview() -> str:
    rows = "\n".join(f"  {name:9} {what}" for name, (_, what) in COMMANDS.items())
    return (
        f"usage: qlora-fx COMMAND ...\n\n{rows}\n\n"
        "qlora-fx COMMAND --help has its flags. --traceback with any command shows where an error came from."
    )
