"""The evaluation type `reward_kl`: the true reward of the candidate's completions against their KL to the reference.

This is the frontier of Rafailov et al. 2023, arXiv:2305.18290, Fig. 2 (left).
"""

from app.spec.datasets.example import Example
from worker.trainer import dataset, exactness, reference
from worker.trainer.data import Response, Row, prompt_text
from worker.trainer.errors import UserError
from worker.trainer.evaluation.answers import assignment_of, choose_best
from worker.trainer.evaluation.run import JUDGE, EvaluationRun
from worker.trainer.launcher import Launcher
from worker.trainer.sampling import Completion, text_of
from worker.trainer.sides.completions import CompletionKey, complete, prompts_of
from worker.trainer.sides.rows import Item, examples_of, prompt_numbers
from worker.trainer.sides.scorers import scores


def items(run: EvaluationRun) -> list[Item]:
    """One item per completion of the candidate: its log-probs under candidate and baseline, and the judge's reward.

    With best-of-n, an item has the upper bound of the KL divergence instead of the baseline's log-prob.
    """
    side, sampling, rows = run.spec.candidate, run.spec.sampling, examples_of(run)
    assert side is not None
    assert sampling is not None
    # 1. Sample the completions.
    policy = run.load("candidate")
    prompts = prompts_of(run, policy, "candidate", rows, sampling.max_tokens)
    completions, texts = dict[CompletionKey, Completion](), dict[CompletionKey, str]()
    for completion in complete(run, policy, "candidate", prompts, assignment_of(run, "candidate")):
        completions[completion.key] = completion
        texts[completion.key] = text_of(policy, completion, prompts[completion.row], rows[completion.row])
    vocabulary = policy.tokenizer.get_vocab()
    del policy
    # 2. Choose those that count.
    best = choose_best(run, "candidate", side.best_of, texts, rows)
    groups, numbers = sorted(best), prompt_numbers(rows)
    items = [
        _completion_fields(completions[best[group]], rows[group[1]], texts[best[group]])
        | {"sample": group[2], "prompt_number": numbers[group[1]], "logp": completions[best[group]].logp}
        for group in groups
    ]
    # 3. Score them with the baseline.
    if side.best_of is not None:
        for item in items:
            item["kl_bound"] = side.best_of.kl_bound
    else:
        answers = dataset.Rows.of(
            Row(rows[key[1]].line, prompts[key[1]].ids, (_response(completions[key]),)) for key in groups
        )
        for item, logp in zip(items, _reference_logps(run, answers, vocabulary), strict=True):
            item["reference_logp"] = logp
    # 4. Score them with the judge.
    if run.spec.judge is not None:
        answered = [(rows[group[1]], texts[best[group]]) for group in groups]
        for item, reward in zip(items, scores(run, run.spec.judge, JUDGE, answered), strict=True):
            item["reward"] = reward
    return items


def _response(completion: Completion) -> Response:
    """The completion as a response with every token scored."""
    return Response(completion.ids, (True,) * len(completion.ids))


def _reference_logps(run: EvaluationRun, answers: dataset.Rows, vocabulary: dict[str, int]) -> list[float]:
    """The log-probs of the completions `answers` under the baseline, in nats.

    Raises `UserError` if its vocabulary is not that of the candidate, `vocabulary`.
    """
    policy = run.load("baseline")
    if policy.tokenizer.get_vocab() != vocabulary:
        message = "Candidate and baseline have different tokenizers, so the KL between them is not defined."
        raise UserError("invalid_value", message, "baseline.model")
    exactness.check(policy, answers, run.events, run.ranks)
    launcher = Launcher(policy, run.ranks)
    logps: list[float] = reference.compute(launcher, answers, report=lambda _: run.check_stop()).logps.tolist()
    return logps


def _completion_fields(completion: Completion, example: Example, text: str) -> Item:
    return {
        "line": example.line, "row": completion.row, "temperature": completion.temperature,
        "sample": completion.sample, "prompt": prompt_text(example), "text": text, "tokens": len(completion.ids),
        "ended": completion.ended,
    }  # fmt: skip
