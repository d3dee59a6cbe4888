"""The outcome for every causal model type of transformers: a tiny random model is loaded and scored as in a job.

`python -m tests.helpers.model_table` writes the table of docs/models.md. A test keeps it up to date.
"""

import io
import json
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers import __version__ as transformers_version

from tests.helpers.causal_types import TYPES, tiny_config, tiny_model
from tests.helpers.tiny_model import make_tokenizer
from tests.helpers.trainer import disturb, gradients, load, make_row, pack_of, plain_logps
from worker.trainer.data import Row
from worker.trainer.errors import UserError, first_line
from worker.trainer.events import Events
from worker.trainer.exactness import check
from worker.trainer.merge import merge
from worker.trainer.model import Policy

PLACE = Path(__file__).parents[2] / "docs/models.md"
QUANTISATIONS = ("none", "nf4", "int8")
ROWS = [make_row(1, 12, 5, 9), make_row(2, 9, 7, 2), make_row(3, 20, 4, 6)]
"""Longer than every window of `causal_types`."""
STATES = {"shared": "exact", "alone": "exact, slower", "refused": "refused"}
BEGIN, END = "<!-- made by `python -m tests.helpers.model_table` -->", "<!-- to here -->"


class Wrong(AssertionError):
    """A model that passed the check before training and is not exact."""


@dataclass(frozen=True)
class Written:
    """A model of a causal type in a folder. If transformers cannot make one, only its configuration, and the reason."""

    folder: Path
    unmakeable: str | None


@contextmanager
def written(kind: str, **changes: Any) -> Iterator[Written]:
    """Write a model of the type `kind` into a temporary folder. `changes` override its configuration."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        make_tokenizer().save_pretrained(folder)
        unmakeable = None
        try:
            tiny_model(kind, **changes).save_pretrained(folder)
        except Exception as error:
            unmakeable = first_line(error)
        # A multimodal model is saved with the configuration of its text part alone: write the whole one.
        tiny_config(kind, **changes).save_pretrained(folder)
        yield Written(folder, unmakeable)


def outcome(model: Written, quantization: str) -> tuple[str, str]:
    """Whether the model is exact with shared prompts, exact in a slower way, or refused; and the reason.

    Raises `Wrong` for a model that would train on wrong numbers. Other errors that are no refusal come through.
    """
    stream, folder = io.StringIO(), model.folder
    if model.unmakeable is not None:
        _must_be_refused(folder, quantization)
        return "refused", reproducible(f"transformers itself cannot make a model of it: {model.unmakeable}.", folder)
    try:
        policy = load(folder, stream=stream, quantization=quantization)
        rows = [within(row, policy) for row in ROWS]
        check(policy, rows, Events(stream))
    except UserError as error:
        return "refused", reproducible(error.message, folder)
    if quantization == "none":
        _hold_against(policy, AutoModelForCausalLM.from_pretrained(folder).eval(), rows)
    _hold_against_itself(disturb(policy, scale=0.02), rows)
    if quantization == "none":
        _hold_against_its_merge(policy, folder, rows)
    warnings = [
        event["message"] for event in map(json.loads, stream.getvalue().splitlines()) if event["level"] == "warn"
    ]
    return ("shared" if policy.shared else "alone"), reproducible(" ".join(warnings), folder)


def _must_be_refused(folder: Path, quantization: str) -> None:
    try:
        load(folder, quantization=quantization)
    except UserError:
        return
    raise Wrong("it was loaded")


def within(row: Row, policy: Policy) -> Row:
    """`row` with tokens of the model's vocabulary."""
    size = min(policy.causal.config.get_text_config().vocab_size, 300)

    def fit(ids: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(token % size for token in ids)

    return replace(
        row,
        prompt=fit(row.prompt),
        responses=tuple(replace(response, ids=fit(response.ids)) for response in row.responses),
    )


def reproducible(message: str, folder: Path) -> str:
    """A message without the parts that change from run to run."""
    return re.sub(r"\b0x[0-9a-f]{6,}", "…", message.replace(str(folder), "the folder"))


def _hold_against(policy: Policy, model: torch.nn.Module, rows: list[Row]) -> None:
    """The policy scores like `model`, which transformers alone loads and runs. A fresh adapter changes nothing."""
    with torch.no_grad():
        for row in rows:
            actual = policy.score(pack_of(policy, [row], [0])).responses
            expected = []
            for response in row.responses:
                ids = torch.tensor([row.prompt + response.ids])
                logps = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1).gather(1, ids[0, 1:, None])
                chosen = torch.tensor((False,) * len(row.prompt) + response.scored)[1:]
                expected.append(logps[:, 0][chosen].sum())
            _close(actual, torch.stack(expected), "transformers alone")


def _hold_against_its_merge(policy: Policy, folder: Path, rows: list[Row]) -> None:
    """The merged model, which transformers alone loads and runs, scores like the policy."""
    policy.save(folder / "adapter")
    merge(folder, folder / "adapter", folder / "merged", torch.float32)
    _hold_against(policy, AutoModelForCausalLM.from_pretrained(folder / "merged").eval(), rows)


def _hold_against_itself(policy: Policy, rows: list[Row]) -> None:
    """Log-probs and gradients of a pack equal those of the model's own forward passes over single texts."""
    pack = pack_of(policy, rows, [0, 1, 2])
    actual = policy.score(pack).responses
    expected = torch.cat([plain_logps(policy, rows[number]) for number in pack.rows])
    _close(actual, expected, "its own forward pass")
    expected_gradients = gradients(policy, expected.sum())
    for name, gradient in gradients(policy, actual.sum()).items():
        if (gradient - expected_gradients[name]).norm() > 1e-2 * expected_gradients[name].norm() + 1e-4:
            raise Wrong(f"the gradient of {name} differs")
    if not any(gradient.any() for gradient in expected_gradients.values()):
        raise Wrong("nothing has a gradient")


def _close(actual: Tensor, expected: Tensor, source: str) -> None:
    if not bool(((actual - expected).abs() <= 1e-4 * expected.abs().clamp(min=1)).all()):
        raise Wrong(f"{actual.tolist()}, where {source} says {expected.tolist()}")


def row(kind: str) -> str:
    """The line of the table for a type."""
    torch.set_num_threads(1)
    cells = []
    with written(kind) as model:
        for quantization in QUANTISATIONS:
            state, reason = outcome(model, quantization)
            cells.append(f"{STATES[state]}{': ' if reason else ''}{reason}".rstrip("."))
    unquantised, *quantised = (cell.replace("|", "\\|") for cell in cells)
    other_cells = ["the same" if cell == unquantised else cell for cell in quantised]
    return f"| `{kind}` | {' | '.join([unquantised, *other_cells])} |"


def table(rows: Iterable[str]) -> str:
    """The generated part of docs/models.md, between its two marks."""
    rows = list(rows)
    exact, slower, refused = (sum(f"` | {state}" in line for line in rows) for state in STATES.values())
    summary = (
        f"transformers {transformers_version} has {len(rows)} causal types. {exact} are exact, {slower} of them in a "
        f"slower way; {refused} are refused."
    )
    head = ["| type | unquantised | nf4 | int8 |", "|---|---|---|---|"]
    return "\n".join([BEGIN, summary, "", *head, *rows, END])


def main() -> None:
    with ProcessPoolExecutor(2) as pool:
        new_table = table(pool.map(row, TYPES))
    before, _, rest = PLACE.read_text().partition(BEGIN)
    PLACE.write_text(before + new_table + rest.partition(END)[2])


if __name__ == "__main__":
    main()
