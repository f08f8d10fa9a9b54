"""What only a GPU can show. Skipped, with a count, where there is none."""

from __future__ import annotations

import copy

import qlora_fx
import pytest
import torch
from conftest import batch, tiny_llama
from oracle import Float64, random_adapter, relative_error, step, truth
from peft import LoraConfig

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
def test_logits_and_gradients_are_right_on_a_gpu(dtype: torch.dtype, limit: float) -> None:
    model = tiny_llama(2)
    adapter = random_adapter(model, 4, scale=0.1)
    dense, true_params = truth(model, adapter, 2.0)
    with Float64():
        true_logits, true_grads = step(dense, true_params, batch())
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    qmodel = qlora_fx.transform(copy.deepcopy(model).cuda(), config, compute_dtype=dtype)
    qmodel.load_adapter_state_dict(adapter)
    params = {f"base_model.model.{n}": p for n, p in qmodel.adapter_parameters()}
    logits, grads = step(qmodel, params, {k: v.cuda() for k, v in batch().items()})
    assert relative_error(logits.cpu(), true_logits) < limit
    for name in true_grads:
        assert relative_error(grads[name].cpu(), true_grads[name]) < 20 * limit, name


def test_optimizer_state_is_paged_on_a_gpu() -> None:
    config = LoraConfig(r=64, target_modules="all-linear")
    model = tiny_llama(1, hidden_size=2048, intermediate_size=2048, head_dim=512).cuda()
    qmodel = qlora_fx.transform(model, config)
    optimizer = qmodel.paged_optimizer(lr=1e-3)
    loss = qmodel(**{k: v.cuda() for k, v in batch().items()}).loss
    loss.backward()
    optimizer.step()
    assert any(getattr(s["state1"], "is_paged", False) for s in optimizer.state.values())
