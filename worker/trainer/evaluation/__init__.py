"""Evaluations: how a model scores given answers, and which answers it generates.

Like a training, an evaluation reads a work folder, writes events, and leaves its results in the folder.

- Input: `evaluation.json`, `run.json`, `sides/` with the models, the data, and `parts/` with completions of earlier
  attempts.
- Output: `output/items.jsonl`, one line for each pair or completion. `worker.evaluation_figures` computes the figures.

Only one model is in memory at a time. Several ranks sample and score different batches. Each batch is that of a single
rank, so the items are too.
"""

import json
from collections.abc import Callable

import torch

from app.spec.evaluation import EvaluationType
from worker.trainer.alike import require_alike
from worker.trainer.errors import UserError
from worker.trainer.evaluation import agreement, preference, reward_kl, win_rate
from worker.trainer.evaluation.run import EvaluationRun
from worker.trainer.events import EvaluationDone
from worker.trainer.sides.rows import Item

TYPES: dict[EvaluationType, Callable[[EvaluationRun], list[Item]]] = {
    "preference": preference.items,
    "reward_kl": reward_kl.items,
    "win_rate": win_rate.items,
    "agreement": agreement.items,
}
"""The function that computes the items of an evaluation, by its type."""


def evaluate(run: EvaluationRun) -> None:
    """Evaluate, and write `output/items.jsonl`. Raises `UserError` or `Stopped`."""
    try:
        require_alike(run.ranks)
        items = TYPES[run.spec.type](run)
    except torch.OutOfMemoryError as error:
        message = "The model or one row does not fit into the GPU's memory. Lower 'max_length', or quantise the base."
        raise UserError("out_of_memory", message, "candidate.model") from error
    if not run.ranks.is_first:
        return
    output = run.folder / "output"
    output.mkdir(exist_ok=True)
    with (output / "items.jsonl").open("w") as file:
        for item in items:
            try:
                file.write(json.dumps(item, ensure_ascii=False, allow_nan=False) + "\n")
            except ValueError as error:
                message = f"Line {item['line']}: a log-prob or a reward is not a finite number."
                raise UserError("not_finite", message, "candidate.model") from error
    run.events.emit(EvaluationDone(len(items)))
