"""`python -m bench.rloo FOLDER TARGET STRENGTH SEED STEPS POINTS`: TRL's RLOO for the sentiment experiment.

The policy is the SFT model with the same LoRA adapter as the other runs. The reward is the classifier's P(positive).
STRENGTH is the weight of the KL penalty to the SFT model. TARGET/1 to TARGET/POINTS are merged models at equal
distances, the last one after all STEPS.
"""

import json
import math
import os
import shutil
import sys
import warnings
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
warnings.filterwarnings("ignore")

from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import RLOOConfig, RLOOTrainer

from bench.sentiment import MAX_TOKENS, SAMPLES
from worker.classifier import LinearClassifier


def main() -> None:
    folder, target, strength = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
    seed, steps, points = map(int, sys.argv[4:])
    classifier = LinearClassifier.load(folder / "classifier.json")
    tokenizer = AutoTokenizer.from_pretrained(folder / "sft", padding_side="left")
    prompts = [json.loads(line)["prompt"] for line in (folder / "prompts.jsonl").read_text().rstrip("\n").split("\n")]

    def reward(prompts: list[str], completions: list[str], **_: object) -> list[float]:
        """P(positive) of each prompt with its completion."""
        texts = (prompt + answer for prompt, answer in zip(prompts, completions, strict=True))
        return [1 / (1 + math.exp(-classifier.score(text))) for text in texts]

    config = RLOOConfig(
        output_dir=str(target / "work"),
        beta=strength,
        learning_rate=1e-3,
        max_steps=steps,
        per_device_train_batch_size=64,
        num_generations=SAMPLES,
        max_completion_length=MAX_TOKENS,
        temperature=1.0,
        seed=seed,
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_steps=steps // points,
        save_only_model=True,
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
    for place in range(1, points + 1):
        adapter = target / "work" / f"checkpoint-{place * (steps // points)}"
        base = AutoModelForCausalLM.from_pretrained(folder / "sft")
        PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(target / str(place))
        tokenizer.save_pretrained(target / str(place))
    shutil.rmtree(target / "work")


if __name__ == "__main__":
    main()
