"""Tokens per second of packed rows beside padded ones, over the lengths of a real text's paragraphs.

    python benchmarks/packing.py --rounds 3

Both train the same adapter in one process, in turns, on the same documents: packed into rows of ``--tokens`` tokens with
``position_ids`` that begin anew, and padded to the longest of each batch of ``--batch``. Tokens are those of documents, without
padding. The third line is the same rows with plain causal attention, which attends across documents and trains something else:
what packing would give without a mask. Nothing else may run meanwhile.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path = [str(ROOT / "examples"), *sys.path[1:], str(ROOT / "benchmarks")]


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--tokens", type=int, default=1024, help="of a packed row (default: %(default)s)"
    )
    p.add_argument("--batch", type=int, default=8, help="padded documents (default: %(default)s)")
    p.add_argument(
        "--text",
        nargs="+",
        default=[str(ROOT / "tests" / "data" / "alice.txt")],
        help="files; a document is what stands between two blank lines (default: the tests' text)",
    )
    p.add_argument("--documents", type=int, help="only the first so many (default: all)")
    p.add_argument("--rank", type=int, default=16, help="LoRA rank (default: %(default)s)")
    p.add_argument("--rounds", type=int, default=3, help="turns (default: %(default)s)")
    args = p.parse_args()

    import qlora_fx  # noqa: F401 (its filter of bitsandbytes' advice comes first)
    import step
    import torch
    from obtain import model_folder
    from transformers import AutoTokenizer

    args.model = str(model_folder())
    args.worker = str(step.fastest_dtype()).replace("bfloat16", "bf16")
    qmodel, _ = step.ours(args)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    text = "\n\n".join(Path(file).read_text() for file in args.text)
    documents = [tokenizer(part)["input_ids"] for part in text.split("\n\n") if part.strip()]
    documents = [ids[: args.tokens] for ids in documents if len(ids) > 1][: args.documents]
    rows = packed(documents, args.tokens)
    groups = [documents[i : i + args.batch] for i in range(0, len(documents), args.batch)]
    kinds: dict[str, list[dict[str, torch.Tensor]]] = {
        "padded to the longest of a batch": [padded(group) for group in groups],
        "packed, documents apart": [row_of(row, apart=True) for row in rows],
        "packed, one causal row": [row_of(row, apart=False) for row in rows],
    }
    lengths = sorted(len(ids) for ids in documents)
    print(
        f"{len(lengths)} documents of {lengths[0]} to {lengths[-1]} tokens, median {lengths[len(lengths) // 2]}"
    )
    optimizer = qmodel.paged_optimizer(lr=1e-4)
    times: dict[str, list[float]] = {name: [] for name in kinds}
    norms: dict[str, float] = {}
    for _ in range(args.rounds + 1):  # the first turn compiles
        for name, batches in kinds.items():
            start = time.perf_counter()
            for batch in batches:
                qmodel(**batch).loss.backward()
                grads = [
                    p.grad.norm() for _, p in qmodel.adapter_parameters() if p.grad is not None
                ]
                norms[name] = float(torch.stack(grads).norm())
                optimizer.step()
                optimizer.zero_grad()
            times[name].append(time.perf_counter() - start)
    total = sum(lengths)
    print("\n| rows | steps | tokens/s (min-max) | x padded | padding | gradient norm |")
    print("|---|---|---|---|---|---|")
    base = statistics.median(times["padded to the longest of a batch"][1:])
    for name, batches in kinds.items():
        seconds = times[name][1:]
        median = statistics.median(seconds)
        places = sum(batch["input_ids"].numel() for batch in batches)
        print(
            f"| {name} | {len(batches)} | {total / median:.0f} ({total / max(seconds):.0f}-{total / min(seconds):.0f}) "
            f"| {base / median:.2f} | {1 - total / places:.0%} | {norms[name]:.3f} |"
        )


def packed(documents: list[list[int]], tokens: int) -> list[list[list[int]]]:
    """Documents in rows of at most ``tokens``: each in the fullest row that takes it, the longest first."""
    rows: list[list[list[int]]] = []
    for ids in sorted(documents, key=len, reverse=True):
        fitting = [row for row in rows if sum(map(len, row)) + len(ids) <= tokens]
        if fitting:
            max(fitting, key=lambda row: sum(map(len, row))).append(ids)
        else:
            rows.append([ids])
    return rows


def row_of(documents: list[list[int]], *, apart: bool) -> dict[str, Any]:
    import torch

    ids = torch.tensor([[token for document in documents for token in document]])
    starts = [torch.arange(len(document)) for document in documents]
    positions = torch.cat(starts)[None] if apart else torch.arange(ids.shape[1])[None]
    labels = torch.where(torch.cat(starts)[None] == 0, -100, ids)
    return {"input_ids": ids, "position_ids": positions, "labels": labels}


def padded(documents: list[list[int]]) -> dict[str, Any]:
    import torch

    longest = max(map(len, documents))
    ids = torch.zeros(len(documents), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, document in enumerate(documents):
        ids[i, : len(document)] = torch.tensor(document)
        mask[i, : len(document)] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.where(mask == 1, ids, -100)}


if __name__ == "__main__":
    main()
