"""The pages of losses and metrics, and tables of other pages, from the registries of the code."""

from typing import get_args

from app.spec.losses import LOSSES, Loss
from app.spec.metrics import BEST_OF, ENDPOINT, EVALUATION, LABELLING, TRAINING, Metric, Trait
from app.webhooks.schemas import EVENTS, EventType
from docs.generate.markdown import codes, table
from worker.trainer.advice import WARNINGS


def losses() -> str:
    """The table of losses, as Markdown."""
    lines = [
        "# Losses",
        "",
        "Generated from `app/spec/losses.py`. `method.dpo.hyperparameters.loss` takes a name, or a weighted sum.",
        "A job may set the options of its loss. Any other option is refused. `coupled`: the loss of a row depends on",
        "the other rows of its batch. `alone`: the loss cannot be a term of a sum.",
        "",
    ]
    head = ("loss", "name", "paper", "data", "reference", "options and their defaults", "also takes", "notes")
    rows = []
    for name, loss in LOSSES.items():
        options = ", ".join(f"`{option}` {_value(default)}" for option, default in loss.options.items()) or "none"
        cells = (f"`{name}`", loss.title, loss.paper, loss.data.value, "yes" if loss.reference else "no", options)
        rows.append((*cells, _shared_options(loss), _notes(loss)))
    return "\n".join([*lines, table(head, rows)])


def _value(default: float | str | bool) -> str:
    if isinstance(default, bool):
        return str(default).lower()
    return str(default) if isinstance(default, str) else f"{default:g}"


def _shared_options(loss: Loss) -> str:
    return codes(option for option in ("ld_alpha", "use_weighting") if loss.reads(option))


def _notes(loss: Loss) -> str:
    notes = {"coupled": loss.couples, "rewards averaged over tokens": loss.averaged, "alone": loss.alone}
    return ", ".join(note for note, holds in notes.items() if holds)


STAGES: dict[Trait | None, str] = {
    None: "all",
    "tokens": "SFT",
    "rewards": "preference",
    "pairs": "preference, not on labels",
    "kl": "preference on labels, reinforcement",
    "logps": "preference, not reward models",
    "reference": "preference, with a reference",
    "rollouts": "reinforcement",
}
"""The stages that report a metric, by the trait that it needs."""


def metrics() -> str:
    """The tables of metrics, as Markdown."""
    lines = [
        "# Metrics",
        "",
        "Generated from `app/spec/metrics.py`. A gate may name any metric that its job reports.",
        "",
        "## Trainings",
        "",
        "A validation reports the validated metrics as `eval/NAME`. Early stopping can watch those of the last column.",
        "The job object and its gates have the metrics of the last stage.",
        "",
    ]
    rows = []
    for name, metric in TRAINING.items():
        validated = "" if not metric.validated else "yes" if metric.trained else "only"
        rows.append((*_cells(name, metric), STAGES[metric.needs], validated, "yes" if metric.stops else ""))
    lines += [
        table((*HEAD, "stages", "validated", "stops early"), rows),
        "## Evaluations",
        "",
        "A metric with an interval also has `NAME/error`, `NAME/low` and `NAME/high` (95 %). With several",
        "temperatures, a name is `NAME@0.7`. A gate of a training names it `evaluations/EVALUATION/NAME`.",
        "",
    ]
    rows = []
    for name, figure in EVALUATION.items():
        needs = "a judge that is asked" if figure.asked else "a judge" if figure.judged else ""
        rows.append((*_cells(name, figure), codes(figure.types), "yes" if figure.interval else "", needs))
    rows += [(*_cells(name, metric), "any", "", "a judge behind an endpoint") for name, metric in ENDPOINT.items()]
    rows += [
        (*_cells(f"best_of/SIDE/{name}", metric), "any", "", "a side with `best_of`")
        for name, metric in BEST_OF.items()
    ]
    lines += [
        table((*HEAD, "types", "interval", "needs"), rows),
        "## Labellings",
        "",
        "The scores are those of the first labeller. `METRIC@NAME` compares it with the labeller NAME.",
        "",
    ]
    rows = []
    for name, number in LABELLING.items():
        kinds = {"a first labeller that is asked": number.asked, "a first labeller that scores": number.scored,
                 "an endpoint": number.endpoint, "people": number.people}  # fmt: skip
        needs = next((kind for kind, needed in kinds.items() if needed), "")
        shown = f"{name}@NAME" if number.compared else name
        rows.append((*_cells(shown, number), "yes" if number.interval else "", needs))
    return "\n".join([*lines, table((*HEAD, "interval", "needs"), rows)])


HEAD = ("metric", "meaning", "better", "unit")


def _cells(name: str, metric: Metric) -> tuple[str, ...]:
    return f"`{name}`", metric.meaning, metric.better or "", metric.unit


SENT_WHEN: dict[EventType, str] = {
    "fine_tuning.job.succeeded": "A job has made its model",
    "fine_tuning.job.failed": "A job has failed",
    "fine_tuning.job.cancelled": "A job was cancelled",
    "fine_tuning.job.judged": (
        "All gates of a succeeded job are judged, after the last of its "
        "[evaluations](../evaluations.md#evaluations-in-a-job) has ended"
    ),
    "evaluation.succeeded": "An evaluation has its figures",
    "evaluation.failed": "An evaluation has failed",
    "evaluation.cancelled": "An evaluation was cancelled",
    "labelling.succeeded": "A labelling has its file",
    "labelling.failed": "A labelling has failed",
    "labelling.cancelled": "A labelling was cancelled",
    "pipeline.succeeded": "A pipeline has run its rounds, or a gate has stopped it",
    "pipeline.failed": "A stage of a pipeline has failed, or could not begin",
    "pipeline.cancelled": "A pipeline or one of its stages was cancelled",
}


def _webhook_events() -> str:
    rows = [(f"`{event}`", SENT_WHEN[event], "yes" if event in EVENTS else "no") for event in get_args(EventType)]
    return table(("event", "sent when", "by default"), rows)


def _warnings() -> str:
    return table(("`code`", "when"), [(f"`{code}`", when) for code, when in WARNINGS.items()])


PARTS = {"warnings": _warnings, "webhook events": _webhook_events}
