"""The evaluation type `win_rate`: does the judge prefer the candidate's answers or the baseline's?"""

from worker.trainer.evaluation.answers import FIXED, answers_of
from worker.trainer.evaluation.judging import judge
from worker.trainer.evaluation.run import EvaluationRun
from worker.trainer.sides.rows import Item, examples_of, prompt_numbers, row_fields


def items(run: EvaluationRun) -> list[Item]:
    """One item per row, temperature and sample: the answers of both sides, and the judge's preference."""
    rows = examples_of(run)
    # Answers that are not sampled are read first: an error in them is reported before the long sampling.
    order = sorted(("candidate", "baseline"), key=lambda name: getattr(run.spec, name).model is not None)
    answers = {name: answers_of(run, name, getattr(run.spec, name), rows) for name in order}
    keys = {key for side_answers in answers.values() for key in side_answers}
    sampled = sorted(key for key in keys if key[0] != FIXED)
    numbers = prompt_numbers(rows)
    items: list[Item] = []
    for temperature, row, number in sampled or sorted(keys):
        # A fixed answer is compared with every sampled answer to its row.
        pair = {
            name: side_answers.get((temperature, row, number), side_answers.get((FIXED, row, 0)))
            for name, side_answers in answers.items()
        }
        if all(answer is not None for answer in pair.values()):
            fields = row_fields(rows[row], row, numbers[row])
            item_temperature = None if temperature == FIXED else temperature
            items.append({**fields, "temperature": item_temperature, "sample": number, **pair})
    judge(run, items, rows)
    return items
