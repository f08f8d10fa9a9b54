"""Sources of from_pretrained other than a folder: the hub's cache, and a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import qlora_fx
import pytest
import torch
from qlora_fx import CheckpointError
from checkpoints import EAGER, assert_same_store, save
from conftest import batch, peer_llama
from transformers import AutoModelForCausalLM, GgufConfig


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache of our own, and no network."""
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return cache


def test_a_hub_id_is_found_in_the_hubs_cache(offline: Path) -> None:
    """The cache's layout: snapshots/<commit>/<file>, and refs/<revision> with the commit."""
    repository = offline / "models--someone--small"
    commit = "a" * 40
    folder = repository / "snapshots" / commit
    folder.parent.mkdir(parents=True)
    save(peer_llama(1), folder, max_shard_size="40KB")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    qmodel = qlora_fx.from_pretrained("someone/small", **EAGER)
    assert_same_store(qmodel, qlora_fx.from_pretrained(folder, **EAGER))
    assert qmodel.config.name_or_path == "someone/small"
    with pytest.raises(
        CheckpointError, match="'someone/other' is no local folder, and the hub gave"
    ):
        qlora_fx.from_pretrained("someone/other", **EAGER)
    with pytest.raises(CheckpointError, match="the hub gave"):
        qlora_fx.from_pretrained("someone/small", revision="other", **EAGER)
    sorted(folder.glob("*.safetensors"))[1].unlink()
    with pytest.raises(CheckpointError, match=r"safetensors is not there"):
        qlora_fx.from_pretrained("someone/small", **EAGER)


# -- GGUF ---------------------------------------------------------------------------------------------


def gguf_file(path: Path) -> Path:
    """A small Llama as llama.cpp writes it: its names, q and k permuted for its rotary layout, one weight in Q8_0."""
    gguf = pytest.importorskip("gguf")
    model = peer_llama(1, attention_bias=False, mlp_bias=False, num_key_value_heads=2)
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "model.layers": "blk",
    }
    for name, p in model.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for projection, count in heads.items():
            if projection in name:
                p = p.view(count, 2, -1, p.shape[1]).transpose(1, 2).reshape(p.shape)
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        values: Any = p.numpy()
        if "ffn_up" in name:
            blocks = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_gives_the_bytes_of_transformers_loading_it(tmp_path: Path) -> None:
    file = gguf_file(tmp_path / "model.gguf")
    qmodel = qlora_fx.from_pretrained(file, **EAGER)
    reference = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True)
    )
    assert_same_store(qmodel, qlora_fx.transform(reference, backend="eager"))
    qmodel.merge(tmp_path / "merged", sample=False)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        one, other = qmodel.eval()(**batch()).logits, merged(**batch()).logits
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_damaged_gguf_file_is_refused(tmp_path: Path) -> None:
    file = gguf_file(tmp_path / "model.gguf")
    whole = file.read_bytes()
    for length in (3, 30, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"model.gguf"):
            qlora_fx.from_pretrained(file, **EAGER)
    with pytest.raises(CheckpointError, match=r"has no other.gguf \(it has: model.gguf\)"):
        qlora_fx.from_pretrained(tmp_path, gguf_file="other.gguf", **EAGER)
