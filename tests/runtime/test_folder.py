"""A folder is written whole or not at all: a writer is killed at every step of its work."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from qlora_fx.errors import CheckpointError
from qlora_fx.runtime import checkpoint_writer as folder
from qlora_fx.runtime.checkpoint_writer import FolderWriter, Spec
from safetensors import safe_open
from safetensors.torch import load_file

TENSORS = {
    "a": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "b": torch.arange(5, dtype=torch.uint8),
    "c": torch.ones(3, dtype=torch.bfloat16),
    "empty": torch.empty(0, 4),
    "scalar": torch.tensor(2.0),
}


def write(destination: Path, value: int, limit: int = 40) -> None:
    tensors = {k: torch.full_like(v, value) for k, v in TENSORS.items()}
    with FolderWriter(destination) as writer:
        writer.text("config.json", f'{{"value": {value}}}')
        specs = [Spec(k, v.dtype, tuple(v.shape)) for k, v in tensors.items()]
        writer.tensors(specs, max_shard_size=limit)
        for name, tensor in reversed(tensors.items()):
            writer.put(name, tensor)


def contents(path: Path) -> dict[str, bytes] | None:
    if not path.exists():
        return None
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_the_safetensors_library_reads_what_is_written(tmp_path: Path) -> None:
    write(tmp_path / "m", 1, limit=10**9)
    loaded = load_file(tmp_path / "m" / "model.safetensors")
    assert loaded.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(loaded[name], torch.full_like(tensor, 1))
    with safe_open(tmp_path / "m" / "model.safetensors", framework="pt") as f:
        assert f.metadata() == {"format": "pt"}


def test_shards_hold_at_most_their_size_or_one_tensor(tmp_path: Path) -> None:
    write(tmp_path / "m", 1)
    names = sorted(p.name for p in (tmp_path / "m").glob("*.safetensors"))
    assert names == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert set(load_file(tmp_path / "m" / names[0])) == {"a"}  # 48 bytes, more than 40


@pytest.mark.parametrize("limit", [10, 16, 40, 54, 10**9])
def test_shards_and_their_index_are_those_of_huggingface_hub(limit: int, tmp_path: Path) -> None:
    write(tmp_path / "ours", 1, limit)
    (tmp_path / "theirs").mkdir()
    save_torch_state_dict(
        {name: torch.full_like(tensor, 1) for name, tensor in TENSORS.items()},
        tmp_path / "theirs",
        max_shard_size=limit,
    )
    ours, theirs = (
        sorted(p for p in (tmp_path / folder).iterdir() if p.name.startswith("model"))
        for folder in ("ours", "theirs")
    )
    assert [p.name for p in ours] == [p.name for p in theirs]
    for one, other in zip(ours, theirs, strict=True):
        if one.suffix == ".json":
            assert json.loads(one.read_text()) == json.loads(other.read_text())
        else:
            assert load_file(one).keys() == load_file(other).keys()


# -- kills --------------------------------------------------------------------------------------------

CALLS = ("mkdir", "open", "pwrite", "fsync", "rename", "posix_fallocate", "unlink", "rmdir", "link")


def killed_at(step: int, action: Callable[[], None]) -> bool:
    """Run ``action`` in a process that is killed at its ``step``-th system call; half of a write is done.

    Returns:
        False if it ended before.
    """
    child = os.fork()
    if child == 0:
        count = 0

        def counted(original: Any, name: str) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal count
                count += 1
                if count == step:
                    if name == "pwrite":
                        original(args[0], args[1][: len(args[1]) // 2], args[2])
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*args, **kwargs)

            return call

        for name in CALLS:
            setattr(os, name, counted(getattr(os, name), name))
        real = folder.exchange
        folder.exchange = counted(real, "exchange")
        try:
            action()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_kill_at_any_step_leaves_the_old_folder_or_the_new_one(
    exchanges: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchanges:
        monkeypatch.setattr(folder, "exchange", lambda one, other: False)
    path = tmp_path / "m"
    write(tmp_path / "new", 2)
    new = contents(tmp_path / "new")
    seen = set()
    step = 0
    while True:
        step += 1
        write(path, 1)
        (path / "notes.txt").write_text("mine")
        (path / "adapter").mkdir(exist_ok=True)
        (path / "adapter" / "weights").write_text("mine too")
        old = contents(path)
        assert old is not None
        assert new is not None
        changed = new | {k: v for k, v in old.items() if "mine" in v.decode(errors="ignore")}
        if not killed_at(step, lambda: write(path, 2)):
            break
        found = contents(path)
        if found is None and not exchanges:  # between two renames: the next writer puts it back
            with pytest.raises(ZeroDivisionError), FolderWriter(path):
                raise ZeroDivisionError
            found = contents(path)
        assert found in (old, changed), step
        seen.add(found == old)
    assert seen == {True, False}
    assert step > 25
    assert contents(path) == changed
    write(path, 3)
    assert not list(tmp_path.glob(".*")), "litter of killed writers is removed by the next one"


def test_a_kill_of_the_first_writer_leaves_nothing_or_all(tmp_path: Path) -> None:
    write(tmp_path / "whole", 2)
    step = 0
    while True:
        step += 1
        path = tmp_path / f"m{step}"
        if not killed_at(step, lambda: write(path, 2)):  # noqa: B023 (called at once)
            break
        assert contents(path) in (None, contents(tmp_path / "whole"))
    assert step > 15


# -- other failures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["pwrite", "posix_fallocate", "fsync", "rename"])
def test_a_full_disk_leaves_the_old_folder(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "m", 1)
    old = contents(tmp_path / "m")
    destination = tmp_path / ("m" if call != "rename" else "n")

    def full(*args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*as it was"):
        write(destination, 2)
    monkeypatch.undo()
    assert contents(tmp_path / "m") == old
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


def test_the_kernels_own_limit_on_a_file_leaves_the_old_folder(tmp_path: Path) -> None:
    write(tmp_path / "m", 1)
    old = contents(tmp_path / "m")
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))
        try:
            write(tmp_path / "m", 2, limit=10**9)
        except CheckpointError:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert contents(tmp_path / "m") == old
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


def test_an_error_of_the_caller_leaves_the_old_folder(tmp_path: Path) -> None:
    write(tmp_path / "m", 1)
    old = contents(tmp_path / "m")
    writer = FolderWriter(tmp_path / "m")

    def interrupted() -> None:
        with writer:
            writer.text("config.json", "{}")
            raise KeyboardInterrupt

    def forgetful() -> None:
        with FolderWriter(tmp_path / "m") as other:
            other.tensors([Spec("a", torch.float32, (2,))], max_shard_size=100)

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with pytest.raises(ValueError, match="announced and not written"):
        forgetful()
    assert contents(tmp_path / "m") == old
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


def test_old_weights_go_and_other_files_stay(tmp_path: Path) -> None:
    write(tmp_path / "m", 1)  # two shards
    (tmp_path / "m" / "adapter_model.safetensors").write_bytes(b"x")
    (tmp_path / "m" / "quantized.safetensors").write_bytes(b"x")
    write(tmp_path / "m", 2, limit=10**9)
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == [
        "adapter_model.safetensors",
        "config.json",
        "model.safetensors",
    ]


def test_a_destination_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m").write_text("x")
    with pytest.raises(CheckpointError, match="is a file; accepted: a folder"):
        write(tmp_path / "m", 1)
    assert (tmp_path / "m").read_text() == "x"


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    write(tmp_path / "real", 1)
    (tmp_path / "m").symlink_to("real")
    write(tmp_path / "m", 2)
    assert (tmp_path / "m").is_symlink()
    assert (tmp_path / "real" / "config.json").read_text() == '{"value": 2}'
