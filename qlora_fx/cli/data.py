"""Datasets for TRL's trainers: a JSONL file, checked line by line, or a hub dataset."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import DataError

FORMS = {
    "sft": (("messages",), ("prompt", "completion"), ("text",)),
    "dpo": (("prompt", "chosen", "rejected"), ("chosen", "rejected")),
}
"""The columns that a command takes, the first that a line has."""


def dataset(command: str, name: str | None, config: str | None, split: str) -> Any:
    """The examples of a file or a hub id, as a ``datasets.Dataset``.

    Raises:
        DataError: there are none, or not of a form that the command takes; names the file and the line.
    """
    import datasets

    if name is None:
        raise DataError(f"no dataset; accepted: qlora-fx {command} data.jsonl, or --dataset_name")
    path = Path(name)
    if path.suffix.lower() in (".jsonl", ".json") or path.exists():
        columns = check_lines(path, FORMS[command])
        datasets.disable_progress_bars()
        found = datasets.Dataset.from_json(str(path)).select_columns(list(columns))
        datasets.enable_progress_bars()
        return found
    found = datasets.load_dataset(name, config, split=split)
    check_columns(found.column_names, FORMS[command], name)
    return found


def check_lines(path: Path, forms: tuple[tuple[str, ...], ...]) -> tuple[str, ...]:
    """The columns of the file; each line is read once."""
    if not path.is_file():
        raise DataError(f"{path} is not a file; accepted: a JSONL file")
    form: tuple[str, ...] = ()
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                record = json.loads(line)
            except ValueError as error:
                raise DataError(f"{where}: not JSON ({error}): {line.strip()[:80]!r}") from None
            if not isinstance(record, dict):
                raise DataError(f"{where}: accepted: an object per line: {line.strip()[:80]!r}")
            form = form or check_columns(record, forms, where)
            missing = [column for column in form if record.get(column) in (None, "", [])]
            if missing:
                raise DataError(
                    f"{where}: {missing[0]!r} is missing or empty: {line.strip()[:80]!r}"
                )
            for column in form:
                check_value(record[column], column, where)
    if not form:
        raise DataError(f"{path} is empty; accepted: one example per line")
    return form


def check_columns(columns: Any, forms: tuple[tuple[str, ...], ...], where: str) -> tuple[str, ...]:
    for form in forms:
        if set(form) <= set(columns):
            return form
    accepted = ", or ".join(" and ".join(map(repr, form)) for form in forms)
    raise DataError(f"{where}: columns {', '.join(columns)}; accepted: {accepted}")


def check_value(value: Any, column: str, where: str) -> None:
    """Text, or a conversation."""
    if isinstance(value, str) and column != "messages":
        return
    good = isinstance(value, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and "content" in m for m in value
    )
    if not good:
        text = "a list of {'role', 'content'}"
        accepted = text if column == "messages" else f"text, or {text}"
        raise DataError(f"{where}: {column!r} is {str(value)[:60]!r}; accepted: {accepted}")
