"""The evaluation spec: the body of `POST /v1/evaluations`. Pure pydantic; the engine imports it too.

An evaluation compares two sides on the rows of a file. `TAKES` says which fields each type has.
"""

import math
import secrets
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, StringConstraints, ValidationInfo, model_validator

from app.spec.datasets.example import Kind
from app.spec.datasets.mapping import Mapping
from app.spec.datasets.rendering import RenderingSettings, today
from app.spec.metrics import BEST_OF, ENDPOINT, figures_of
from app.spec.quality_gates import Gates, require_metric
from app.spec.schema_base import (
    NO_NUL,
    STORED,
    FileName,
    Metadata,
    ModelName,
    Quantization,
    Strict,
    inconsistent,
    plain_json,
)

EvaluationType = Literal["preference", "win_rate", "reward_kl", "agreement"]


class Classifier(Strict):
    """A linear classifier of words and phrases, as a file: its score is the logit."""

    file: FileName


class Scorer(Strict):
    """A scorer gives one answer a score: a reward model that was trained here, or a classifier."""

    type: Literal["reward_model", "classifier"]
    model: ModelName | None = None
    classifier: Classifier | None = None

    @model_validator(mode="after")
    def _as_its_type_says(self) -> Self:
        needs = "model" if self.type == "reward_model" else self.type
        for name in ("model", "classifier"):
            if (getattr(self, name) is not None) != (name == needs):
                raise inconsistent(name, f"A scorer of the type '{self.type}' has '{needs}', and no other")
        return self


class BestOf(Strict):
    """The one that `by` likes best, among `n` answers to a prompt: the paper's strongest baseline, which needs
    no training. Its KL to the model is at most log n − (n − 1)/n (Beirami et al. 2024).
    """

    n: Annotated[int, Field(ge=2, le=256)]
    by: Scorer

    @property
    def kl_bound(self) -> float:
        """In nats."""
        return math.log(self.n) - (self.n - 1) / self.n


class Side(Strict):
    """Whose answers: a model's, those of a file, or those that stand in the data."""

    model: ModelName | None = None
    """A base model, a model made here, or a checkpoint."""
    file: FileName | None = None
    """A file of ready answers, line for line to the prompts of `data`: `{"prompt": …, "completion": …}`."""
    mapping: Mapping | None = None
    """How the rows of `file` are read, where their columns do not say it."""
    answers: Literal["chosen", "rejected"] | None = None
    """The preferred answers of `data` (or its reference answers, where there is one each), or the other ones."""
    reference: Literal[True] | None = None
    """`"baseline": "reference"` says this: the model that the candidate's training was held to."""
    best_of: BestOf | None = None
    """The best of several answers of `model`."""

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        given = [name for name in ("model", "file", "answers", "reference") if getattr(self, name) is not None]
        if len(given) != 1:
            raise inconsistent(
                given[1] if given else "model", "A side is a 'model', a 'file', or 'answers': one of them"
            )
        if self.mapping is not None and self.file is None:
            raise inconsistent("mapping", "'mapping' goes with 'file'")
        if self.best_of is not None and not self.is_model:
            raise inconsistent("best_of", "'best_of' goes with 'model': it chooses among answers that are sampled")
        return self

    @property
    def is_model(self) -> bool:
        """Whether a model says its answers."""
        return self.model is not None or self.reference is not None


def _side(value: Any) -> Any:
    return {"reference": True} if value == "reference" else value


Baseline = Annotated[Side, BeforeValidator(_side, json_schema_input_type=Side | Literal["reference"])]


class SamplingSpec(Strict):
    """How completions are sampled. Each has random numbers of its own, named by the seed, its row and its number."""

    temperatures: Annotated[list[Annotated[float, Field(ge=0, le=10)]], Field(min_length=1, max_length=16)] = [1.0]
    """All are evaluated. 0 takes the likeliest token."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_tokens: Annotated[int, Field(ge=1, le=32_768)] = 256
    samples: Annotated[int, Field(ge=1, le=256)] = 1
    """Completions of each prompt; at temperature 0 there is one."""

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        if len({f"{temperature:g}" for temperature in self.temperatures}) < len(self.temperatures):
            raise inconsistent("temperatures", "'temperatures' names one twice; six digits tell them apart")
        return self


MAX_KEY = 2048


class Price(Strict):
    """What an endpoint asks for a million tokens, in any currency."""

    input: Annotated[float, Field(ge=0)]
    output: Annotated[float, Field(ge=0)]


class Endpoint(Strict):
    """A server that speaks OpenAI's chat completions."""

    base_url: Annotated[str, StringConstraints(min_length=8, max_length=2048, pattern=r"^https?://[!-~]+$")]
    """Up to and without `/chat/completions`."""
    model: ModelName
    api_key: Annotated[str, StringConstraints(min_length=1, max_length=2 * MAX_KEY, pattern=r"^[!-~]+$")] | None = None
    """Kept encrypted, sent to this server only, and never shown again."""
    concurrency: Annotated[int, Field(ge=1, le=64)] = 8
    """Questions that are under way at a time."""
    parameters: Annotated[dict[str, Any], Field(max_length=32)] = {"temperature": 0, "max_tokens": 512}
    """What else each request says, beside `model` and `messages`: some models want other names."""
    price: Price | None = None

    @model_validator(mode="after")
    def _can_be_sent(self, info: ValidationInfo) -> Self:
        if info.context == STORED:
            return self
        plain_json(self.parameters, "parameters", 16_384)
        if "?" in self.base_url or "#" in self.base_url:
            raise inconsistent("base_url", "'base_url' ends before '/chat/completions': it has no '?' and no '#'")
        for name in ("model", "messages", "stream", "n"):
            if name in self.parameters:
                raise inconsistent(f"parameters.{name}", f"'{name}' is not for 'parameters'")
        if len(self.api_key or "") > MAX_KEY:
            raise inconsistent("api_key", f"'api_key' has more than {MAX_KEY} characters")
        return self


class Judge(Strict):
    """Who says which of two answers is better: by a score of each, of which the higher wins, or by being asked."""

    type: Literal["reward_model", "classifier", "endpoint", "model"]
    model: ModelName | None = None
    """A reward model that was trained here; of the type `model`, a language model that is asked."""
    classifier: Classifier | None = None
    endpoint: Endpoint | None = None
    question: Literal["dialogue", "plain_summary", "concise_summary"] | None = None
    """How it is asked: in the words of the paper (Rafailov et al. 2023, App. C.2). None: `dialogue`."""
    template: Annotated[str, StringConstraints(min_length=1, max_length=16_384, pattern=NO_NUL)] | None = None
    """Words of your own instead, with `{prompt}`, `{a}` and `{b}` in them, that ask for a last line `Preferred: A`."""

    @model_validator(mode="after")
    def _as_its_type_says(self) -> Self:
        needs = "model" if self.type == "reward_model" else self.type
        for name in ("model", "classifier", "endpoint"):
            if (getattr(self, name) is not None) != (name == needs):
                raise inconsistent(name, f"A judge of the type '{self.type}' has '{needs}', and no other")
        for name in ("question", "template"):
            if getattr(self, name) is not None and not self.asked:
                raise inconsistent(name, f"A judge of the type '{self.type}' is not asked: it scores")
        if self.template is not None:
            if self.question is not None:
                raise inconsistent("template", "Give 'question' or 'template', not both")
            for place in ("{prompt}", "{a}", "{b}"):
                if self.template.count(place) != 1:
                    raise inconsistent("template", f"'template' needs {place}, once")
        return self

    @property
    def asked(self) -> bool:
        """Whether it reads both answers and says which one it prefers; else it scores each."""
        return self.type in ("endpoint", "model")

    def with_key(self, key: str | None) -> Self:
        """The same with another key of its endpoint."""
        assert self.endpoint is not None
        return self.model_copy(update={"endpoint": self.endpoint.model_copy(update={"api_key": key})})


TAKES = {
    "preference": {"candidate", "baseline", "beta"},
    "win_rate": {"candidate", "baseline", "sampling", "judge"},
    "reward_kl": {"candidate", "baseline", "sampling", "judge"},
    "agreement": {"judge"},
}
NEEDS = {
    "preference": {"candidate"},
    "win_rate": {"candidate", "baseline"},
    "reward_kl": {"candidate"},
    "agreement": set[str](),
}


class EvaluationSpec(RenderingSettings):
    """The body of `POST /v1/evaluations`."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "type": "preference",
                "candidate": {"model": "ft:meta-llama/Llama-3.1-8B:default:support:1a2b3c4d"},
                "data": "file-abc123",
            }
        }
    )

    MADE: ClassVar[frozenset[str]] = frozenset()
    """Sides that are not named because they are made."""

    type: EvaluationType
    data: FileName
    mapping: Mapping | None = None
    """How the rows of `data` are read, where their columns do not say it."""
    max_rows: Annotated[int, Field(ge=1, le=10**7)] | None = None
    """Only so many rows of `data`, drawn by the seed."""
    candidate: Side | None = None
    baseline: Baseline | None = None
    """The side that the candidate is compared with. The default but for `win_rate` is `"reference"`: what its training
    was held to, the model that it was trained from or what the job's own SFT stage left."""
    beta: Annotated[float, Field(gt=0, le=100)] | None = None
    """Of the implicit reward β·log(π/π_ref). Without one, what the candidate was trained with."""
    sampling: SamplingSpec | None = None
    judge: Judge | None = None
    """For `reward_kl` its score is the true reward. Without one, answers, lengths and KL alone are found."""
    quantization: Quantization | None = None
    """Of the base models. None: as the candidate was trained."""
    max_length: Annotated[int, Field(ge=8, le=10**6)] | None = None
    """Tokens of a prompt and its answer; what is longer loses the left end of its prompt."""
    name: Annotated[str, StringConstraints(min_length=1, max_length=256, pattern=NO_NUL)] | None = None
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    gates: Gates | None = None
    """On the evaluation's own metrics, `win_rate/low` for example; of several temperatures `win_rate/low@0.7`."""
    metadata: Annotated[Metadata, Field(max_length=16)] | None = None
    priority: Annotated[int, Field(ge=-100, le=100)] = 0
    timeout_seconds: Annotated[int, Field(ge=1, le=10**8)] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name in ("candidate", "baseline", "beta", "sampling", "judge"):
            given = getattr(self, name) is not None
            if given and name not in TAKES[self.type]:
                raise inconsistent(name, f"'{name}' does not go with the type '{self.type}'")
            if not given and name in NEEDS[self.type] and name not in self.MADE:
                raise inconsistent(name, f"The type '{self.type}' needs '{name}'")
        if self.type in ("preference", "reward_kl"):
            for name in ("candidate", "baseline"):
                side = getattr(self, name)
                if side is not None and not side.is_model:
                    raise inconsistent(f"{name}.model", f"The type '{self.type}' compares models: name one")
        if self.type == "reward_kl" and self.judge is not None and self.judge.asked:
            raise inconsistent("judge.type", "The type 'reward_kl' needs a judge that scores: it averages rewards")
        self._best_of_fits()
        if self.candidate is not None and self.candidate.reference:
            raise inconsistent("candidate.reference", "The candidate is not its own reference: name a model")
        if (
            self.baseline is not None
            and self.baseline.reference
            and not self.MADE
            and not (self.candidate is not None and self.candidate.model is not None)
        ):
            raise inconsistent("baseline", "'reference' is what the candidate was held to: the candidate is no model")
        if self.sampling is not None and not self.MADE and not any(side.is_model for side in self.sides()):
            raise inconsistent("sampling", "Neither side is a model: there is nothing to sample")
        for number, gate in enumerate(self.gates or []):
            require_metric(gate.metric, self.figures(), f"gates.{number}.metric")
        return self

    def _best_of_fits(self) -> None:
        for name, side in self._named_sides():
            if side.best_of is None:
                continue
            if self.type == "preference":
                raise inconsistent(f"{name}.best_of", "The type 'preference' samples nothing to choose from")
            if self.sampling is not None and 0 in self.sampling.temperatures:
                raise inconsistent("sampling.temperatures", "At temperature 0 all answers are the same: none is best")
            if self.type == "reward_kl" and (name == "baseline" or self.baseline is not None):
                message = "The KL of 'best_of' is bounded to the model that it samples: it has no other 'baseline'"
                raise inconsistent("baseline", message)

    def figures(self) -> list[str]:
        """The names of the metrics that the evaluation will have."""
        judge = self.judge
        names = figures_of(self.type, judged=judge is not None, asked=judge is not None and judge.asked)
        temperatures = self.sampling.temperatures if self.sampling is not None else [1.0]
        if self.type in ("win_rate", "reward_kl") and len(temperatures) > 1:
            names = [f"{name}@{temperature:g}" for name in names for temperature in temperatures]
        if judge is not None and judge.endpoint is not None:
            names += [name for name in ENDPOINT if name != "judge/cost" or judge.endpoint.price is not None]
        sides = [side for side, settings in self._named_sides() if settings.best_of is not None]
        return names + [f"best_of/{side}/{name}" for side in sides for name in BEST_OF]

    @classmethod
    def stored(cls, data: dict[str, Any]) -> Self:
        """The spec of an evaluation's row, which the next version may have written."""
        return cls.model_validate(data, context=STORED)

    def to_store(self) -> dict[str, Any]:
        """The spec as a row has it: what the version before does not know is there only where it was set."""
        stored = self.model_dump(mode="json")
        for side in (stored["candidate"], stored["baseline"]):
            for name in ("reference", "best_of"):
                if side is not None and side[name] is None:
                    del side[name]
        return stored

    def resolved(self) -> Self:
        """The spec as it will be run: a seed, and how is sampled, written out."""
        samples = "sampling" in TAKES[self.type] and any(side.is_model for side in self.sides())
        return self.model_copy(
            update={
                "sampling": self.sampling or (SamplingSpec() if samples else None),
                "seed": secrets.randbelow(2**31) if self.seed is None else self.seed,
                "date": self.date or today(),
            }
        )

    def sides(self) -> list[Side]:
        return [side for side in (self.candidate, self.baseline) if side is not None]

    def files(self) -> list[tuple[str, str]]:
        """(field, file id or path) of every file that the evaluation reads."""
        named = [("data", self.data)]
        named += [(f"{name}.file", side.file) for name, side in self._named_sides() if side.file is not None]
        named += [
            (f"{name}.best_of.by.classifier.file", side.best_of.by.classifier.file)
            for name, side in self._named_sides() if side.best_of is not None and side.best_of.by.classifier is not None
        ]  # fmt: skip
        if self.judge is not None and self.judge.classifier is not None:
            named.append(("judge.classifier.file", self.judge.classifier.file))
        return named

    def with_files(self, places: dict[str, str]) -> Self:
        """The same evaluation with other names for its files: `places` maps fields, as `files` names them, to names."""
        body = self.model_dump(mode="json")
        for field, place in places.items():
            *path, last = field.split(".")
            target = body
            for name in path:
                target = target[name]
            target[last] = place
        return self.model_validate(body)

    def sealed(self, seal: Callable[[str], str | None]) -> Self:
        """The same with the key of its judge's endpoint as `seal` makes it."""
        judge = self.judge
        if judge is None or judge.endpoint is None or judge.endpoint.api_key is None:
            return self
        return self.model_copy(update={"judge": judge.with_key(seal(judge.endpoint.api_key))})

    def models(self) -> list[tuple[str, str]]:
        """(field, name) of every model that the evaluation loads."""
        named = [(f"{name}.model", side.model) for name, side in self._named_sides() if side.model is not None]
        named += [
            (f"{name}.best_of.by.model", side.best_of.by.model)
            for name, side in self._named_sides() if side.best_of is not None and side.best_of.by.model is not None
        ]  # fmt: skip
        if self.judge is not None and self.judge.model is not None:
            named.append(("judge.model", self.judge.model))
        return named

    @property
    def sides_named(self) -> tuple[str, str]:
        """What the two answers of an item are called: agreement is about two answers that are nobody's."""
        return ("first", "second") if self.type == "agreement" else ("candidate", "baseline")

    def _named_sides(self) -> list[tuple[str, Side]]:
        return [(name, side) for name in ("candidate", "baseline") if (side := getattr(self, name)) is not None]

    def needs(self, field: str = "data") -> Kind | None:
        """What the rows of the file of `field` must be good for; None for a file that has none."""
        if field != "data":
            return None if field.endswith("classifier.file") else Kind.SUPERVISED
        if self.type in ("preference", "agreement") or any(side.answers == "rejected" for side in self.sides()):
            return Kind.PREFERENCE
        return Kind.SUPERVISED if any(side.answers for side in self.sides()) else Kind.PROMPTS

    def reads(self, field: str) -> Mapping | None:
        """How the rows of the file of `field` are read."""
        side = {f"{name}.file": side for name, side in self._named_sides()}.get(field)
        return side.mapping if side is not None else self.mapping if field == "data" else None

    def reading(self, field: str, mapping: Mapping) -> Self:
        """The same with the mapping that the file of `field` was uploaded with, where it names none itself."""
        if self.needs(field) is None or self.reads(field) is not None:
            return self
        if field == "data":
            return self.model_copy(update={"mapping": mapping})
        name = field.removesuffix(".file")
        return self.model_copy(update={name: getattr(self, name).model_copy(update={"mapping": mapping})})


class JobEvaluation(EvaluationSpec):
    """An evaluation of the model that a training makes: its candidate is that model, its gates are the training's."""

    model_config = ConfigDict(
        json_schema_extra={"example": {"name": "held-out", "type": "preference", "data": "file-abc123"}}
    )
    MADE = frozenset({"candidate"})

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]

    @model_validator(mode="after")
    def _of_the_job(self) -> Self:
        for field in ("candidate", "gates", "metadata", "timeout_seconds"):
            if getattr(self, field) is not None:
                raise inconsistent(field, f"'{field}' does not go with an evaluation of the model that a job makes")
        if "candidate" not in TAKES[self.type]:
            raise inconsistent("type", f"The type '{self.type}' has no candidate: it is not about a model")
        return self

    def of(self, candidate: str) -> EvaluationSpec:
        """The evaluation of the model `candidate`."""
        return EvaluationSpec.model_validate(self.model_dump(mode="json") | {"candidate": {"model": candidate}})
