"""Flags and YAML files from dataclasses: transformers' parser, with errors of one line that name the nearest flag."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from transformers import HfArgumentParser

from .main import UsageError


class Parser(HfArgumentParser):
    """Flags of several dataclasses; ``--config file.yaml`` gives other defaults.

    Args:
        command: its name.
        kinds: the dataclasses. Flags of the first ones are in ``--help``, those of the last, where ``shown`` is
            given, only if they are named there; ``--help_all`` has all.
        positional: the flag that a first word without dashes stands for, by the word's ending; "" is any other.
        shown: flags of the last dataclass that most users need.
        text: what the command does.
        changed: other defaults of flags, and other words for them, where these are not empty.
    """

    def __init__(
        self,
        command: str,
        kinds: Iterable[type],
        *,
        positional: dict[str, str],
        text: str,
        shown: Iterable[str] | None = None,
        changed: Mapping[str, tuple[Any, str]] | None = None,
    ) -> None:
        self.positional = positional
        word = " | ".join(dict.fromkeys(_word(flag) for flag in positional.values()))
        kinds = list(kinds)
        super().__init__(
            kinds,
            prog=f"qlora-fx {command}",
            description=text,
            usage=f"qlora-fx {command} [{word}] [--flag value ...]",
            allow_abbrev=False,
            add_help=False,
            formatter_class=Formatter,
        )
        self.add_argument(
            "--config", metavar="FILE", help="YAML file of flags; flags given here win"
        )
        self.add_argument("-h", "--help", action="store_true", help="this text")
        self.hidden: set[str] = set()
        if shown is not None:
            self.hidden = set(kinds[-1].__dataclass_fields__) - set(shown)  # type: ignore[attr-defined]
            self.add_argument(
                "--help_all", action="store_true", help="with every flag of the trainer"
            )

        for action in self._actions:
            if action.dest in (changed or {}) and not action.dest.startswith("no_"):
                default, words = (changed or {})[action.dest]
                action.default, action.help = default, words or action.help

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} ({self.prog} --help has the flags)")

    def parse(self, args: list[str]) -> tuple[Any, ...]:
        """The dataclasses, filled.

        Raises:
            UsageError: an unknown flag or key, or a value that is none.
        """
        args = self.with_flag(args)
        if {"-h", "--help", "--help_all", "--help-all"} & set(args):
            self.show({"--help_all", "--help-all"}.isdisjoint(args))
            raise SystemExit(0)
        if "--config" in args:
            place = args.index("--config")
            if place + 1 == len(args):
                self.error("--config: accepted: a YAML file")
            self.read(Path(args[place + 1]))
            del args[place : place + 2]
        *made, rest = self.parse_args_into_dataclasses(
            args, return_remaining_strings=True, look_for_args_file=False
        )
        if rest:
            self.error(self.unknown(rest[0], "flag"))
        return tuple(m for m in made if not isinstance(m, argparse.Namespace))

    def with_flag(self, args: list[str]) -> list[str]:
        """The first word as the flag that it stands for."""
        if not args or args[0].startswith("-"):
            return list(args)
        ending = Path(args[0]).suffix.lower()
        flag = self.positional.get(ending, self.positional.get("", ""))
        if not flag:
            self.error(f"{args[0]!r}; accepted: a file that ends in {', '.join(self.positional)}")
        return [flag, *args]

    def read(self, path: Path) -> None:
        """Take the keys of a YAML file for defaults."""
        import yaml

        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            self.error(f"{path}: {error.strerror or error}")
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            self.error(f"{path}: not YAML: {' '.join(str(error).split())}")
        if not isinstance(values, dict):
            self.error(f"{path}: accepted: one flag per line, as 'learning_rate: 2e-4'")
        actions = {action.dest: action for action in self._actions}
        for key, value in values.items():
            action = actions.get(str(key))
            if action is None:
                self.error(f"{path}: {self.unknown(str(key), 'key')}")
            plain = isinstance(value, (int, float, str)) and not isinstance(value, bool)
            # argparse checks defaults that are text as it checks flags.
            action.default = str(value) if plain and action.nargs is None else value
            action.required = False

    def unknown(self, name: str, what: str) -> str:
        flags = [action.dest for action in self._actions]
        near = get_close_matches(name.lstrip("-").replace("-", "_"), flags, 1)
        meant = f"; did you mean {near[0] if what == 'key' else '--' + near[0]}?" if near else ""
        return f"no {what} {name}{meant}"

    def show(self, short: bool) -> None:
        if short:
            for action in self._actions:
                if action.dest in self.hidden:
                    action.help = argparse.SUPPRESS
        self.print_help()


class Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """One spelling of each flag; the default where there is one."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        names = [n for n in action.option_strings if "-" not in n.lstrip("-")]
        value = "" if action.nargs == 0 else f" {self._format_args(action, _kind(action))}"
        return ", ".join(names) + value

    def _get_help_string(self, action: argparse.Action) -> str:
        text = " ".join((action.help or "").split()).replace("%(default)s", "").replace("%", "%%")
        given = action.default not in (None, argparse.SUPPRESS, False, "")
        return f"{text} (default: {action.default})" if given else text


def _word(flag: str) -> str:
    return {"--config": "config.yaml", "--dataset_name": "data.jsonl"}.get(flag, flag.lstrip("-"))


def _kind(action: argparse.Action) -> str:
    if action.choices:
        return "{" + ",".join(str(c) for c in action.choices) + "}"
    return getattr(action.type, "__name__", "text").removeprefix("string_to_").removeprefix("_")
