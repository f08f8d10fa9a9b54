"""What a user does with a model, through the defaults: each model type of the table walks this path.

``transform`` with its defaults (Inductor, all linears, NF4 with double quantization), a training step beside float64
with the memory budget at both ends, another shape, eval, tokens generated with a cache (where there is one),
train again, the adapter saved and loaded by PEFT, the checkpoint loaded by ``from_pretrained``. Only the compute dtype
is fixed, to float32: what is fastest here must not decide what a test tolerates.
"""

from __future__ import annotations

import copy
import json
import os
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import qlora_fx
import torch
from families import Family, build
from families.exceptions import ROUNDING
from oracle import with_stored_values
from peft import PeftModel
from qlora_fx.capture.arguments import is_encoder_decoder
from qlora_fx.capture.cache import caches
from qlora_fx.testing import compare, randomize_adapter, relative_error
from qlora_fx.testing.step import leaves

STEPS = (
    *("transform", "train", "budget", "shape", "eval", "generate", "train again", "peft"),
    "checkpoint",
)


@dataclass
class Walk:
    """What happened on the way.

    Attributes:
        seconds: by step, of those that were finished.
        said: warnings of qlora_fx, by step.
        error: the step that failed, and how; empty if none did.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    said: dict[str, list[str]] = field(default_factory=dict)
    error: str = ""


class Wrong(AssertionError):
    """A number that is not what it should be."""


def walk(
    family: Family,
    *,
    steps: tuple[str, ...] = STEPS,
    backend: str = "inductor",
    device: str = "cpu",
) -> Walk:
    """Take a family along the path; errors are reported, not raised."""
    result = Walk()
    step = ""

    @contextmanager
    def taking(name: str) -> Iterator[None]:
        nonlocal step
        step, start = name, time.perf_counter()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            warnings.simplefilter("always", FutureWarning)  # of transformers' own
            yield
        result.seconds[name] = round(time.perf_counter() - start, 1)
        log(family.model_type, step, result.seconds[name])
        said = [str(w.message) for w in caught if "qlora_fx" in str(w.filename) or ours(w)]
        if said:
            result.said[name] = said

    try:
        follow(family, steps, backend, torch.device(device), taking)
    except Exception as error:
        text = str(error).strip() or "-"
        result.error = f"{step}: {type(error).__name__}: {text[:600]}"
    return result


def log(model_type: str, step: str, seconds: float) -> None:
    """To ``QLORA_FX_GPU_LOG``: of a walk that a lent machine's time ends, what was seen."""
    place = os.environ.get("QLORA_FX_GPU_LOG")
    if place:
        with open(place, "a") as file:
            file.write(json.dumps({"walk": model_type, "step": step, "seconds": seconds}) + "\n")


DECODERS = ("causal", "mixture-of-experts", "state-space")
SPECIAL = list(range(8))
"""Tokens that stand for pictures, and the like."""
CHOSEN_FOR = (
    *("forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens"),
)
"""Settings by which ``generate`` takes another token than the likeliest."""
OURS = (
    "capturing ",
    "Inductor cannot compile",
    "memory_budget",
    "stays dense",
    "PEFT has no adapter",
    "have no effect",
    "is left out",
)


def ours(warning: warnings.WarningMessage) -> bool:
    return any(words in str(warning.message) for words in OURS)


def follow(
    family: Family, steps: tuple[str, ...], backend: str, device: torch.device, taking: Any
) -> None:
    model: Any = build(family).train().to(device)
    limit = ROUNDING.get(family.model_type)
    first, second = (
        {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        for batch in (family.batch(3, 21), family.batch(2, 17))
    )
    with taking("transform"):
        qmodel = qlora_fx.transform(
            copy.deepcopy(model),
            compute_dtype=torch.float32,
            example_inputs=first,
            backend=backend,
        )
    whole(qmodel, model)
    randomize_adapter(qmodel)
    with taking("train"):
        right(model, qmodel, first, limit)
    if "budget" in steps:
        with taking("budget"):
            qmodel.memory_budget = 0.0
            right(model, qmodel, first, limit)
            qmodel.memory_budget = 1.0
    if "shape" in steps:
        with taking("shape"):
            right(model, qmodel, second, limit)
    if "eval" in steps:
        with taking("eval"), torch.no_grad():
            outputs = leaves(qmodel.eval()(**first))
            if not outputs or not all(bool(t.isfinite().all()) for t in outputs.values()):
                raise Wrong("outputs in eval mode are not finite")
    if "generate" in steps and caches(model) and model.can_generate():
        with taking("generate"):
            generated(qmodel.eval(), first, family.kind in DECODERS)
    if "train again" in steps:
        with taking("train again"):
            right(model, qmodel.train(), first, limit)
    with tempfile.TemporaryDirectory() as folder:
        if "peft" in steps:
            with taking("peft"):
                qmodel.save_pretrained(f"{folder}/adapter")
                in_peft(model, qmodel, first, Path(folder) / "adapter")
        if "checkpoint" in steps:
            with taking("checkpoint"):
                loaded(model, qmodel, first, Path(folder), backend)


def whole(qmodel: Any, model: Any) -> None:
    """A PeftModel around an object of the user's class; every tensor of it is there, and just the adapters train."""
    twin = qmodel.get_base_model()
    if not isinstance(qmodel, PeftModel) or not isinstance(twin, type(model)):
        raise Wrong(f"{type(twin)} is no {type(model)} in a PeftModel")
    for name, tensor in (*twin.named_parameters(), *twin.named_buffers()):
        if tensor.device.type == "meta":
            raise Wrong(f"{name} has no values")
    trained = {id(p) for _, p in qmodel.adapter_parameters()}
    if trained != {id(p) for p in qmodel.parameters() if p.requires_grad}:
        raise Wrong("other parameters train than the adapters")


def right(model: Any, qmodel: Any, batch: Any, limit: float | None) -> None:
    """Outputs and the gradients of all adapters beside float64; half of them at least are not zero."""
    report = compare(model, qmodel, batch, limit, all_outputs=False)
    if not report.passed:
        raise Wrong(str(report))
    if sum(line.norm > 0 for line in report.sites) < len(report.sites) / 2:
        raise Wrong("most adapters have a gradient of zero")


def generated(qmodel: Any, batch: Any, alone: bool) -> None:
    """Four tokens with a cache, compiled, and their logits, are those without one, uncompiled.

    Args:
        alone: of a few tokens without all that a batch has besides.
    """
    given = {k: v for k, v in batch.items() if k != "labels"}
    decoder = "decoder_input_ids" if is_encoder_decoder(qmodel) else "input_ids"
    if alone:
        given = {decoder: given[decoder][:2, :7]}
    elif decoder == "input_ids" and "attention_mask" in given:
        # Padding behind a prompt moves the positions of what is generated, of a plain call's not.
        given["attention_mask"] = torch.ones_like(given["attention_mask"])
    for name in CHOSEN_FOR:
        setattr(qmodel.generation_config, name, None)
    told = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "output_logits": True}
    told |= {"max_new_tokens": 4, "suppress_tokens": SPECIAL, "return_dict_in_generate": True}
    out = qmodel.generate(**given, use_cache=True, **told)
    found = out.sequences
    expected = found[:, :-4]
    with torch.no_grad():
        for mine in out.logits:
            logits = qmodel.run_uncompiled(**grown(given, decoder, expected)).logits[:, -1].float()
            off = float((mine - logits).abs().max() / logits.abs().max())
            if not off < 1e-3:
                raise Wrong(f"logits with a cache are {off:.1e} of the largest off")
            logits[:, SPECIAL] = -torch.inf
            expected = torch.cat([expected, logits.argmax(-1, keepdim=True)], 1)
    if not torch.equal(found, expected):
        raise Wrong(
            f"generated {found[:, -4:].tolist()} with a cache, {expected[:, -4:].tolist()} without"
        )


def grown(given: dict[str, Any], decoder: str, ids: torch.Tensor) -> dict[str, Any]:
    """A call with these ids: what has a prompt's length is filled up to theirs."""
    prompt = given.get(decoder)
    if prompt is None:
        return given | {decoder: ids}
    more = (0, ids.shape[1] - prompt.shape[1])
    pad = torch.nn.functional.pad
    return {
        k: pad(v, more, value=int("mask" in k)) if v.shape == prompt.shape else v
        for k, v in given.items()
    } | {decoder: ids}


def in_peft(model: Any, qmodel: Any, batch: Any, folder: Path) -> None:
    """PEFT's own model over the same weights, with the folder we saved, gives the same outputs."""
    base = with_stored_values(model, qmodel)
    with torch.no_grad():
        # A batch norm's running statistics moved in training, as they do in PEFT, whose folder has them neither.
        moved = dict(qmodel.get_base_model().named_buffers())
        for name, buffer in base.named_buffers():
            if name in moved and "running" in name:
                buffer.copy_(moved[name])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected) .*key.*")
        warnings.filterwarnings("error", message=".*no effect.*")
        theirs = PeftModel.from_pretrained(base, folder).eval()
        with torch.no_grad():
            mine, other = leaves(qmodel.eval()(**batch)), leaves(theirs(**batch))
    for name, value in mine.items():
        error = relative_error(value, other[name])
        if error > 1e-4:
            raise Wrong(f"{name} differs by {error:.1e} from PEFT's with the saved adapter")


def loaded(model: Any, qmodel: Any, batch: Any, folder: Path, backend: str) -> None:
    """The dense checkpoint streamed to 4 bits, with the saved adapter: the same step."""
    model.save_pretrained(folder / "model")
    again = qlora_fx.from_pretrained(
        folder / "model",
        compute_dtype=torch.float32,
        example_inputs=batch,
        backend=backend,
        model_class=type(model),
        device=next(model.parameters()).device,
        progress=False,
    )
    again.load_adapter_state_dict(qmodel.train().adapter_state_dict())
    one, other = leaves(qmodel(**batch)), leaves(again(**batch))
    for name, value in one.items():
        error = relative_error(other[name], value)
        if error > 1e-5:
            raise Wrong(f"{name} of the loaded checkpoint differs by {error:.1e}")
