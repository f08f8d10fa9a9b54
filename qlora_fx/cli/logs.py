"""What a run leaves to look at: ``log.jsonl``, one object per logged step, and ``loss.png``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

LOG = "log.jsonl"


class JsonLines(TrainerCallback):
    """Writes ``log.jsonl``; a resumed run goes on with the lines up to where it begins."""

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / LOG

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = [row for row in rows(self.path) if row["step"] <= state.global_step]
        self.path.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        with open(self.path, "a", encoding="utf-8") as f:
            f.write(json.dumps({"step": state.global_step, **(logs or {})}) + "\n")


def rows(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; a last one that was cut off by a kill is left out."""
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def plot(folder: str | Path) -> Path | None:
    """``loss.png`` of the losses in ``log.jsonl``; None where there are none, or no matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    log = rows(Path(folder) / LOG)
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    for name, label in (("loss", "training"), ("eval_loss", "held out")):
        points = [(row["step"], float(row[name])) for row in log if name in row]
        if points:
            axes.plot(
                *zip(*points, strict=True), label=label, marker="o" if len(points) < 20 else ""
            )
    if not axes.lines:
        plt.close(figure)
        return None
    axes.set(xlabel="step", ylabel="loss")
    axes.legend()
    axes.grid(alpha=0.3)
    path = Path(folder) / "loss.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
