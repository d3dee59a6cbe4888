"""`python -m bench.reinforcement`: steps of RLOO on the CPU, beside TRL's RLOOTrainer over the same prompts.

A step writes answers, grades them, computes their log-probs under the policy and its reference, and updates a LoRA
adapter. Hardly an answer ends early, so both write equally many tokens. The first step of each does not count.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
warnings.filterwarnings("ignore")

import torch
from rich.console import Console
from rich.table import Table

from app.spec.datasets.example import Kind
from app.spec.graders.schemas import StringCheck
from app.spec.hyperparameters import ReinforcementHyperparameters
from bench.entrants import LORA, THREADS
from bench.inputs import HH, lengths_of, make_model, make_pairs
from bench.machine import describe_machine
from tests.helpers.trainer import load
from worker.trainer import weights
from worker.trainer.averages import Averages
from worker.trainer.data import Recipe, Row
from worker.trainer.dataset import Rows
from worker.trainer.grading import Exercise, Grading
from worker.trainer.launcher import Launcher
from worker.trainer.methods.reinforcement import Reinforcement
from worker.trainer.optimizer import make_optimizer
from worker.trainer.tasks import Tasks

PROMPTS, SAMPLES, TOKENS, STEPS = 4, 8, 32, 3
"""Prompts of a step, answers to each, tokens of each, and steps, of which the first does not count."""
BETA = 0.05
PART = "99"
"""An answer with this text has the reward 1."""
GRADER = {
    "type": "string_check", "name": "a", "input": "{{sample.output_text}}", "reference": PART, "operation": "like",
}  # fmt: skip


def ours(folder: Path, prompts: list[str]) -> list[float]:
    """Seconds of each step of this engine."""
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    policy = load(folder, adapter=LORA)
    tasks = Tasks([file], policy.tokenizer, Recipe(Kind.PROMPTS, 1024))
    rows = Rows.of(Row(number + 1, (0,), (), number=number) for number in range(len(prompts)))
    assert len({tasks.of(row).prompt.ids for row in rows}) == len(rows)
    settings = ReinforcementHyperparameters(samples=SAMPLES, max_tokens=TOKENS, beta=BETA).resolved(full=False)
    exercise = Exercise(Grading(StringCheck.model_validate(GRADER), folder, []), tasks, tasks)
    launcher = Launcher(policy)
    method = Reinforcement(launcher, settings, rows, rows[:0], exercise, seed=0)
    method.anchor = weights.copied(policy)
    optimizer, seconds = make_optimizer(settings, launcher.owned.own), []
    for step in range(STEPS):
        began = time.perf_counter()
        method.gradient(list(range(step * PROMPTS, (step + 1) * PROMPTS)), Averages())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - began)
        method.after_step(step + 1)
    return seconds


def trl(folder: Path, prompts: list[str], *, recompute: bool) -> list[float]:
    """Seconds of each step of TRL's RLOOTrainer. `recompute`: with gradient checkpointing, which is its default."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import RLOOConfig, RLOOTrainer

    seconds, began = list[float](), [0.0]

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            began[0] = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.perf_counter() - began[0])

    config = RLOOConfig(
        output_dir=str(folder / "trl"), beta=BETA, max_steps=STEPS, per_device_train_batch_size=PROMPTS * SAMPLES,
        num_generations=SAMPLES, max_completion_length=TOKENS, use_cpu=True, bf16=False, report_to=[],
        save_strategy="no", disable_tqdm=True, gradient_checkpointing=recompute, seed=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.generation_config.eos_token_id = None
    trainer = RLOOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [float(PART in text) for text in completions],
        args=config,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        processing_class=AutoTokenizer.from_pretrained(folder, padding_side="left"),
        peft_config=LoraConfig(
            r=LORA["r"], lora_alpha=LORA["alpha"], target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        callbacks=[Clock()],
    )
    trainer.train()
    return seconds


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(THREADS)
    lengths, source = lengths_of(HH, PROMPTS * STEPS, (70, 32, 24))
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder, 1024)
        prompts = [str(pair["prompt"]) for pair in make_pairs(lengths, 1024)]
        entrants: dict[str, Callable[[], list[float]]] = {
            "this engine": lambda: ours(folder, prompts),
            "TRL": lambda: trl(folder, prompts, recompute=True),
            "TRL, activations kept": lambda: trl(folder, prompts, recompute=False),
        }
        for entrant, run in entrants.items():
            seconds[entrant] = run()[1:]
    answers = PROMPTS * SAMPLES
    record = {
        "machine": describe_machine() | {"threads": THREADS},
        "step": f"{PROMPTS} prompts ({source}), {SAMPLES} answers of {TOKENS} tokens for each",
        "answers": answers,
        "seconds": seconds,
    }
    table = Table(title=str(record["step"]), title_justify="left")
    for heading in ("", "seconds a step", "fastest to slowest step", "answers/s"):
        table.add_column(heading, justify="right" if heading else "left")
    for entrant, steps in seconds.items():
        median = statistics.median(steps)
        spread = f"{min(steps):.1f} to {max(steps):.1f}"
        table.add_row(entrant, f"{median:.1f}", spread, f"{answers / median:.1f}")
    Console(width=130).print(table)
    (Path(__file__).parent / "results" / "reinforcement.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
