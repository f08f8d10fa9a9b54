"""TRL's SFTTrainer with a vision-language model's own processor: pictures of other sizes in every batch, as over PEFT."""

from __future__ import annotations

import copy
import random
import warnings
from pathlib import Path
from typing import Any

import qlora_fx
import numpy as np
import pytest
import torch
from datasets import Dataset
from default_path import ours
from families import FAMILIES, build
from peft import LoraConfig, PeftModel
from PIL import Image
from qlora_fx.testing.check import randomize_adapter
from qlora_fx.testing.reference import dense_weights
from slow import only_slow_but
from tokenizers import Tokenizer, models, pre_tokenizers
from trainers import logged
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from trl import SFTConfig, SFTTrainer

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore")]

PLACEHOLDERS = ["<|vision_start|>", "<|video_pad|>", "<|image_pad|>", "<|vision_end|>"]
WORDS = [f"w{i}" for i in range(90)]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ' ' }}{% for c in m['content'] %}{% if c['type'] == 'image' %}"
    "<|vision_start|> <|image_pad|> <|vision_end|> {% else %}{{ c['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}"
)


class Processor(Qwen2_5_VLProcessor):
    """Qwen2.5-VL's, without its part for videos, which needs torchvision."""

    def check_argument_for_proper_class(self, name: str, part: Any) -> Any:
        return type(part) if part is None else super().check_argument_for_proper_class(name, part)


def processor() -> Processor:
    """Ids as in ``families.three_axes.QWEN_TOKENS``: 3 and 4 stand for videos and images."""
    names = ["<pad>", "<eos>", *PLACEHOLDERS, "user", "assistant", "<unk>", *WORDS]
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, additional_special_tokens=PLACEHOLDERS, **special
    )
    pictures = Qwen2VLImageProcessorPil(
        patch_size=4, temporal_patch_size=2, merge_size=2, min_pixels=64, max_pixels=4096
    )
    return Processor(pictures, tokenizer, None, chat_template=TEMPLATE)


def rows() -> Dataset:
    """One or two pictures of 8 to 32 by 8 to 40 pixels, a question, an answer."""
    draw, noise = random.Random(0), np.random.default_rng(0)

    def text(least: int, most: int) -> dict[str, str]:
        words = " ".join(draw.choice(WORDS) for _ in range(draw.randint(least, most)))
        return {"type": "text", "text": words}

    def row(count: int) -> dict[str, Any]:
        sizes = [(8 * draw.randint(1, 4), 8 * draw.randint(1, 5)) for _ in range(count)]
        pixels = [noise.integers(0, 255, (*size, 3), dtype=np.uint8) for size in sizes]
        question = [*({"type": "image", "text": ""} for _ in sizes), text(2, 6)]
        return {
            "images": [Image.fromarray(p) for p in pixels],
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": [text(4, 4)]},
            ],
        }

    return Dataset.from_list([row(1 + i % 2) for i in range(24)])


@pytest.mark.parametrize("backend", only_slow_but(["eager"], ["eager", "inductor"]))
def test_losses_and_gradient_norms_are_the_references(backend: str, tmp_path: Path) -> None:
    family = next(f for f in FAMILIES if f.model_type == "qwen2_5_vl")
    model = build(family).train()
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    mine = qlora_fx.transform(
        copy.deepcopy(model), lora, compute_dtype=torch.float32, backend=backend
    )
    randomize_adapter(mine)
    mine.save_pretrained(tmp_path / "adapter")
    tensors = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, weight in dense_weights(model, mine.base).items():
            tensors[name].copy_(weight)
    theirs = PeftModel.from_pretrained(model, tmp_path / "adapter", is_trainable=True)
    runs = []
    for i, one in enumerate((mine, theirs)):
        config = SFTConfig(
            output_dir=str(tmp_path / str(i)),
            max_steps=6,
            per_device_train_batch_size=3,
            learning_rate=1e-3,
            gradient_checkpointing=False,
            logging_steps=1,
            max_length=None,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
        )
        runs.append(SFTTrainer(one, config, train_dataset=rows(), processing_class=processor()))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            runs[-1].train()
        said = [str(w.message) for w in caught if ours(w)]
        assert not said, "nothing is captured again, nothing runs uncompiled"
    for name, tolerance in (("loss", 1e-4), ("grad_norm", 1e-3)):
        a, b = (logged(run, name) for run in runs)
        assert len(a) == len(b) == 6
        assert bool((b > 0).all())
        torch.testing.assert_close(a, b, rtol=tolerance, atol=0)
