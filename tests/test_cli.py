"""The command line: each command on a small model in a folder, and what it says to wrong input, in one line."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import qlora_fx
import pytest
import torch
from qlora_fx.cli import main as entry
from qlora_fx.cli.chat import Conversation, talk
from qlora_fx.cli.main import COMMANDS, main
from qlora_fx.cli.settings import ChatSettings
from safetensors.torch import load_file
from small_models import tiny_llama
from trainers import rows, tokenizer
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with its tokenizer, and data."""
    path = tmp_path_factory.mktemp("cli")
    tiny_llama(1).save_pretrained(path / "model")
    tokenizer().save_pretrained(path / "model")
    for name, kind in (("sft", "completion"), ("chat", "chat"), ("dpo", "preference")):
        lines = [json.dumps(row) + "\n" for row in rows(kind, 24)]
        (path / f"{name}.jsonl").write_text("".join(lines))
    return path


def words(folder: Path, out: Path, **options: Any) -> list[str]:
    flags = {
        "model_name_or_path": folder / "model",
        "output_dir": out,
        "backend": "eager",
        "compute_dtype": "float32",
        "lora_r": 4,
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "use_cpu": True,
        "disable_tqdm": True,
    } | options
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def said(capsys: pytest.CaptureFixture[str], *args: Any, status: int = 0) -> str:
    """What a command prints; errors too."""
    capsys.readouterr()
    if status:
        with pytest.raises(SystemExit) as caught:
            main([str(arg) for arg in args])
        assert caught.value.code == status
        text = capsys.readouterr().err
        assert text.startswith("qlora-fx: error: ")
        assert text.count("\n") == 1, text
        return text
    main([str(arg) for arg in args])
    return capsys.readouterr().out


# -- training ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(folder: Path) -> Path:
    """What ``qlora-fx sft`` leaves."""
    out = folder / "adapter"
    main(["sft", str(folder / "sft.jsonl"), *words(folder, out, held_out=4, save_steps=2)])
    return out


def test_sft_leaves_pefts_files_checkpoints_a_log_and_a_picture(adapter: Path) -> None:
    names = {p.name for p in adapter.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "loss.png", "log.jsonl"} <= names
    assert {"checkpoint-2", "checkpoint-4", "tokenizer.json"} <= names
    log = [json.loads(line) for line in (adapter / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log if "loss" in row] == [1, 2, 3, 4]
    assert sum("eval_loss" in row for row in log) >= 1
    norms = [
        t.norm()
        for k, t in load_file(adapter / "adapter_model.safetensors").items()
        if "lora_B" in k
    ]
    assert all(norm > 0 for norm in norms)


@pytest.mark.slow
def test_sft_with_nothing_but_a_file_and_a_model(
    folder: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    """Compiled, three epochs, into out/sft."""
    monkeypatch.chdir(tmp_path)
    text = said(capsys, "sft", folder / "sft.jsonl", "--model_name_or_path", folder / "model")
    assert "7 of 8 linears in 4 bits, 7 adapted" in text
    log = [json.loads(line) for line in Path("out/sft/log.jsonl").read_text().splitlines()]
    norms = [float(row["grad_norm"]) for row in log if "grad_norm" in row]
    assert len(norms) == 9
    assert all(norm > 0 for norm in norms)
    saved = load_file("out/sft/adapter_model.safetensors")
    assert all(bool(t.any()) for key, t in saved.items() if "lora_B" in key)


def test_dpo(folder: Path, tmp_path: Path, capsys: Any) -> None:
    text = said(capsys, "dpo", folder / "dpo.jsonl", *words(folder, tmp_path, max_steps=2))
    assert "16 of 24" not in text
    assert f"try it: qlora-fx generate --adapter {tmp_path}" in text
    assert (tmp_path / "adapter_model.safetensors").exists()


def test_flags_win_over_yaml_and_yaml_over_the_defaults(tmp_path: Path, monkeypatch: Any) -> None:
    from qlora_fx.cli import train

    seen: list[Any] = []
    monkeypatch.setattr(train, "train", lambda *arguments: seen.append(arguments))
    config = tmp_path / "run.yaml"
    config.write_text(
        "model_name_or_path: a\ndataset_name: b.jsonl\nmax_steps: 99\nlearning_rate: 3e-4\n"
    )
    main(["sft", str(config), "--max_steps", "4", "--output_dir", str(tmp_path / "out")])
    _, _, _, data, model, settings, resume = seen[0]
    assert (model.model_name_or_path, data.dataset_name) == ("a", "b.jsonl")
    assert (settings.max_steps, settings.learning_rate, resume) == (4, 3e-4, None)
    assert settings.save_steps == 100


@pytest.mark.slow
def test_flags_win_over_yaml_and_a_stopped_run_goes_on(
    folder: Path, tmp_path: Path, capsys: Any
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    main(["sft", str(folder / "chat.jsonl"), *words(folder, whole, save_steps=100)])
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model_name_or_path: {folder / 'model'}\ndataset_name: {folder / 'chat.jsonl'}\nmax_steps: 99\n"
        "learning_rate: 2e-4\nsave_steps: 2\n"
    )
    rest = words(folder, out)[4:]
    code = "import os, signal, sys\nfrom qlora_fx.cli.main import main\nfrom transformers import Trainer\n"
    code += "own = Trainer.training_step\ndef step(self, *a, **k):\n    if self.state.global_step == 2:\n"
    code += "        os.kill(os.getpid(), signal.SIGTERM)\n    return own(self, *a, **k)\n"
    code += "Trainer.training_step = step\nmain(sys.argv[1:])\n"
    command = [sys.executable, "-c", code, "sft", str(config), "--output_dir", str(out), *rest]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 128 + signal.SIGTERM, result.stderr[-2000:]
    assert "SIGTERM: stopping after this step" in result.stdout
    assert (out / "checkpoint-3").is_dir()
    again = ["sft", str(config), "--output_dir", str(out), *rest]
    assert "has checkpoint-3 of an earlier run; accepted: --resume" in said(
        capsys, *again, status=1
    )
    main([*again, "--resume_from_checkpoint", "auto"])
    name = "adapter_model.safetensors"
    first, second = load_file(whole / name), load_file(out / name)
    assert all(torch.equal(first[key], second[key]) for key in first)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log if "loss" in row] == [1, 2, 3, 4]


# -- the other commands -----------------------------------------------------------------------------


def test_generate_and_merge_take_the_model_that_the_adapter_names(
    adapter: Path, tmp_path: Path, capsys: Any
) -> None:
    text = said(capsys, "generate", adapter, "--prompt", "w1 w2", "--max_new_tokens", 4)
    assert text.strip()
    text = said(capsys, "merge", adapter, "--output_dir", tmp_path / "merged")
    assert f"written: {tmp_path / 'merged'}" in text
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")


TURNS = (
    "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def test_a_chat_goes_on_from_what_was_said(folder: Path, capsys: Any) -> None:
    """A turn computes what is new alone, and says what a whole conversation at once would; /new forgets it."""
    names = tokenizer()
    names.chat_template = TURNS
    qmodel = qlora_fx.from_pretrained(folder / "model", backend="eager", progress=False)
    settings = ChatSettings(max_new_tokens=4)
    going, whole = (Conversation(qmodel, names, settings) for _ in range(2))
    given: list[Any] = []
    own = qmodel.generate
    qmodel.generate = lambda **call: given.append(call["past_key_values"]) or own(**call)
    talk(going, ["w1 w2", "", "w3 w4"])
    assert [cache is None for cache in given] == [True, False]
    whole.messages = going.messages[:2]
    assert whole.answer("w3 w4") == going.messages[-1]["content"]
    shown = capsys.readouterr().out.split()
    assert shown == [
        w for m in going.messages if m["role"] == "assistant" for w in m["content"].split()
    ]
    said_before = list(going.messages)
    qmodel.generate = stopped
    talk(going, ["w5"])
    assert going.messages == said_before
    qmodel.generate = own
    talk(going, ["/new", "w1 w2"])
    assert going.messages == said_before[:2]


def stopped(**call: Any) -> Any:
    raise KeyboardInterrupt


def test_chat_reads_lines_until_they_end(
    adapter: Path, folder: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = iter(["w1 w2", "w3"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines, None) or end())
    text = said(capsys, "chat", adapter, "--max_new_tokens", 2)
    assert text.startswith(f"{folder / 'model'}: /new begins anew")
    assert len(text.strip().splitlines()) == 3
    names = tokenizer()
    names.chat_template = None
    with pytest.raises(qlora_fx.ConfigError, match="has no chat template; accepted"):
        Conversation(None, names, ChatSettings())


def end() -> str:
    raise EOFError


@pytest.mark.slow
def test_plan(folder: Path, tmp_path: Path, capsys: Any) -> None:
    picture = tmp_path / "plan.png"
    text = said(capsys, "plan", folder / "model", "--sequence_length", 16, "--plot", picture)
    assert "peak" in text
    assert picture.exists()


def test_explain_and_check(folder: Path, capsys: Any) -> None:
    text = said(capsys, "explain", folder / "model")
    assert "7 of 8 linears quantized, 7 adapted" in text
    assert "adapters 0 B" not in text
    text = said(capsys, "check", folder / "model", "--backend", "eager", "--text", "w1 w2 w3 w4")
    assert "passed" in text.lower()


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: qlora-fx {command} [config.yaml")
    assert COMMANDS[command][1].split(",")[0].split(" (")[0] in " ".join(text.split())
    assert "==SUPPRESS==" not in text


def test_without_a_command_it_names_them(capsys: Any) -> None:
    assert all(name in said(capsys) for name in COMMANDS)


# -- wrong input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        (["stf"], 2, "no command 'stf'; did you mean 'sft'?"),
        (
            ["sft", "--learning_rte", "1"],
            2,
            "no flag --learning_rte; did you mean --learning_rate?",
        ),
        (["sft", "--max_steps", "few"], 2, "invalid int value: 'few'"),
        (["sft", "data.txt"], 2, "'data.txt'; accepted: a file that ends in .yaml, .yml, .jsonl"),
        (["sft", "--config"], 2, "--config: accepted: a YAML file"),
        (["sft", "absent.yaml"], 2, "absent.yaml: No such file"),
        (["sft", "absent.jsonl"], 1, "absent.jsonl is not a file; accepted: a JSONL file"),
        (["sft"], 1, "no dataset; accepted: qlora-fx sft data.jsonl"),
        (
            ["sft", "--load_in_8bit", "True", "--load_in_4bit", "False"],
            1,
            "--load_in_8bit: accepted: False",
        ),
        (["sft", "--trust_remote_code", "True"], 1, "--trust_remote_code: accepted: False"),
        (["plan", "--optimizer", "SGD"], 1, "optimizer='SGD'; accepted: PagedAdamW32bit"),
        (["plan", "--backend", "x"], 2, "no flag --backend"),
        (["merge"], 2, "accepted: qlora-fx merge ADAPTER"),
        (["generate", "absent"], 2, "accepted: --prompt"),
        (["generate", "absent", "--prompt", "a"], 1, "adapter_config.json cannot be read"),
    ],
)
def test_wrong_input_is_said_in_one_line(
    args: list[str], status: int, message: str, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in said(capsys, *args, status=status)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rte: 1", "no key learning_rte; did you mean learning_rate?"),
        ("learning_rate: fast", "invalid float value: 'fast'"),
        ("- a", "accepted: one flag per line"),
        ("a: [", "not YAML"),
    ],
)
def test_wrong_yaml_names_the_file_or_the_flag(
    text: str, message: str, tmp_path: Path, capsys: Any
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(text)
    assert message in said(capsys, "sft", config, status=2)


@pytest.mark.parametrize(
    ("command", "lines", "message"),
    [
        (
            "sft",
            ['{"question": "a"}'],
            ":1: columns question; accepted: 'messages', or 'prompt' and",
        ),
        ("sft", ['{"text": "a"}', '{"txt": "b"}'], ":2: 'text' is missing or empty"),
        ("sft", ['{"text": "a"}', "{"], ":2: not JSON"),
        ("sft", ["[1]"], ":1: accepted: an object per line"),
        ("sft", ['{"messages": "hello"}'], ":1: 'messages' is 'hello'; accepted: a list of"),
        ("sft", [""], "is empty; accepted: one example per line"),
        (
            "dpo",
            ['{"prompt": "a", "completion": "b"}'],
            ":1: columns prompt, completion; accepted: 'prompt' and",
        ),
        ("sft", ['{"text": "a"}'], "--held_out 5; accepted: below the number of examples, 1"),
    ],
)
def test_wrong_data_names_the_line(
    command: str, lines: list[str], message: str, tmp_path: Path, capsys: Any
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(lines) + "\n")
    args = [command, data, "--output_dir", tmp_path / "out", "--held_out", 5]
    assert message in said(capsys, *args, status=1)
    assert not (tmp_path / "out").exists()


def test_what_is_not_expected_keeps_its_traceback(monkeypatch: Any) -> None:
    def broken(*args: Any) -> None:
        raise KeyError("a defect")

    monkeypatch.setattr(entry, "run", broken)
    with pytest.raises(KeyError):
        main(["plan"])
    monkeypatch.setattr(entry, "run", lambda *args: (_ for _ in ()).throw(ValueError("x")))
    with pytest.raises(ValueError, match="x"):
        main(["plan", "--traceback"])
