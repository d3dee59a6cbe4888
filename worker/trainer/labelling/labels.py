"""The labels of a labelling's answers by models of the service, and by graders."""

from hashlib import sha256

from worker import comparisons
from worker.trainer.data import batched
from worker.trainer.grading import Grading
from worker.trainer.labelling.prompts import Prompt
from worker.trainer.labelling.run import LabellingRun
from worker.trainer.sides.asking import ask
from worker.trainer.sides.rows import Item
from worker.trainer.sides.scorers import scores

GRADED_TOGETHER = 64
"""Number of prompts whose answers are graded between two looks whether to stop."""


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
    questions = [
        question
        for item, answers in zip(items, texts, strict=True)
        for question in comparisons.all_questions(judge, item["prompt"], answers)
    ]
    # Replies are kept by the numbers of their questions. Those to other questions have another name.
    side, digest = f"labellers.{number}.judge", sha256("\0".join(questions).encode()).hexdigest()[:16]
    replies = iter(ask(run, side, questions, f"{side}.{digest}"))
    for item, answers in zip(items, texts, strict=True):
        item["labels"][labeller.title] = comparisons.label(judge, item["prompt"], answers, replies)


def _grade(run: LabellingRun, number: int, items: list[Item], prompts: dict[int, Prompt]) -> None:
    labeller, field = run.spec.labellers[number], f"labellers.{number}.grader"
    assert labeller.grader is not None
    sides = [name.removesuffix(".model") for name, _ in run.spec.models() if name.startswith(field)]
    models = [(run.folder / "sides" / side / "base", run.rendering(side)) for side in sides]
    grading = Grading(labeller.grader, run.folder, models, field)
    for stretch in batched(items, GRADED_TOGETHER):
        run.check_stop()
        answered = [(prompts[item["row"]], answer["text"]) for item in stretch for answer in item["answers"]]
        grades = iter(grading.grades(answered, run.ranks))
        for item in stretch:
            rewards = [next(grades).reward for _ in item["answers"]]
            item["labels"][labeller.title] = {"scores": rewards}
