"""The evaluation type `preference`: does the candidate rank the pairs of the data as people did?"""

from collections import Counter
from dataclasses import dataclass

from app.spec.datasets.example import Kind
from worker.trainer import dataset, exactness, reference
from worker.trainer.alike import require_same_rows
from worker.trainer.data import Recipe
from worker.trainer.errors import UserError
from worker.trainer.evaluation.run import EvaluationRun
from worker.trainer.launcher import Launcher
from worker.trainer.sides.rows import Item, draw_rows

PairKey = tuple[int, int]
"""(line of the pair, index of the pair among those of the line)."""


@dataclass(frozen=True)
class ScoredPair:
    """A pair under one model. The tuples are (chosen answer, rejected answer)."""

    logps: tuple[float, float]
    """In nats."""
    tokens: tuple[int, int]
    """Numbers of scored tokens."""
    prompt_number: int


def items(run: EvaluationRun) -> list[Item]:
    """One item per pair, with the margin of the implicit rewards (Rafailov et al. 2023, arXiv:2305.18290, Eq. 5).

    margin = r̂_w − r̂_l, where r̂ = β log(π/π_ref): π is the candidate and π_ref the baseline.
    """
    candidate, baseline = score_pairs(run, "candidate"), score_pairs(run, "baseline")
    beta: float = run.about["beta"]
    items = []
    for key in sorted(candidate.keys() & baseline.keys()):
        pair = candidate[key]
        (chosen, rejected), (reference_chosen, reference_rejected) = pair.logps, baseline[key].logps
        items.append(
            {
                "line": key[0],
                "prompt_number": pair.prompt_number,
                "margin": beta * ((chosen - reference_chosen) - (rejected - reference_rejected)),
                "logps": [chosen, rejected],
                "reference_logps": [reference_chosen, reference_rejected],
                "tokens": list(pair.tokens),
            }
        )
    return items


def score_pairs(run: EvaluationRun, side: str) -> dict[PairKey, ScoredPair]:
    """The log-probs of all drawn pairs under the model of a side. Raises `UserError` if no pair is left."""
    policy = run.load(side)
    recipe = Recipe(Kind.PREFERENCE, run.max_length(policy), mapping=run.spec.mapping, rendering=run.rendering(side))
    rows, _ = run.ranks.first_then_others(
        lambda: dataset.load(run.folder / run.spec.data, policy.tokenizer, recipe, run.cache)
    )
    require_same_rows(run.ranks, [rows])
    if not len(rows):
        raise UserError("invalid_file", "No row of the data is left to evaluate.", "data")
    pairs_of_line, keys = Counter[int](), list[PairKey]()
    for line in rows.lines:
        keys.append((line, pairs_of_line[line]))  # a ranked list of a line becomes several pairs
        pairs_of_line[line] += 1
    dataset.require_embedded(rows, policy.tokenizer, policy.causal.config, policy.name)
    drawn = draw_rows(run, keys)  # at most `max_rows` pairs
    rows, keys = rows.where([key in drawn for key in keys]), [key for key in keys if key in drawn]
    exactness.check(policy, rows, run.events, run.ranks)
    launcher, digest = Launcher(policy, run.ranks), run.ranks.of_first(policy.digest)
    references = reference.find_or_compute(launcher, digest, rows, None, run.cache, lambda _: run.check_stop())
    prompt_numbers: dict[int, int] = {}
    pairs = {}
    for number, (key, row, prompt) in enumerate(zip(keys, rows, rows.prompts().tolist(), strict=True)):
        chosen, rejected = references.logps[references.first[number] :][:2].tolist()  # nats
        tokens = sum(row.responses[0].scored), sum(row.responses[1].scored)
        prompt_number = prompt_numbers.setdefault(prompt, len(prompt_numbers))
        pairs[key] = ScoredPair((chosen, rejected), tokens, prompt_number)
    return pairs
