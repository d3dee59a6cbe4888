"""Every metric that a job reports: its meaning, the better direction, its unit, and where it is shown.

Training jobs report `TRAINING` and `VALIDATION`, evaluations report `EVALUATION`, `ENDPOINT` and `BEST_OF`, labellings
report `LABELLING`.
Gates, early stopping, sweeps, progress lines and the docs read these tables. A new metric is one entry here.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Better = Literal["lower", "higher"]
Trait = Literal["tokens", "rewards", "pairs", "kl", "logps", "reference", "rollouts"]
"""A property of a stage that decides which metrics it reports: see `Hyperparameters.traits`."""


@dataclass(frozen=True)
class Metric:
    """A number by which jobs are watched, gated and compared."""

    meaning: str
    better: Better | None = None
    """The better direction; None if that depends."""
    unit: str = ""
    validated: bool = False
    """Whether validations report it too, as `eval/NAME`."""
    summary: bool = False
    """Whether the one-line summary of a step or an evaluation shows it."""
    chart: str = ""
    """The title of the training chart that draws it together with `eval/NAME`; empty if no chart does."""
    stops: bool = False
    """Whether early stopping may watch it on the validation rows."""
    needs: Trait | None = None
    """Only stages with this trait report it; None if all stages do."""
    trained: bool = True
    """Whether steps report it. If not, only validations do."""


TRAINING = {
    "loss": Metric("The loss of the stage.", "lower", validated=True, summary=True, chart="Loss", stops=True),
    "rewards/chosen": Metric(
        "The mean reward of the chosen answers.", "higher", validated=True, chart="Rewards", needs="rewards"
    ),
    "rewards/rejected": Metric(
        "The mean reward of the rejected answers.", "lower", validated=True, chart="Rewards", needs="rewards"
    ),
    "rewards/margins": Metric(
        "The chosen answer's reward minus the rejected one's.",
        "higher",
        validated=True,
        summary=True,
        chart="Margins",
        stops=True,
        needs="pairs",
    ),
    "rewards/accuracies": Metric(
        "The share of pairs in which the chosen answer has the higher reward.",
        "higher",
        unit="share",
        validated=True,
        summary=True,
        chart="Reward accuracy",
        stops=True,
        needs="rewards",
    ),
    "rewards/longer_preferred": Metric(
        "How often the longer answer has the higher reward.", unit="share", validated=True, needs="pairs"
    ),
    "logps/chosen": Metric("log π of the chosen answers.", "higher", unit="nats", validated=True, needs="logps"),
    "logps/rejected": Metric("log π of the rejected answers.", unit="nats", validated=True, needs="logps"),
    "logratios/chosen": Metric(
        "log π/π_ref of the chosen answers.",
        "higher",
        unit="nats",
        validated=True,
        chart="Log ratios",
        needs="reference",
    ),
    "logratios/rejected": Metric(
        "log π/π_ref of the rejected answers.",
        "lower",
        unit="nats",
        validated=True,
        chart="Log ratios",
        needs="reference",
    ),
    "gradient_weight": Metric(
        "The weight of a pair in the gradient: σ(−margin) for DPO (Rafailov et al. 2023, Sec. 4).",
        validated=True,
        needs="rewards",
    ),
    "mean_token_accuracy": Metric(
        "The share of tokens that are the model's likeliest choice.",
        "higher",
        unit="share",
        validated=True,
        summary=True,
        chart="Token accuracy",
        stops=True,
        needs="tokens",
    ),
    "entropy": Metric(
        "The entropy of the next-token distribution.", unit="nats", validated=True, needs="tokens", trained=False
    ),
    "reward": Metric(
        "The mean reward of the answers that the model writes.",
        "higher",
        validated=True,
        summary=True,
        chart="Reward",
        stops=True,
        needs="rollouts",
    ),
    "kl": Metric(
        "The estimate of the KL divergence from the reference, per answer.",
        "lower",
        unit="nats",
        validated=True,
        chart="KL",
        needs="kl",
    ),
    "rollouts/reward_std": Metric(
        "The mean standard deviation of the rewards of a prompt's answers.", needs="rollouts"
    ),
    "rollouts/without_signal": Metric(
        "The share of prompts whose answers all have the same reward.", "lower", unit="share", needs="rollouts"
    ),
    "rollouts/ungraded": Metric(
        "The share of prompts that are left out, because an answer could not be graded.",
        "lower",
        unit="share",
        validated=True,
        needs="rollouts",
    ),
    "rollouts/tokens": Metric("The mean length of an answer.", unit="tokens", validated=True, needs="rollouts"),
    "rollouts/ended": Metric(
        "The share of answers that end within `max_tokens`.", "higher", unit="share", validated=True, needs="rollouts"
    ),
    "rollouts/entropy": Metric(
        "−log π of an answer per token, which estimates the entropy.", unit="nats", validated=True, needs="rollouts"
    ),
    "rollouts/clipped": Metric(
        "The share of answers, for GRPO and PPO of tokens, whose ratio of probabilities is clipped.",
        unit="share",
        needs="rollouts",
    ),
    "rollouts/value_loss": Metric(
        "The loss of PPO's value head: half the squared error of its estimates.", "lower", needs="rollouts"
    ),
    "rollouts/mismatch": Metric(
        "log π of an answer by the sampler minus that by the kernels of training, per token: 0 if they agree.",
        unit="nats",
        needs="rollouts",
    ),
    "grad_norm": Metric("The norm of the gradient before it is clipped."),
    "learning_rate": Metric("The learning rate of the step."),
    "fill_rate": Metric("The share of positions in a step's packs that hold tokens.", "higher", unit="share"),
    "tokens_per_second": Metric("Distinct tokens trained per second.", "higher", unit="tokens/s"),
    "mfu": Metric(
        "The FLOP/s that a step needs, as a share of the device's measured peak. Mixtures of experts have none.",
        "higher",
        unit="share",
    ),
    "peak_memory_bytes": Metric("The peak memory use so far.", "lower", unit="bytes"),
}
"""The metrics of each step of a training, by name (TRL's, where it has one)."""
VALIDATION = {f"eval/{name}": metric for name, metric in TRAINING.items() if metric.validated}
"""The metrics of each validation."""
STEPS = {name: metric for name, metric in TRAINING.items() if metric.trained}
METRICS = STEPS | VALIDATION


def measured(traits: Collection[Trait], *, validates: bool) -> list[str]:
    """The names of the metrics that a stage with `traits` reports. `validates`: whether it has validation rows."""
    registry = METRICS if validates else STEPS
    return [name for name, metric in registry.items() if metric.needs is None or metric.needs in traits]


SUMMARY = tuple(
    name for plain, metric in TRAINING.items() if metric.summary
    for name in (plain, f"eval/{plain}")
)  # fmt: skip
"""The metrics in the one-line summary of a step."""
CHARTS: dict[str, list[str]] = {}
"""The metrics of each training chart, by its title. Charts are shown in this order."""
for _name, _metric in TRAINING.items():
    if _metric.chart:
        CHARTS.setdefault(_metric.chart, []).extend([_name, f"eval/{_name}"])


@dataclass(frozen=True)
class EvaluationMetric(Metric):
    """A metric of an evaluation."""

    types: tuple[str, ...] = ()
    """The evaluation types that report it."""
    interval: bool = True
    """Whether `NAME/error`, `NAME/low` and `NAME/high` (95 %) are metrics too."""
    judged: bool = False
    """Whether it needs a judge."""
    asked: bool = False
    """Whether it needs a judge that is asked for a verdict, not one that scores."""


INTERVAL = ("error", "low", "high")
"""The names that a metric's standard error and the bounds of its interval add to its own."""


def _count(meaning: str, *types: str, judged: bool = False, asked: bool = False) -> EvaluationMetric:
    return EvaluationMetric(meaning, unit="count", types=types, interval=False, judged=judged, asked=asked)


_ASKED = ("win_rate", "agreement")
EVALUATION = {
    "accuracy": EvaluationMetric(
        "The share of pairs that the candidate ranks as people did.",
        "higher",
        "share",
        types=("preference",),
        summary=True,
    ),
    "margin": EvaluationMetric(
        "The mean margin of the implicit rewards.", "higher", types=("preference",), summary=True
    ),
    "chosen_logratio": EvaluationMetric("log π/π_ref of the chosen answers.", "higher", "nats", types=("preference",)),
    "rejected_logratio": EvaluationMetric(
        "log π/π_ref of the rejected answers.", "lower", "nats", types=("preference",)
    ),
    "longer_answer_preferred": EvaluationMetric(
        "How often the longer answer is preferred.", unit="share", types=("preference",)
    ),
    "pairs": _count("Pairs compared.", "preference"),
    "calibration/error": EvaluationMetric(
        "Expected calibration error of σ(margin).", "lower", "share", types=("preference",), interval=False
    ),
    "win_rate": EvaluationMetric(
        "How often the candidate's answer wins; a tie counts half.",
        "higher",
        "share",
        types=("win_rate",),
        judged=True,
        summary=True,
    ),
    "longer_answer_wins": EvaluationMetric(
        "How often the longer answer wins.", unit="share", types=("win_rate",), judged=True
    ),
    "candidate_characters": EvaluationMetric(
        "The length of the candidate's answers.", unit="characters", types=("win_rate",)
    ),
    "baseline_characters": EvaluationMetric(
        "The length of the baseline's answers.", unit="characters", types=("win_rate",)
    ),
    "kl": EvaluationMetric(
        "KL(candidate‖baseline) of a completion.", "lower", "nats", types=("reward_kl",), summary=True
    ),
    "tokens": EvaluationMetric("The length of a completion.", unit="tokens", types=("reward_kl",)),
    "reward": EvaluationMetric(
        "The judge's reward of a completion.", "higher", types=("reward_kl",), judged=True, summary=True
    ),
    "completions": _count("Completions sampled.", "reward_kl"),
    "ended": EvaluationMetric(
        "The share of completions that ended with an end-of-sequence token.",
        unit="share",
        types=("reward_kl",),
        interval=False,
    ),
    "comparisons": _count("Pairs of answers compared.", "win_rate", "agreement"),
    "wins": _count("Comparisons that the candidate won.", "win_rate", judged=True),
    "ties": _count("Comparisons that ended in a tie.", "win_rate", judged=True),
    "losses": _count("Comparisons that the baseline won.", "win_rate", judged=True),
    "votes": _count("People's verdicts on pairs.", "agreement"),
    "people_prefer_longer": EvaluationMetric(
        "How often people prefer the longer answer.", unit="share", types=("agreement",)
    ),
    "people_people/agreement": EvaluationMetric(
        "How often two people agree.", "higher", "share", types=("agreement",), summary=True
    ),
    "people_people/kappa": EvaluationMetric("Cohen's κ between two people.", "higher", types=("agreement",)),
    "people_people/cases": _count("Pairs of people's verdicts on the same answers.", "agreement"),
    "judge_people/agreement": EvaluationMetric(
        "How often the judge agrees with a person.", "higher", "share", types=("agreement",), judged=True, summary=True
    ),
    "judge_people/kappa": EvaluationMetric(
        "Cohen's κ between the judge and a person.", "higher", types=("agreement",), judged=True
    ),
    "judge_people/cases": _count("People's verdicts that were compared with the judge's.", "agreement", judged=True),
    "judge_people/without_ties/agreement": EvaluationMetric(
        "How often the judge agrees with a person, without the judge's ties.",
        "higher",
        "share",
        types=("agreement",),
        judged=True,
    ),
    "judge_people/without_ties/kappa": EvaluationMetric(
        "Cohen's κ between the judge and a person, without the judge's ties.",
        "higher",
        types=("agreement",),
        judged=True,
    ),
    "judge_people/without_ties/cases": _count(
        "People's verdicts on pairs where the judge did not say tie.", "agreement", judged=True
    ),
    "judge_prefers_longer": EvaluationMetric(
        "How often the judge prefers the longer answer.", unit="share", types=("agreement",), judged=True
    ),
    "first_shown_preferred": EvaluationMetric(
        "How often the judge prefers the answer that it reads first.",
        unit="share",
        types=_ASKED,
        judged=True,
        asked=True,
    ),
    "identical": _count(
        "Pairs of identical answers; the judge is not asked about them.", *_ASKED, judged=True, asked=True
    ),
    "unparseable": _count("Replies of the judge without a verdict.", *_ASKED, judged=True, asked=True),
    "inconsistent": _count(
        "Pairs whose verdict changes with the order of the answers.", *_ASKED, judged=True, asked=True
    ),
}
"""The metrics of an evaluation, by name."""
ENDPOINT = {
    "judge/answers": _count("Replies of the judge's endpoint."),
    "judge/input_tokens": _count("Tokens that the endpoint read."),
    "judge/output_tokens": _count("Tokens that the endpoint wrote."),
    "judge/cost": Metric("The cost of these tokens, in the currency of `price`.", "lower"),
}
"""The metrics of a judge behind an endpoint. The cost is reported only if its price is given."""

BEST_OF = {
    "n": _count("Answers per prompt, of which the best is chosen."),
    "kl_bound": Metric("The upper bound of best-of-N's KL divergence from its model.", "lower", "nats"),
}
"""The metrics of a side with `best_of`, as `best_of/SIDE/NAME`."""


def figures_of(kind: str, *, judged: bool, asked: bool) -> list[str]:
    """The names of the metrics that an evaluation of the type `kind` reports, with those of their intervals."""
    metrics = {
        name: metric
        for name, metric in EVALUATION.items()
        if kind in metric.types and (judged or not metric.judged) and (asked or not metric.asked)
    }
    return [*metrics, *_intervals(name for name, metric in metrics.items() if metric.interval)]


@dataclass(frozen=True)
class LabellingMetric(Metric):
    """A metric of a labelling."""

    interval: bool = False
    """Whether `NAME/error`, `NAME/low` and `NAME/high` (95 %) are metrics too."""
    asked: bool = False
    """Whether it needs a first labeller that is asked for a verdict, not one that scores."""
    compared: bool = False
    """Whether it compares the first labeller with another one, NAME, as `METRIC@NAME`."""
    endpoint: bool = False
    """Whether it needs an endpoint."""
    people: bool = False
    """Whether it needs people who label."""
    scored: bool = False
    """Whether it needs a first labeller that scores each answer, and does not compare them."""


LABELLING = {
    "prompts": LabellingMetric("Different prompts of the data.", unit="count"),
    "rows": LabellingMetric("Rows of the file: prompts with an order of answers.", "higher", "count", summary=True),
    "answers": LabellingMetric("Different answers to these prompts.", unit="count", summary=True),
    "repeated": LabellingMetric("Answers that repeat another one to the same prompt.", "lower", "count"),
    "missing": LabellingMetric("Answers that a writer did not give.", "lower", "count"),
    "unlabelled": LabellingMetric("Answers to which the first labeller gave no score.", "lower", "count"),
    "score": LabellingMetric("The mean score of an answer by the first labeller.", interval=True, scored=True),
    "margin": LabellingMetric(
        "The score of a row's best answer minus that of its worst.", interval=True, summary=True
    ),
    "longer_preferred": LabellingMetric(
        "How often the longer one of two answers has the higher score.", unit="share", interval=True
    ),
    "agreement": LabellingMetric(
        "How often two labellers order two answers alike.", "higher", "share", interval=True, compared=True
    ),
    "kappa": LabellingMetric(
        "Cohen's κ between two labellers, over all pairs of answers.", "higher", interval=True, compared=True,
        summary=True,
    ),
    "first_shown_preferred": LabellingMetric(
        "How often the judge prefers the answer that it reads first.", unit="share", interval=True, asked=True
    ),
    "unparseable": LabellingMetric("Pairs of answers without a readable verdict.", "lower", "count", asked=True),
    "inconsistent": LabellingMetric(
        "Pairs of answers whose verdict changes with their order.", "lower", "count", asked=True
    ),
    "people/verdicts": LabellingMetric("Verdicts of people.", unit="count", people=True),
    "people/flagged": LabellingMetric("Prompts that people have flagged.", "lower", "count", people=True),
    "people/agreement": LabellingMetric(
        "How often two people order two answers alike.", "higher", "share", interval=True, people=True
    ),
    "people/kappa": LabellingMetric("Cohen's κ between two people.", "higher", interval=True, people=True),
    "endpoints/answers": LabellingMetric("Replies of all endpoints.", unit="count", endpoint=True),
    "endpoints/input_tokens": LabellingMetric("Tokens that the endpoints read.", unit="count", endpoint=True),
    "endpoints/output_tokens": LabellingMetric("Tokens that the endpoints wrote.", unit="count", endpoint=True),
    "endpoints/cost": LabellingMetric(
        "The cost of these tokens at the endpoints that have a `price`, in its currency.", "lower", endpoint=True
    ),
}  # fmt: skip
"""The metrics of a labelling, by name."""


def figures_of_labelling(
    others: Sequence[str], *, asked: bool, scores: bool, people: bool, endpoints: bool, priced: bool
) -> list[str]:
    """The names of the metrics that a labelling reports, with those of their intervals.

    `others` are the names of its labellers after the first one. That is `asked`, or `scores`, or is people.
    """
    names = []
    for name, metric in LABELLING.items():
        reported = (asked or not metric.asked) and (endpoints or not metric.endpoint)
        reported &= (people or not metric.people) and (scores or not metric.scored)
        if not reported or (name == "endpoints/cost" and not priced):
            continue
        plain = [name, *(_intervals([name]) if metric.interval else [])]
        names += [f"{one}@{other}" for other in others for one in plain] if metric.compared else plain
    return names


def _intervals(names: Iterable[str]) -> list[str]:
    return [f"{name}/{suffix}" for name in names for suffix in INTERVAL]
