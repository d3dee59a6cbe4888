"""The outcome for every causal model type of transformers: a tiny random model is loaded and scored as a job would.

`python -m tests.helpers.model_table` writes the table of docs/models.md, a test holds it up to date.
"""

import io
import json
import re
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
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
    """A model that the check before training let pass, and that is not exact."""


def outcome(kind: str, quantization: str, **changes: Any) -> tuple[str, str]:
    """Whether the type `kind` is exact with shared prompts, exact in a slower way, or refused; and the reason.

    `changes` are made to its configuration.

    Raises `Wrong` for a model that would train on wrong figures, and whatever else is not a refusal.
    """
    stream = io.StringIO()
    with TemporaryDirectory() as name:
        folder = Path(name)
        reason = write(kind, folder, changes)
        if reason is not None:
            _must_be_refused(folder, quantization)
            return "refused", of_any_day(f"transformers itself cannot make a model of it: {reason}.", folder)
        try:
            policy = load(folder, stream=stream, quantization=quantization)
            rows = [within(row, policy) for row in ROWS]
            check(policy, rows, Events(stream))
        except UserError as error:
            return "refused", of_any_day(error.message, folder)
        if quantization == "none":
            _hold_against(policy, AutoModelForCausalLM.from_pretrained(folder).eval(), rows)
        _hold_against_itself(disturb(policy, scale=0.02), rows)
        if quantization == "none":
            _hold_against_its_merge(policy, folder, rows)
    said = [event["message"] for event in map(json.loads, stream.getvalue().splitlines()) if event["level"] == "warn"]
    return ("shared" if policy.shared else "alone"), of_any_day(" ".join(said), folder)


def write(kind: str, folder: Path, changes: dict[str, Any]) -> str | None:
    """A model of the type in `folder`; or its configuration alone and the reason, where transformers cannot make one."""
    make_tokenizer().save_pretrained(folder)
    try:
        tiny_model(kind, **changes).save_pretrained(folder)
    except Exception as error:
        return first_line(error)
    finally:
        tiny_config(kind, **changes).save_pretrained(
            folder
        )  # a model that also sees is saved with the one of its text alone
    return None


def _must_be_refused(folder: Path, quantization: str) -> None:
    try:
        load(folder, quantization=quantization)
    except UserError:
        return
    raise Wrong("it was loaded")


def within(row: Row, policy: Policy) -> Row:
    """`row` in tokens that the model has."""
    size = min(policy.causal.config.get_text_config().vocab_size, 300)

    def fit(ids: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(token % size for token in ids)

    return replace(row, prompt=fit(row.prompt), responses=tuple(replace(r, ids=fit(r.ids)) for r in row.responses))


def of_any_day(message: str, folder: Path) -> str:
    """A message without what changes from run to run."""
    return re.sub(r"\b0x[0-9a-f]{6,}", "…", message.replace(str(folder), "the folder"))


def _hold_against(policy: Policy, model: Any, rows: list[Row]) -> None:
    """The policy is `model`, as transformers alone loads and runs it; with a fresh adapter that is the base model."""
    with torch.no_grad():
        for row in rows:
            found = policy.score(pack_of(policy, [row], [0])).responses
            expected = []
            for response in row.responses:
                ids = torch.tensor([row.prompt + response.ids])
                logps = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1).gather(1, ids[0, 1:, None])
                chosen = torch.tensor((False,) * len(row.prompt) + response.scored)[1:]
                expected.append(logps[:, 0][chosen].sum())
            _close(found, torch.stack(expected), "transformers alone")


def _hold_against_its_merge(policy: Policy, folder: Path, rows: list[Row]) -> None:
    """The merged model, as transformers alone loads and runs it, says what the policy says."""
    policy.save(folder / "adapter")
    merge(folder, folder / "adapter", folder / "merged", torch.float32)
    _hold_against(policy, AutoModelForCausalLM.from_pretrained(folder / "merged").eval(), rows)


def _hold_against_itself(policy: Policy, rows: list[Row]) -> None:
    """Log-probs and gradients of packs are those of the model's own passes over one text each."""
    pack = pack_of(policy, rows, [0, 1, 2])
    found = policy.score(pack).responses
    expected = torch.cat([plain_logps(policy, rows[number]) for number in pack.rows])
    _close(found, expected, "its own forward pass")
    theirs = gradients(policy, expected.sum())
    for name, gradient in gradients(policy, found.sum()).items():
        if (gradient - theirs[name]).norm() > 1e-2 * theirs[name].norm() + 1e-4:
            raise Wrong(f"the gradient of {name} differs")
    if not any(gradient.any() for gradient in theirs.values()):
        raise Wrong("nothing has a gradient")


def _close(found: Tensor, expected: Tensor, whom: str) -> None:
    if not bool(((found - expected).abs() <= 1e-4 * expected.abs().clamp(min=1)).all()):
        raise Wrong(f"{found.tolist()}, where {whom} says {expected.tolist()}")


def row(kind: str) -> str:
    """The line of the table for a type."""
    torch.set_num_threads(1)
    cells = []
    for quantization in QUANTISATIONS:
        state, reason = outcome(kind, quantization)
        cells.append(f"{STATES[state]}{': ' if reason else ''}{reason}".rstrip("."))
    plain, *quantised = (cell.replace("|", "\\|") for cell in cells)
    others = ["the same" if cell == plain else cell for cell in quantised]
    return f"| `{kind}` | {' | '.join([plain, *others])} |"


def table(rows: Iterable[str]) -> str:
    """The part of docs/models.md that is made, between its two marks."""
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
        made = table(pool.map(row, TYPES))
    before, _, rest = PLACE.read_text().partition(BEGIN)
    PLACE.write_text(before + made + rest.partition(END)[2])


if __name__ == "__main__":
    main()
