"""Tokens read from a cache of fixed room (runtime/ring.py), beside a cache that grows; tests/cuda has them on a GPU."""

from __future__ import annotations

import copy
import gc
from typing import Any

import qlora_fx
import pytest
import torch
from peft import LoraConfig
from qlora_fx.capture import cache_layers
from qlora_fx.capture.cache import START
from qlora_fx.capture.cache_layers import Buffers
from qlora_fx.errors import InputError
from qlora_fx.runtime.ops import ops
from qlora_fx.testing import randomize_adapter
from recording import record
from slow import only_slow_but
from small_models import batch, peer_llama, tiny_gpt2, tiny_llama, windowed_gemma2
from torch import Tensor
from transformers import GPTNeoConfig, GPTNeoForCausalLM

LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}


def transformed(model: Any, backend: str = "eager") -> Any:
    qmodel = qlora_fx.transform(
        model, LoraConfig(**LORA), backend=backend, compute_dtype=torch.float32
    )
    randomize_adapter(qmodel)
    return qmodel.eval()


@pytest.fixture(scope="module")
def shared() -> Any:
    return transformed(peer_llama(1))


@pytest.fixture
def ringed(shared: Any) -> Any:
    shared.programs.buffers = Buffers()
    yield shared
    shared.programs.buffers = None


def padded(rows: int, tokens: int) -> dict[str, Tensor]:
    """The last row begins with 4 masked positions."""
    ids = batch(rows, tokens, padded=0)["input_ids"]
    mask = torch.ones_like(ids)
    mask[-1, :4] = 0
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
    }


@torch.no_grad()
def whole(qmodel: Any, values: dict[str, Tensor]) -> Tensor:
    return seen(qmodel(**values, use_cache=True).logits, values)


def seen(logits: Tensor, values: dict[str, Tensor]) -> Tensor:
    """Of tokens that are not masked: what a masked one sees is anybody's choice."""
    return logits[values["attention_mask"].bool()]


class OneByOne:
    """Tokens of rows, of which the first are computed together, and their logits."""

    def __init__(self, qmodel: Any, values: dict[str, Tensor], first: int) -> None:
        self.qmodel, self.values, self.done = qmodel, values, 0
        self.cache: Any = None
        self.logits: list[Tensor] = []
        self.take(first)

    @torch.no_grad()
    def take(self, tokens: int) -> None:
        stop = self.done + tokens
        given = {name: t[:, self.done : stop] for name, t in self.values.items()}
        given["attention_mask"] = self.values["attention_mask"][:, :stop]
        out = self.qmodel(**given, past_key_values=self.cache, use_cache=True)
        self.cache, self.done = out.past_key_values, stop
        self.logits.append(out.logits)

    def rest(self) -> Tensor:
        """Logits of all tokens that are not masked."""
        while self.done < self.values["input_ids"].shape[1]:
            self.take(1)
        return seen(torch.cat(self.logits, 1), self.values)


def takes_rings(qmodel: Any) -> bool:
    return any(START in name for name in qmodel.graph_modules)


def close(mine: Tensor, true: Tensor) -> None:
    torch.testing.assert_close(mine, true, rtol=0, atol=1e-5 * float(true.abs().max()))


@pytest.mark.parametrize("backend", only_slow_but(["aot_eager"], ["aot_eager", "inductor"]))
def test_recorded_tokens_are_those_without_a_cache(backend: str) -> None:
    """Over a room that is filled and grows; a cache leaves its buffers to the next."""
    qmodel = transformed(tiny_llama(2), backend)
    qmodel.programs.buffers = Buffers()
    OneByOne(qmodel, padded(2, 6), 5).rest()
    gc.collect()  # torch.export 2.11 holds the frames of its first caller in a circle, and so that cache
    assert takes_rings(qmodel)
    happened: list[str] = []
    record(qmodel, happened)
    for tokens in (259, 260, 261):
        values = padded(2, tokens)
        close(OneByOne(qmodel, values, tokens - 5).rest(), whole(qmodel, values))
    made = qmodel.programs.buffers.made
    assert [key[0] for key in made] == [256, 512]
    assert all(len(layers[i]) == 1 for layers in made.values() for i in (0, 1))
    # From a room of 256: 3, 2 and 1 tokens; from one of 512: 2, 3 and 4. Two of each are not recorded.
    assert happened.count("record") == 2
    assert happened.count("replay forward") == 6 - 2 + 9 - 2
    given = [padded(2, 30), padded(2, 25)]
    both = [OneByOne(qmodel, values, 9) for values in given]
    for _ in range(5):
        for one in both:
            one.take(1)
    for one, values in zip(both, given, strict=True):
        close(one.rest(), whole(qmodel, values))
    assert happened.count("record") == 3, "one for the second cache's buffers"


def test_caches_at_the_same_time_share_no_buffers(ringed: Any) -> None:
    given = [padded(2, 16), padded(2, 13)]
    running = [OneByOne(ringed, values, 9) for values in given]
    for _ in range(3):
        for one in running:
            one.take(1)
    for one, values in zip(running, given, strict=True):
        close(one.rest(), whole(ringed, values))
    assert takes_rings(ringed)
    (layers,) = ringed.programs.buffers.made.values()
    assert len(layers[0]) == 3, "and whole's"


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 2}])
@pytest.mark.parametrize("masked", [True, False])
def test_generate(ringed: Any, options: dict[str, int], masked: bool) -> None:
    """Beams and guesses reorder, repeat and crop a cache."""
    values = padded(1 if "prompt_lookup_num_tokens" in options else 2, 9)
    if not masked:
        values["attention_mask"].fill_(1)
    del values["position_ids"]
    told = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": 10}
    mine = ringed.generate(**values, **told, **options)
    assert takes_rings(ringed)
    ringed.programs.buffers = None
    assert torch.equal(mine, ringed.generate(**values, **told, **options))


def test_a_copied_cache_goes_its_own_way(ringed: Any) -> None:
    values = padded(2, 10)
    other_values = {name: t.clone() for name, t in values.items()}
    other_values["input_ids"][:, -1] += 1
    one, other = (OneByOne(ringed, v, 9) for v in (values, other_values))
    other.cache = copy.deepcopy(one.cache)
    close(other.rest(), whole(ringed, other_values))
    close(one.rest(), whole(ringed, values))
    one.cache.crop(-1)
    again = OneByOne(ringed, other_values, 9)
    again.cache = one.cache
    close(again.rest(), whole(ringed, other_values))


def test_what_is_left_in_buffers_is_zeroed(ringed: Any) -> None:
    """What is masked is multiplied all the same."""
    values = padded(2, 12)
    OneByOne(ringed, values, 9).rest()
    (layers,) = ringed.programs.buffers.made.values()
    for t in layers[0][0]:
        t.fill_(torch.nan)
    close(OneByOne(ringed, values, 9).rest(), whole(ringed, values))
    assert len(layers[0]) == 1


def test_what_is_kept_has_an_end_and_other_caches_grow(
    ringed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_layers, "KEPT_AT_ONCE", 1)
    monkeypatch.setattr(cache_layers, "KEPT_SHAPES", 1)
    values = padded(2, 12)
    true = whole(ringed, values)
    first = OneByOne(ringed, values, 9)
    with pytest.warns(UserWarning, match="cuda_graphs: tokens of caches 1 at the same time are"):
        second = OneByOne(ringed, values, 9)
    for one in (second, first, OneByOne(ringed, padded(3, 12), 9)):
        one.rest()
    close(second.rest(), true)
    close(first.rest(), true)
    (layers,) = ringed.programs.buffers.made.values()
    assert len(layers[0]) == 1


def test_which_calls_see_a_ring(ringed: Any) -> None:
    """Those that say where their tokens stand, of a few tokens, without gradients; a mask may be left out."""
    ringed.programs.captured.clear()
    values = padded(2, 27)
    ids, places = values["input_ids"], torch.arange(27).expand(2, -1)
    with torch.no_grad():
        cache = ringed(ids[:, :9], use_cache=True).past_key_values
        plain = ringed(ids[:, 9:10], past_key_values=cache).logits
        cache.crop(-1)
        ringed(ids[:, 9:], past_key_values=cache, position_ids=places[:, 9:])
        cache.crop(-18)
    graded = ringed(ids[:, 9:10], past_key_values=cache, position_ids=places[:, 9:10]).logits
    close(graded.detach(), plain)
    assert not takes_rings(ringed)
    cache.crop(-1)
    with torch.no_grad():
        found = ringed(ids[:, 9:10], past_key_values=cache, position_ids=places[:, 9:10]).logits
    assert takes_rings(ringed)
    close(found, plain)


@pytest.mark.slow
def test_a_window_is_that_of_the_model() -> None:
    beside_the_whole(transformed(windowed_gemma2()), 14)


@pytest.mark.slow
def test_attention_of_another_kind_is_given_the_models_order() -> None:
    model = tiny_llama(1)
    model.set_attn_implementation("eager")
    qmodel = transformed(model)
    beside_the_whole(qmodel, 14)
    assert "unrolled" in qlora_fx.graph_text(list(qmodel.graph_modules.values())[-1])


@pytest.mark.slow
def test_learned_positions_end_where_they_end() -> None:
    """Not where the room of a cache ends."""
    qmodel = transformed(tiny_gpt2())
    longest = qmodel.config.n_positions
    assert longest < 256
    beside_the_whole(qmodel, longest)
    one = OneByOne(qmodel, padded(2, longest + 1), longest)
    with pytest.raises(
        InputError, match=f"behind {longest} in the cache; accepted: at most {longest}"
    ):
        one.take(1)


@pytest.mark.slow
def test_a_model_that_takes_no_ring_runs_without() -> None:
    """GPT-Neo reads a table of as many tokens as it has positions, which are fewer than a cache has room for."""
    config = GPTNeoConfig(
        vocab_size=101,
        hidden_size=32,
        num_layers=1,
        attention_types=[[["local"], 1]],
        num_heads=2,
        max_position_embeddings=64,
        window_size=4,
    )
    qmodel = transformed(GPTNeoForCausalLM(config))
    values = padded(2, 14)
    true = whole(qmodel, values)
    qmodel.programs.buffers = Buffers()
    one = OneByOne(qmodel, values, 9)
    with pytest.warns(
        UserWarning, match="tokens of GPTNeoForCausalLM are not recorded: the tensors"
    ):
        one.take(1)
    close(one.rest(), true)
    assert qmodel.programs.buffers is None
    with pytest.raises(InputError, match="attention_mask has shape"):
        qmodel(values["input_ids"], attention_mask=values["attention_mask"][:, 1:])


def beside_the_whole(qmodel: Any, tokens: int) -> None:
    values = padded(2, tokens)
    true = whole(qmodel, values)
    qmodel.programs.buffers = Buffers()
    close(OneByOne(qmodel, values, tokens - 5).rest(), true)
    assert takes_rings(qmodel)


@pytest.mark.parametrize("start", [0, 1, 4, 5])
def test_masks_are_brought_into_the_order_of_the_keys(start: int) -> None:
    """Attention over a ring as it lies is attention over its tokens in their order."""
    torch.manual_seed(0)
    past, new, at = torch.randn(5, 2, 3, 4), torch.randn(2, 3, 2, 4), torch.tensor(start)
    q, mask = torch.randn(2, 3, 2, 4), torch.rand(2, 1, 2, 7) > 0.3
    oldest_first = past.roll(-start, 0)
    torch.testing.assert_close(ops.unrolled(past, at), oldest_first)
    attend = torch.nn.functional.scaled_dot_product_attention
    true = torch.cat([oldest_first.permute(1, 2, 0, 3), new], 2)
    lying = torch.cat([past.permute(1, 2, 0, 3), new], 2)
    torch.testing.assert_close(
        attend(q, lying, lying, ops.rolled(mask, at, past)), attend(q, true, true, mask)
    )
    for call in ((ops.unrolled, (past, at)), (ops.rolled, (mask, at, past))):
        torch.library.opcheck(call[0].default, call[1])
