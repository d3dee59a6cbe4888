"""The answers of a side. They come from its model, from a file, or from the data."""

import gc
from dataclasses import replace

from app.spec.datasets.check import numbered_examples
from app.spec.datasets.example import Example
from app.spec.evaluation import BestOf, Side
from worker.trainer.data import answer_text, prompt_text
from worker.trainer.errors import UserError
from worker.trainer.evaluation.run import EvaluationRun
from worker.trainer.sampling import text_of
from worker.trainer.sides.completions import Assignment, CompletionKey, complete, prompts_of
from worker.trainer.sides.scorers import scores

FIXED = -1.0
"""Stands for the temperature of an answer that was not sampled."""


def answers_of(run: EvaluationRun, name: str, side: Side, rows: dict[int, Example]) -> dict[CompletionKey, str]:
    """The answers of the side `name`, by temperature, row and number."""
    if side.answers is not None:
        index = 0 if side.answers == "chosen" else -1
        return {
            (FIXED, row, 0): answer_text(example.responses[index]) for row, example in rows.items() if example.desirable
        }
    if side.file is not None:
        return _answers_of_file(run, name, side, rows)
    assert run.spec.sampling is not None
    policy = run.load(name)
    prompts = prompts_of(run, policy, name, rows, run.spec.sampling.max_tokens)
    texts = {
        completion.key: text_of(policy, completion, prompts[completion.row], rows[completion.row])
        for completion in complete(run, policy, name, prompts, assignment_of(run, name))
    }
    del policy
    return {key: texts[best] for key, best in choose_best(run, name, side.best_of, texts, rows).items()}


def assignment_of(run: EvaluationRun, name: str) -> Assignment:
    """The completions that the side `name` is to write. The two sides of `win_rate` count together."""
    own = _assignment(run, name)
    if run.spec.type != "win_rate":
        return own
    writing = [side for side in ("candidate", "baseline") if getattr(run.spec, side).model is not None]
    return replace(own, of_all=sum(_assignment(run, side).each for side in writing))


def _assignment(run: EvaluationRun, name: str) -> Assignment:
    side, sampling = getattr(run.spec, name), run.spec.sampling
    assert sampling is not None
    samples = sampling.samples * (side.best_of.n if side.best_of is not None else 1)
    return Assignment(sampling, samples, stream=name == "baseline")


def choose_best(
    run: EvaluationRun, name: str, best_of: BestOf | None, texts: dict[CompletionKey, str], rows: dict[int, Example]
) -> dict[CompletionKey, CompletionKey]:
    """The completions that count, by temperature, row and number. With best-of-n, the best of each `n` completions."""
    if best_of is None:
        return {key: key for key in texts}
    gc.collect()  # frees the sampled model before the scorer is loaded
    keys = sorted(texts)
    values = scores(run, best_of.by, f"{name}.best_of.by", [(rows[key[1]], texts[key]) for key in keys])
    best: dict[CompletionKey, tuple[float, CompletionKey]] = {}
    for key, value in zip(keys, values, strict=True):
        temperature, row, number = key
        group = temperature, row, number // best_of.n  # n consecutive completions compete
        if group not in best or value > best[group][0]:
            best[group] = value, key
    return {group: key for group, (_, key) in best.items()}


def _answers_of_file(run: EvaluationRun, name: str, side: Side, rows: dict[int, Example]) -> dict[CompletionKey, str]:
    """The answers of the side's file. Row `k` of the file answers the prompt of row `k` of the data.

    Raises `UserError` for an answer to another prompt. Warns of rows without an answer.
    """
    assert side.file is not None
    with (run.folder / side.file).open("rb") as file:
        answers = {row: example for row, example in numbered_examples(file, side.mapping) if row in rows}
    for row, example in answers.items():
        if prompt_text(example) != prompt_text(rows[row]):
            message = f"Line {example.line}: the answer is to another prompt than the one in the data."
            raise UserError("invalid_file", message, f"{name}.file")
    if len(answers) < len(rows):
        text = f"{name}: {len(rows) - len(answers)} of {len(rows)} rows have no answer and are left out."
        run.events.message(text, level="warn")
    return {(FIXED, row, 0): answer_text(example.responses[0]) for row, example in answers.items()}
