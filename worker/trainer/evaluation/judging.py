"""The judge's verdict on two answers to a prompt. It scores each answer, or it is asked which one is better."""

from app.spec.datasets.example import Example
from app.spec.evaluation import Judge
from worker.judge import questions, verdicts
from worker.trainer.evaluation.run import JUDGE, EvaluationRun
from worker.trainer.sides.asking import ask
from worker.trainer.sides.rows import Item
from worker.trainer.sides.scorers import scores


def judge(run: EvaluationRun, items: list[Item], rows: dict[int, Example]) -> None:
    """Add to each item the lengths of its two answers in characters, and the judge's scores or verdicts.

    A judge behind an endpoint is asked later by the runner, because the trainer has no network.
    """
    judge, sides = run.spec.judge, run.spec.answer_names
    for item in items:
        item |= {f"{side}_characters": len(item[side]) for side in sides}
    if judge is None or judge.endpoint is not None:
        return
    if judge.asked:
        _ask(run, judge, items)
        return
    for side in sides:
        rewards = scores(run, judge, JUDGE, [(rows[item["row"]], item[side]) for item in items])
        for item, reward in zip(items, rewards, strict=True):
            item[f"{side}_reward"] = reward


def _ask(run: EvaluationRun, judge: Judge, items: list[Item]) -> None:
    """Ask a model which answer of each item it prefers. It gets the questions of an endpoint."""
    sides = run.spec.answer_names
    # (index of the item, question). An item has two questions, or none if its answers are identical.
    numbered_questions = [(number, text) for number, item in enumerate(items) for text in questions(judge, item, sides)]
    judgements: list[list[str | None]] = [[] for _ in items]
    replies = ask(run, JUDGE, [text for _, text in numbered_questions])
    for (number, _), reply in zip(numbered_questions, replies, strict=True):
        judgements[number].append(reply)
    for item, answers in zip(items, judgements, strict=True):
        item |= {"asked": bool(answers), "verdicts": verdicts(answers, sides), "judgements": answers}
