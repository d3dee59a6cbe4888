"""The judge's verdict on two answers to a prompt. It scores each answer, or it is asked which one is better."""

from app.spec.datasets.example import Example, Kind
from app.spec.evaluation import Judge, SamplingSpec
from worker.judges.questions import questions, verdicts
from worker.trainer.data import Recipe, prompt_ids
from worker.trainer.evaluation.completions import complete
from worker.trainer.evaluation.rows import Item
from worker.trainer.evaluation.run import JUDGE, EvaluationRun, context_of
from worker.trainer.evaluation.scorers import scores
from worker.trainer.rendering import Renderer
from worker.trainer.sampling import Prompt

JUDGE_TOKENS = 512
"""Maximum tokens of the answer of a model that is asked as a judge."""
MAX_PROMPT_TOKENS = 1 << 30
"""Large enough that no question is cut. A question that is too long is left out."""


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
    """Ask a model which answer of each item it prefers. It gets the questions of an endpoint, and decodes greedily."""
    sides = run.spec.answer_names
    # (index of the item, question). An item has two questions, or none if its answers are identical.
    numbered_questions = [(number, text) for number, item in enumerate(items) for text in questions(judge, item, sides)]
    policy = run.load(JUDGE)
    room = context_of(policy) - JUDGE_TOKENS
    renderer, prompts = Renderer(policy.tokenizer, run.rendering(JUDGE)), dict[int, Prompt]()
    for index, (_, text) in enumerate(numbered_questions):
        example = Example(0, [{"role": "user", "content": text}], ())
        prompt = Prompt(*prompt_ids(example, renderer, Recipe(Kind.RANKED, MAX_PROMPT_TOKENS)))
        if len(prompt.ids) <= room:
            prompts[index] = prompt
    count = len(numbered_questions)
    if len(prompts) < count:
        text = f"{count - len(prompts)} of {count} questions do not fit into the judge's context."
        run.events.message(text, level="warn")
    greedy = SamplingSpec(temperatures=[0.0], max_tokens=JUDGE_TOKENS)
    texts = {
        completion.row: policy.tokenizer.decode(completion.ids, skip_special_tokens=True)
        for completion in complete(run, policy, JUDGE, prompts, greedy)
    }
    judgements: list[list[str | None]] = [[] for _ in items]
    for index, (number, _) in enumerate(numbered_questions):
        judgements[number].append(texts.get(index))
    for item, answers in zip(items, judgements, strict=True):
        item |= {"asked": bool(answers), "verdicts": verdicts(answers, sides), "judgements": answers}
