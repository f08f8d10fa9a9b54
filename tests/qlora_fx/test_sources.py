"""Sources of from_pretrained other than a folder: the hub's cache, and a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import qlora_fx
import pytest
import torch
from qlora_fx import CheckpointError
from checkpoints import EAGER, assert_same_store, save
from slow import only_slow_but
from small_models import batch, peer_llama
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


def new_writer(path: Path, architecture: str, config: Any) -> Any:
    """A GGUF file's metadata."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_token_list([f"t{i}" for i in range(config.vocab_size)])
    return writer


def finish(writer: Any, tensors: dict[str, torch.Tensor], names: dict[str, str]) -> None:
    """Write the tensors under llama.cpp's names; the up projections in Q8_0."""
    gguf = pytest.importorskip("gguf")
    for name, p in tensors.items():
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


def llama_file(path: Path) -> Path:
    """Read by transformers' older reader; llama.cpp permutes q and k for its rotary layout."""
    model = peer_llama(1, attention_bias=False, mlp_bias=False, num_key_value_heads=2)
    config = model.config
    writer = new_writer(path, "llama", config)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    tensors = model.state_dict()
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, p in tensors.items():
        count = heads.get(name.split(".")[-2])
        if count is not None:
            tensors[name] = p.view(count, 2, -1, p.shape[1]).transpose(1, 2).reshape(p.shape)
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
    finish(writer, tensors, names)
    return path


def lfm2_file(path: Path) -> Path:
    """Read by transformers' lazy reader."""
    from transformers import Lfm2Config, Lfm2ForCausalLM

    torch.manual_seed(0)
    config = Lfm2Config(
        vocab_size=101,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention"],
        block_auto_adjust_ff_dim=False,
        conv_L_cache=3,
        pad_token_id=0,
    )
    writer = new_writer(path, "lfm2", config)
    writer.add_head_count_kv([0, 2])
    writer.add_shortconv_l_cache(3)
    tensors = Lfm2ForCausalLM(config).state_dict()
    tensors.pop("lm_head.weight", None)  # tied
    for name, p in tensors.items():
        if name.endswith("conv.conv.weight"):
            tensors[name] = p.squeeze(1).contiguous()
    names = {
        "model.embed_tokens": "token_embd",
        "model.embedding_norm": "token_embd_norm",
        "operator_norm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.out_proj": "attn_output",
        "self_attn.q_layernorm": "attn_q_norm",
        "self_attn.k_layernorm": "attn_k_norm",
        "feed_forward.w1": "ffn_gate",
        "feed_forward.w3": "ffn_up",
        "feed_forward.w2": "ffn_down",
        ".conv.conv": ".shortconv.conv",
        ".conv.in_proj": ".shortconv.in_proj",
        ".conv.out_proj": ".shortconv.out_proj",
        "model.layers": "blk",
    }
    finish(writer, tensors, names)
    return path


@pytest.mark.parametrize("write", only_slow_but([llama_file], [llama_file, lfm2_file]))
def test_a_gguf_file_gives_the_bytes_of_transformers_loading_it(write: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "model.gguf")
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
    file = llama_file(tmp_path / "model.gguf")
    whole = file.read_bytes()
    for length in (3, 30, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"model.gguf"):
            qlora_fx.from_pretrained(file, **EAGER)
    with pytest.raises(CheckpointError, match=r"has no other.gguf \(it has: model.gguf\)"):
        qlora_fx.from_pretrained(tmp_path, gguf_file="other.gguf", **EAGER)


@pytest.mark.slow
def test_a_real_gguf_file_gives_the_bytes_of_its_unpacked_folder(tmp_path: Path) -> None:
    import obtain

    folder = obtain.model_folder()
    file = tmp_path / Path(obtain.MEMBER).name
    obtain.download(file)
    obtain.verify(file)
    qmodel = qlora_fx.from_pretrained(file, **EAGER)
    assert_same_store(qmodel, qlora_fx.from_pretrained(folder, **EAGER))
