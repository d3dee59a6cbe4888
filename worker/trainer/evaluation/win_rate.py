"""The type `win_rate`: whose answers does the judge prefer, the candidate's or the baseline's?"""

from worker.trainer.evaluation.answers import FIXED, answers_of
from worker.trainer.evaluation.judging import judge
from worker.trainer.evaluation.rows import Item, examples_of, prompt_numbers, row_fields
from worker.trainer.evaluation.run import EvaluationRun


def items(run: EvaluationRun) -> list[Item]:
    """The answers of both sides to each row, and what the judge says of them."""
    rows = examples_of(run)
    # Given answers come first: what is wrong with them is said before anything is sampled.
    order = sorted(("candidate", "baseline"), key=lambda name: getattr(run.spec, name).model is not None)
    answers = {name: answers_of(run, name, getattr(run.spec, name), rows) for name in order}
    known = {key for given in answers.values() for key in given}
    sampled = sorted(key for key in known if key[0] != FIXED)
    numbers = prompt_numbers(rows)
    items: list[Item] = []
    for temperature, row, number in sampled or sorted(known):
        pair = {
            name: given.get((temperature, row, number), given.get((FIXED, row, 0))) for name, given in answers.items()
        }
        if all(answer is not None for answer in pair.values()):
            shown = None if temperature == FIXED else temperature
            fields = row_fields(rows[row], row, numbers[row])
            items.append({**fields, "temperature": shown, "sample": number, **pair})
    judge(run, items, rows)
    return items
