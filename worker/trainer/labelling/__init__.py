"""Labellings: models answer prompts, and labellers say which answers are better.

Like an evaluation, a labelling reads a work folder, writes events, and leaves its results in the folder.

- Input: `labelling.json`, `run.json`, `sides/` with the models, the data, and `parts/` with completions of earlier
  attempts.
- Output: `output/items.jsonl`, one line for each prompt, with its answers and their labels.

The trainer has no network. If endpoints answer too, the first run leaves the answers of the models. The runner adds
those of the endpoints as `answered.jsonl`, and a second run labels all of them.
"""

import json
from pathlib import Path

import torch

from worker.answers import distinct
from worker.trainer.alike import require_alike
from worker.trainer.errors import UserError
from worker.trainer.events import LabellingDone
from worker.trainer.labelling.labels import label
from worker.trainer.labelling.prompts import prompts_of
from worker.trainer.labelling.run import LabellingRun
from worker.trainer.labelling.writing import write
from worker.trainer.sides.rows import Item


def make_labels(run: LabellingRun) -> None:
    """Write and label answers, into `output/items.jsonl`. Raises `UserError` or `Stopped`."""
    answered = run.folder / "answered.jsonl"
    try:
        require_alike(run.ranks)
        prompts = prompts_of(run)
        items = _read(answered) if answered.exists() else write(run, prompts)
        if answered.exists() or all(writer.endpoint is None for writer in run.spec.writers):
            items = [distinct(item) for item in items]
            label(run, items, prompts)
    except torch.OutOfMemoryError as error:
        message = "A model or one row does not fit into the GPU's memory. Lower 'max_length', or quantise the base."
        raise UserError("out_of_memory", message, None) from error
    if not run.ranks.is_first:
        return
    output = run.folder / "output"
    output.mkdir(exist_ok=True)
    with (output / "items.jsonl").open("w") as file:
        file.writelines(json.dumps(item, ensure_ascii=False, allow_nan=False) + "\n" for item in items)
    run.events.emit(LabellingDone(len(items)))


def _read(path: Path) -> list[Item]:
    with path.open() as file:
        return list(map(json.loads, file))
