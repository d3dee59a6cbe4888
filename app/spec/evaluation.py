"""The evaluation spec: the body of `POST /v1/evaluations`. This module is pure pydantic; the engine imports it too.

An evaluation compares two sides on the rows of a file.
"""

import math
import secrets
from collections.abc import Callable
from typing import Annotated, ClassVar, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, StringConstraints, ValidationInfo, model_validator

from app.spec.datasets.example import Kind
from app.spec.datasets.mapping import Mapping
from app.spec.datasets.rendering import RenderingSettings, today
from app.spec.json_types import JsonObject
from app.spec.metrics import BEST_OF, ENDPOINT, figures_of
from app.spec.quality_gates import Gates, require_metric
from app.spec.resources import Resources
from app.spec.schema_base import (
    NO_NUL,
    STORED,
    Defaulted,
    FileName,
    Metadata,
    ModelName,
    Quantization,
    Strict,
    inconsistent,
    plain_json,
    with_files,
)

EvaluationType = Literal["preference", "win_rate", "reward_kl", "agreement"]


class Classifier(Strict):
    """A linear classifier over words and phrases, read from a file. Its score is the logit."""

    file: FileName


class Scorer(Defaulted):
    """Scores a single answer: a reward model that was trained here, or a classifier."""

    type: Literal["reward_model", "classifier"]
    model: ModelName | None = None
    classifier: Classifier | None = None

    @model_validator(mode="after")
    def _fields_fit_the_type(self) -> Self:
        needs = "model" if self.type == "reward_model" else self.type
        for name in ("model", "classifier"):
            if (getattr(self, name) is not None) != (name == needs):
                raise inconsistent(name, f"A scorer of the type '{self.type}' has '{needs}', and no other")
        return self


class BestOf(Strict):
    """Sample `n` answers to a prompt and take the one that `by` scores highest.

    This is the DPO paper's strongest baseline and needs no training. Its KL divergence from the model is at most
    log n − (n − 1)/n nats (Beirami et al. 2024).
    """

    n: Annotated[int, Field(ge=2, le=256)]
    by: Scorer

    @property
    def kl_bound(self) -> float:
        """The upper bound of its KL divergence from the model, in nats."""
        return math.log(self.n) - (self.n - 1) / self.n


class Side(Defaulted):
    """One side of the comparison. Its answers come from a model, from a file, or from the data itself."""

    model: ModelName | None = None
    """A base model, a model trained here, or a checkpoint."""
    file: FileName | None = None
    """A file of ready answers, in the order of the prompts of `data`: `{"prompt": …, "completion": …}`."""
    mapping: Mapping | None = None
    """How to read the rows of `file`, if their columns do not tell."""
    answers: Literal["chosen", "rejected"] | None = None
    """Answers from `data`: the preferred ones (or the only ones, if a row has one answer), or the rejected ones."""
    reference: Literal[True] | None = None
    """The reference model of the candidate's training. `"baseline": "reference"` is the short form."""
    best_of: BestOf | None = None
    """Sample several answers of `model` and use the best."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        sources = [name for name in ("model", "file", "answers", "reference") if getattr(self, name) is not None]
        if len(sources) != 1:
            raise inconsistent(
                sources[1] if sources else "model", "A side is a 'model', a 'file', or 'answers': one of them"
            )
        if self.mapping is not None and self.file is None:
            raise inconsistent("mapping", "'mapping' goes with 'file'")
        if self.best_of is not None and not self.is_model:
            raise inconsistent("best_of", "'best_of' goes with 'model': it chooses among answers that are sampled")
        return self

    @property
    def is_model(self) -> bool:
        """Whether a model generates its answers."""
        return self.model is not None or self.reference is not None


def side_name(side: JsonObject | None) -> str:
    """A side as a person reads it: a model, a file, the reference, or the data's own answers. Empty for no side."""
    if side is None:
        return ""
    if "reference" in side:
        return "reference"
    return f"{side['answers']} answers" if "answers" in side else str(next(iter(side.values())))


def _side(value: object) -> object:
    return {"reference": True} if value == "reference" else value


Baseline = Annotated[Side, BeforeValidator(_side, json_schema_input_type=Side | Literal["reference"])]


class SamplingSpec(Defaulted):
    """How completions are sampled. The seed, the row and the number of a completion fix its random numbers."""

    temperatures: Annotated[list[Annotated[float, Field(ge=0, le=10)]], Field(min_length=1, max_length=16)] = [1.0]
    """Each temperature is evaluated. 0 means greedy decoding: the likeliest token."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_tokens: Annotated[int, Field(ge=1, le=32_768)] = 256
    samples: Annotated[int, Field(ge=1, le=256)] = 1
    """Completions per prompt. At temperature 0 there is only one."""

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        if len({f"{temperature:g}" for temperature in self.temperatures}) < len(self.temperatures):
            raise inconsistent("temperatures", "two 'temperatures' are equal in their first six digits")
        return self


MAX_KEY_CHARACTERS = 2048


class Price(Strict):
    """The price of a million tokens at an endpoint, in any currency."""

    input: Annotated[float, Field(ge=0)]
    output: Annotated[float, Field(ge=0)]


class Endpoint(Defaulted):
    """A server with OpenAI's chat completions API."""

    base_url: Annotated[str, StringConstraints(min_length=8, max_length=2048, pattern=r"^https?://[!-~]+$")]
    """The URL without `/chat/completions` at its end."""
    model: ModelName
    api_key: (
        Annotated[str, StringConstraints(min_length=1, max_length=2 * MAX_KEY_CHARACTERS, pattern=r"^[!-~]+$")] | None
    ) = None
    """The server's key. It is stored encrypted, sent to this server only, and never shown again."""
    concurrency: Annotated[int, Field(ge=1, le=64)] = 8
    """Maximum number of requests at the same time."""
    parameters: Annotated[JsonObject, Field(max_length=32)] = {"temperature": 0, "max_tokens": 512}
    """Further fields of each request, beside `model` and `messages`. Some models need other field names."""
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
        if len(self.api_key or "") > MAX_KEY_CHARACTERS:
            raise inconsistent("api_key", f"'api_key' has more than {MAX_KEY_CHARACTERS} characters")
        return self


class Judge(Defaulted):
    """Decides which of two answers is better. It scores each answer, or it is asked which it prefers."""

    type: Literal["reward_model", "classifier", "endpoint", "model"]
    model: ModelName | None = None
    """A reward model that was trained here; for the type `model`, a language model that is asked."""
    classifier: Classifier | None = None
    endpoint: Endpoint | None = None
    question: Literal["dialogue", "plain_summary", "concise_summary"] | None = None
    """The question, in the words of the DPO paper (Rafailov et al. 2023, App. C.2). The default is `dialogue`."""
    template: Annotated[str, StringConstraints(min_length=1, max_length=16_384, pattern=NO_NUL)] | None = None
    """Your own question instead. It holds `{prompt}`, `{a}` and `{b}`, and asks for a last line `Preferred: A`."""

    @model_validator(mode="after")
    def _fields_fit_the_type(self) -> Self:
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
        """Whether it reads both answers and says which one it prefers. Otherwise it scores each answer."""
        return self.type in ("endpoint", "model")

    def with_key(self, key: str | None) -> Self:
        """A copy with another API key of its endpoint."""
        assert self.endpoint is not None
        return self.model_copy(update={"endpoint": self.endpoint.model_copy(update={"api_key": key})})


ALLOWED_FIELDS = {
    "preference": {"candidate", "baseline", "beta"},
    "win_rate": {"candidate", "baseline", "sampling", "judge"},
    "reward_kl": {"candidate", "baseline", "sampling", "judge"},
    "agreement": {"judge"},
}
"""The fields of the spec that an evaluation of each type may have, beside those that all types have."""
REQUIRED_FIELDS = {
    "preference": {"candidate"},
    "win_rate": {"candidate", "baseline"},
    "reward_kl": {"candidate"},
    "agreement": set[str](),
}
"""Those of `ALLOWED_FIELDS` that it must have."""


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

    IMPLIED_SIDES: ClassVar[frozenset[str]] = frozenset()
    """Sides that the spec does not name because a training makes their model."""

    type: EvaluationType
    data: FileName
    mapping: Mapping | None = None
    """How to read the rows of `data`, if their columns do not tell."""
    max_rows: Annotated[int, Field(ge=1, le=10**7)] | None = None
    """Use at most this many rows of `data`. The seed decides which."""
    candidate: Side | None = None
    baseline: Baseline | None = None
    """The side to compare the candidate with. The default is `"reference"`; `win_rate` has none. The reference is that
    of the candidate's training: the model it started from, or the result of the job's SFT stage."""
    beta: Annotated[float, Field(gt=0, le=100)] | None = None
    """β of the implicit reward β·log(π/π_ref). The default is the β of the candidate's training."""
    sampling: SamplingSpec | None = None
    judge: Judge | None = None
    """The judge of the answers. For `reward_kl` its score is the true reward. Without a judge, only answers, lengths
    and KL are computed."""
    quantization: Quantization | None = None
    """Quantisation of the base models. The default is that of the candidate's training."""
    max_length: Annotated[int, Field(ge=8, le=10**6)] | None = None
    """Maximum tokens of a prompt and its answer. In a longer row, the start of the prompt is cut off."""
    name: Annotated[str, StringConstraints(min_length=1, max_length=256, pattern=NO_NUL)] | None = None
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    gates: Gates | None = None
    """Bounds on the evaluation's metrics, such as `win_rate/low`. With several temperatures: `win_rate/low@0.7`."""
    metadata: Annotated[Metadata, Field(max_length=16)] | None = None
    resources: Resources = Resources()
    """The devices that sample and score together. The items have the same bytes whatever their number. Null: one."""
    priority: Annotated[int, Field(ge=-100, le=100)] = 0
    timeout_seconds: Annotated[int, Field(ge=1, le=10**8)] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name in ("candidate", "baseline", "beta", "sampling", "judge"):
            is_set = getattr(self, name) is not None
            if is_set and name not in ALLOWED_FIELDS[self.type]:
                raise inconsistent(name, f"'{name}' does not go with the type '{self.type}'")
            if not is_set and name in REQUIRED_FIELDS[self.type] and name not in self.IMPLIED_SIDES:
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
            and not self.IMPLIED_SIDES
            and not (self.candidate is not None and self.candidate.model is not None)
        ):
            raise inconsistent(
                "baseline",
                "'reference' needs a candidate that is a 'model': it is the reference of that model's training",
            )
        if self.sampling is not None and not self.IMPLIED_SIDES and not any(side.is_model for side in self.sides()):
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
                raise inconsistent(
                    "sampling.temperatures", "At temperature 0 all answers are equal: 'best_of' has no choice"
                )
            if self.type == "reward_kl" and (name == "baseline" or self.baseline is not None):
                message = "The KL bound of 'best_of' refers to the model that it samples: leave out 'baseline'"
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
    def stored(cls, data: JsonObject) -> Self:
        """Read the spec from an evaluation's database row. The next version may have written it."""
        return cls.model_validate(data, context=STORED)

    def to_store(self) -> JsonObject:
        """The spec for a database row. Fields that the previous version does not know are left out unless set."""
        stored = self.model_dump(mode="json")
        for side in (stored["candidate"], stored["baseline"]):
            for name in ("reference", "best_of"):
                if side is not None and side[name] is None:
                    del side[name]
        if self.resources == Resources():
            del stored["resources"]
        return stored

    def resolved(self) -> Self:
        """The spec as it will be run: with a seed, a date and the sampling settings written out."""
        samples_answers = "sampling" in ALLOWED_FIELDS[self.type] and any(side.is_model for side in self.sides())
        return self.model_copy(
            update={
                "sampling": self.sampling or (SamplingSpec() if samples_answers else None),
                "seed": secrets.randbelow(2**31) if self.seed is None else self.seed,
                "date": self.date or today(),
            }
        )

    def sides(self) -> list[Side]:
        return [side for side in (self.candidate, self.baseline) if side is not None]

    def files(self) -> list[tuple[str, str]]:
        """(field, file id or path) of every file that the evaluation reads."""
        files = [("data", self.data)]
        files += [(f"{name}.file", side.file) for name, side in self._named_sides() if side.file is not None]
        files += [
            (f"{name}.best_of.by.classifier.file", side.best_of.by.classifier.file)
            for name, side in self._named_sides() if side.best_of is not None and side.best_of.by.classifier is not None
        ]  # fmt: skip
        if self.judge is not None and self.judge.classifier is not None:
            files.append(("judge.classifier.file", self.judge.classifier.file))
        return files

    def with_files(self, places: dict[str, str]) -> Self:
        """A copy with other file names. `places` maps the fields that `files` returns to the new names."""
        return self.model_validate(with_files(self.model_dump(mode="json"), places))

    def sealed(self, seal: Callable[[str], str | None]) -> Self:
        """A copy in which `seal` has replaced the API key of the judge's endpoint."""
        judge = self.judge
        if judge is None or judge.endpoint is None or judge.endpoint.api_key is None:
            return self
        return self.model_copy(update={"judge": judge.with_key(seal(judge.endpoint.api_key))})

    def models(self) -> list[tuple[str, str]]:
        """(field, name) of every model that the evaluation loads."""
        models = [(f"{name}.model", side.model) for name, side in self._named_sides() if side.model is not None]
        models += [
            (f"{name}.best_of.by.model", side.best_of.by.model)
            for name, side in self._named_sides() if side.best_of is not None and side.best_of.by.model is not None
        ]  # fmt: skip
        if self.judge is not None and self.judge.model is not None:
            models.append(("judge.model", self.judge.model))
        return models

    @property
    def answer_names(self) -> tuple[str, str]:
        """The names of an item's two answers. For `agreement` they are first and second."""
        return ("first", "second") if self.type == "agreement" else ("candidate", "baseline")

    def _named_sides(self) -> list[tuple[str, Side]]:
        return [(name, side) for name in ("candidate", "baseline") if (side := getattr(self, name)) is not None]

    def needs(self, field: str = "data") -> Kind | None:
        """The kind of examples that the file of `field` must provide; None for a file without rows."""
        if field != "data":
            return None if field.endswith("classifier.file") else Kind.SUPERVISED
        if self.type in ("preference", "agreement") or any(side.answers == "rejected" for side in self.sides()):
            return Kind.PREFERENCE
        return Kind.SUPERVISED if any(side.answers for side in self.sides()) else Kind.PROMPTS

    def reads(self, field: str) -> Mapping | None:
        """The mapping for the file of `field`; None if its columns tell."""
        side = {f"{name}.file": side for name, side in self._named_sides()}.get(field)
        return side.mapping if side is not None else self.mapping if field == "data" else None

    def reading(self, field: str, mapping: Mapping) -> Self:
        """A copy that reads the file of `field` by the mapping of its upload, unless the spec has its own mapping."""
        if self.needs(field) is None or self.reads(field) is not None:
            return self
        if field == "data":
            return self.model_copy(update={"mapping": mapping})
        name = field.removesuffix(".file")
        return self.model_copy(update={name: getattr(self, name).model_copy(update={"mapping": mapping})})


class JobEvaluation(EvaluationSpec):
    """An evaluation of the model that a training job makes. That model is the candidate; the gates are in the job."""

    model_config = ConfigDict(
        json_schema_extra={"example": {"name": "held-out", "type": "preference", "data": "file-abc123"}}
    )
    IMPLIED_SIDES = frozenset({"candidate"})

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]

    @model_validator(mode="after")
    def _belongs_to_the_job(self) -> Self:
        for field in ("candidate", "gates", "metadata", "timeout_seconds"):
            if getattr(self, field) is not None:
                raise inconsistent(field, f"'{field}' does not go with an evaluation of the model that a job makes")
        if "candidate" not in ALLOWED_FIELDS[self.type]:
            raise inconsistent("type", f"The type '{self.type}' has no candidate: it does not evaluate a model")
        return self

    def of(self, candidate: str) -> EvaluationSpec:
        """The evaluation of the model `candidate`."""
        return EvaluationSpec.model_validate(self.model_dump(mode="json") | {"candidate": {"model": candidate}})
