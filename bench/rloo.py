"""`python -m bench.rloo FOLDER TARGET STRENGTH STEPS`: TRL's RLOO for the sentiment experiment, in its own process.

The policy is the SFT model with a LoRA adapter like the other runs', the reward the classifier's P(positive), and
STRENGTH the weight of the KL penalty to the SFT model. TARGET ends as the merged model.
"""

import json
import math
import os
import sys
import warnings
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
warnings.filterwarnings("ignore")

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import RLOOConfig, RLOOTrainer

from bench.sentiment import MAX_TOKENS, SAMPLES
from worker.classifier import LinearClassifier


def main() -> None:
    folder, target, strength, steps = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
    classifier = LinearClassifier.load(folder / "classifier.json")
    tokenizer = AutoTokenizer.from_pretrained(folder / "sft", padding_side="left")
    prompts = [json.loads(line)["prompt"] for line in (folder / "prompts.jsonl").read_text().rstrip("\n").split("\n")]

    def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        texts = (prompt + answer for prompt, answer in zip(prompts, completions, strict=True))
        return [1 / (1 + math.exp(-classifier.score(text))) for text in texts]

    config = RLOOConfig(
        output_dir=str(folder / "rloo-work"),
        beta=strength,
        learning_rate=1e-3,
        max_steps=steps,
        per_device_train_batch_size=64,
        num_generations=SAMPLES,
        max_completion_length=MAX_TOKENS,
        temperature=1.0,
        seed=0,
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
        logging_steps=10,
        disable_tqdm=True,
    )
    trainer = RLOOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "sft"),
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    merged = trainer.model.merge_and_unload()
    merged.save_pretrained(target)
    AutoTokenizer.from_pretrained(folder / "sft").save_pretrained(target)


if __name__ == "__main__":
    main()
