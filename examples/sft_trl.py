"""TRL's SFTTrainer over a compiled QLoRA model: one line differs from a run with bitsandbytes and PEFT.

    python examples/sft_trl.py                     # SmolLM2-135M learns to write dates in words
    python examples/sft_trl.py --model <hub id or folder> --steps 200

Prints loss and token accuracy on held-out examples before and after; writes PEFT's files to --out.
"""

from __future__ import annotations

import qlora_fx
from data import dates
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer
from trl_run import arguments, settings, train


def main() -> None:
    args = arguments(__doc__ or "", out="out/sft_trl", steps=40)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    qmodel = qlora_fx.transform(model, lora)  # the one line: instead of get_peft_model

    examples = [
        {
            "prompt": [{"role": "user", "content": e.question}],
            "completion": [{"role": "assistant", "content": e.answer}],
        }
        for e in dates(216, seed=0)
    ]
    trainer = SFTTrainer(
        model=qmodel,
        args=SFTConfig(**settings(args)),
        train_dataset=Dataset.from_list(examples[16:]),
        eval_dataset=Dataset.from_list(examples[:16]),
        processing_class=AutoTokenizer.from_pretrained(args.model),
    )
    train(trainer, args, ["eval_loss", "eval_mean_token_accuracy"])


if __name__ == "__main__":
    main()
