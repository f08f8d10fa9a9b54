"""TRL's DPOTrainer over a compiled QLoRA model: the same model without its training is the reference.

    python examples/dpo_trl.py                     # SmolLM2-135M learns to prefer the right date

Prints the share of held-out pairs in which the right answer is preferred, before and after; writes PEFT's files to --out.
"""

from __future__ import annotations

import qlora_fx
from data import dates
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer
from trl_run import arguments, settings, train


def main() -> None:
    args = arguments(__doc__ or "", out="out/dpo_trl", steps=20)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    qmodel = qlora_fx.transform(model, lora)  # the one line: instead of get_peft_model

    right = dates(216, seed=0)
    wrong = right[1:] + right[:1]  # another date's answer
    pairs = [
        {
            "prompt": [{"role": "user", "content": a.question}],
            "chosen": [{"role": "assistant", "content": a.answer}],
            "rejected": [{"role": "assistant", "content": b.answer}],
        }
        for a, b in zip(right, wrong, strict=True)
    ]
    trainer = DPOTrainer(
        model=qmodel,
        ref_model=None,  # the adapter as it was at the start
        args=DPOConfig(**settings(args)),
        train_dataset=Dataset.from_list(pairs[16:]),
        eval_dataset=Dataset.from_list(pairs[:16]),
        processing_class=AutoTokenizer.from_pretrained(args.model),
    )
    train(trainer, args, ["eval_loss", "eval_rewards/margins", "eval_rewards/accuracies"])


if __name__ == "__main__":
    main()
