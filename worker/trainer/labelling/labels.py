"""The labels of a labelling's answers by models of the service, and by graders."""

from worker import comparisons
from worker.answers import too_many_to_compare
from worker.trainer.errors import UserError
from worker.trainer.grading import Grading
from worker.trainer.labelling.prompts import Prompt
from worker.trainer.labelling.run import LabellingRun
from worker.trainer.sides.asking import ask
from worker.trainer.sides.rows import Item
from worker.trainer.sides.scorers import scores


def label(run: LabellingRun, items: list[Item], prompts: dict[int, Prompt]) -> None:
    """Add to each item the labels of all labellers that are here.

    A judge behind an endpoint is asked later by the runner, because the trainer has no network. People come last.
    """
    for number, labeller in enumerate(run.spec.labellers):
        if not labeller.is_local:
            continue
        if labeller.grader is not None:
            _grade(run, number, items, prompts)
        elif labeller.asked:
            _compare(run, number, items)
        else:
            _score(run, number, items, prompts)


def _score(run: LabellingRun, number: int, items: list[Item], prompts: dict[int, Prompt]) -> None:
    labeller = run.spec.labellers[number]
    assert labeller.judge is not None
    answered = [(prompts[item["row"]].example, answer["text"]) for item in items for answer in item["answers"]]
    values = iter(scores(run, labeller.judge, f"labellers.{number}.judge", answered))
    for item in items:
        item["labels"][labeller.title] = {"scores": [next(values) for _ in item["answers"]]}


def _compare(run: LabellingRun, number: int, items: list[Item]) -> None:
    """Ask a model about every two answers. It gets the questions of an endpoint."""
    labeller = run.spec.labellers[number]
    judge = labeller.judge
    assert judge is not None
    texts = [[answer["text"] for answer in item["answers"]] for item in items]
    for item in items:
        if (reason := too_many_to_compare(item)) is not None:
            raise UserError("invalid_value", reason, f"labellers.{number}.judge")
    questions = [
        question
        for item, answers in zip(items, texts, strict=True)
        for question in comparisons.all_questions(judge, item["prompt"], answers)
    ]
    replies = iter(ask(run, f"labellers.{number}.judge", questions))
    for item, answers in zip(items, texts, strict=True):
        item["labels"][labeller.title] = comparisons.label(judge, item["prompt"], answers, replies)


def _grade(run: LabellingRun, number: int, items: list[Item], prompts: dict[int, Prompt]) -> None:
    labeller, field = run.spec.labellers[number], f"labellers.{number}.grader"
    assert labeller.grader is not None
    sides = [name.removesuffix(".model") for name, _ in run.spec.models() if name.startswith(field)]
    models = [(run.folder / "sides" / side / "base", run.rendering(side)) for side in sides]
    grading = Grading(labeller.grader, run.folder, models, field)
    answered = [(prompts[item["row"]], answer["text"]) for item in items for answer in item["answers"]]
    grades = iter(grading.grades(answered, run.ranks))
    for item in items:
        rewards = [next(grades).reward for _ in item["answers"]]
        item["labels"][labeller.title] = {"scores": rewards}
