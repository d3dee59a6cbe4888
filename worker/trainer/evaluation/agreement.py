"""The evaluation type `agreement`: does the judge prefer the answers that people prefer?"""

from worker.trainer.data import answer_text
from worker.trainer.evaluation.judging import judge
from worker.trainer.evaluation.run import EvaluationRun
from worker.trainer.sides.rows import Item, examples_of, prompt_numbers, row_fields


def items(run: EvaluationRun) -> list[Item]:
    """One item per prompt and pair of answers: the votes of people for each answer, and the judge's preference.

    Rows with the same prompt and the same two answers are the votes of several people. `first` and `second` are the
    answers in alphabetical order, so the names do not reveal which one is preferred.
    """
    rows = examples_of(run)
    numbers = prompt_numbers(rows)
    items: dict[tuple[int, str, str], Item] = {}
    for row, example in rows.items():
        chosen, rejected = answer_text(example.responses[0]), answer_text(example.responses[-1])
        first, second = sorted((chosen, rejected))
        fields = {"first": first, "second": second, "votes": [0, 0]}
        key = numbers[row], first, second
        item = items.setdefault(key, row_fields(example, row, numbers[row]) | fields)
        item["votes"][chosen != first] += 1  # [votes for `first`, votes for `second`]
    judge(run, list(items.values()), rows)
    return list(items.values())
