"""The evaluation spec: the body of `POST /v1/evaluations`. Pure pydantic; the engine imports it too.

An evaluation compares two sides on the rows of a file. `TAKES` says which fields each type has.
"""

import secrets
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, StringConstraints, model_validator

from app.datasets.example import Kind
from app.datasets.mapping import Mapping
from app.jobs.spec import NO_NUL, FileName, Metadata, Quantization
from app.strict import STORED, Strict, inconsistent

ModelName = Annotated[str, StringConstraints(min_length=1, max_length=512, pattern=NO_NUL)]
Template = Annotated[str, StringConstraints(min_length=1, max_length=20_000, pattern=NO_NUL)]


class Side(Strict):
    """Whose answers: a model's, those of a file, or those that stand in the data."""

    model: ModelName | None = None
    """A base model, a model made here, or a checkpoint."""
    file: FileName | None = None
    """A file of ready answers, row for row those of `data`: `{"prompt": …, "completion": …}`, or what an earlier
    evaluation left."""
    answers: Literal["chosen", "rejected"] | None = None
    """The preferred answers of `data` (or its reference answers, where there is one each), or the other ones."""

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        given = [name for name in ("model", "file", "answers") if getattr(self, name) is not None]
        if len(given) != 1:
            raise inconsistent(
                given[1] if given else "model", "A side is a 'model', a 'file', or 'answers': one of them"
            )
        return self


class Sampling(Strict):
    """How completions are sampled. Each has random numbers of its own, named by the seed, its row and its number."""

    temperatures: Annotated[list[Annotated[float, Field(ge=0, le=10)]], Field(min_length=1, max_length=16)] = [1.0]
    """All are evaluated. 0 takes the likeliest token."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_tokens: Annotated[int, Field(ge=1, le=32_768)] = 256
    samples: Annotated[int, Field(ge=1, le=256)] = 1
    """Completions of each prompt; at temperature 0 there is one."""

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        if len(set(self.temperatures)) < len(self.temperatures):
            raise inconsistent("temperatures", "'temperatures' names one twice")
        return self


class Endpoint(Strict):
    """A judge behind an OpenAI-compatible endpoint, asked for chat completions."""

    url: Annotated[str, StringConstraints(min_length=8, max_length=2048, pattern=NO_NUL)]
    """Up to `/v1`, without `/chat/completions`."""
    model: ModelName
    api_key: Annotated[str, StringConstraints(max_length=4096, pattern=NO_NUL)] | None = None
    """Kept encrypted, never shown again."""
    prices: Annotated[list[Annotated[float, Field(ge=0)]], Field(min_length=2, max_length=2)] | None = None
    """Of a million tokens that are read, and of a million that are written, to count what the judge costs."""


class Classifier(Strict):
    """A linear classifier of words and phrases, as a file: its score is the logit."""

    file: FileName


class Judge(Strict):
    """Who says which of two answers is better."""

    type: Literal["endpoint", "model", "reward_model", "classifier"]
    endpoint: Endpoint | None = None
    model: ModelName | None = None
    """A base model or one made here, asked as an endpoint would be; or a reward model, by `type`."""
    classifier: Classifier | None = None
    prompt: Literal["summaries", "summaries_concise", "dialogue"] | None = None
    """The paper's questions (Rafailov et al. 2023, App. C.1 and C.2)."""
    template: Template | None = None
    """A question of one's own, with {prompt}, {a} and {b}; the answer's last line must name A or B."""
    max_tokens: Annotated[int, Field(ge=1, le=4096)] = 256

    @model_validator(mode="after")
    def _as_its_type_says(self) -> Self:
        needs = {"endpoint": "endpoint", "model": "model", "reward_model": "model", "classifier": "classifier"}[
            self.type
        ]
        for name in ("endpoint", "model", "classifier"):
            if (getattr(self, name) is not None) != (name == needs):
                raise inconsistent(name, f"A judge of the type '{self.type}' has '{needs}', and no other")
        asks = self.type in ("endpoint", "model")
        if asks and (self.prompt is None) == (self.template is None):
            raise inconsistent("prompt", "Give the judge a 'prompt' or a 'template', one of them")
        if not asks and (self.prompt is not None or self.template is not None):
            raise inconsistent("prompt", f"A judge of the type '{self.type}' reads answers, it is not asked a question")
        if self.template is not None and not all(part in self.template for part in ("{prompt}", "{a}", "{b}")):
            raise inconsistent("template", "A template needs {prompt}, {a} and {b}")
        return self


TAKES = {
    "preference": {"candidate", "baseline", "beta"},
    "win_rate": {"candidate", "baseline", "sampling", "judge"},
    "reward_kl": {"candidate", "baseline", "sampling", "judge"},
    "agreement": {"judge"},
}
NEEDS = {
    "preference": {"candidate"},
    "win_rate": {"candidate", "baseline", "judge"},
    "reward_kl": {"candidate", "judge"},
    "agreement": {"judge"},
}


class EvaluationSpec(Strict):
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

    type: Literal["preference", "win_rate", "reward_kl", "agreement"]
    data: FileName
    mapping: Mapping | None = None
    """How the rows of `data` are read, where their columns do not say it."""
    max_rows: Annotated[int, Field(ge=1, le=10**7)] | None = None
    """Only so many rows of `data`, drawn by the seed."""
    candidate: Side | None = None
    baseline: Side | None = None
    """What the candidate is compared with. Without one, the model that it was trained from."""
    beta: Annotated[float, Field(gt=0, le=100)] | None = None
    """Of the implicit reward β·log(π/π_ref). Without one, what the candidate was trained with."""
    sampling: Sampling | None = None
    judge: Judge | None = None
    """For `reward_kl` it is what says the true reward: a reward model or a classifier."""
    quantization: Quantization | None = None
    """Of the base models. None: as the candidate was trained."""
    max_length: Annotated[int, Field(ge=8, le=10**6)] | None = None
    """Tokens of a prompt and its answer; what is longer loses the left end of its prompt."""
    name: Annotated[str, StringConstraints(min_length=1, max_length=256, pattern=NO_NUL)] | None = None
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    metadata: Annotated[Metadata, Field(max_length=16)] | None = None
    priority: Annotated[int, Field(ge=-100, le=100)] = 0
    timeout_seconds: Annotated[int, Field(ge=1, le=10**8)] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name in ("candidate", "baseline", "beta", "sampling", "judge"):
            given = getattr(self, name) is not None
            if given and name not in TAKES[self.type]:
                raise inconsistent(name, f"'{name}' does not go with the type '{self.type}'")
            if not given and name in NEEDS[self.type]:
                raise inconsistent(name, f"The type '{self.type}' needs '{name}'")
        if self.type in ("preference", "reward_kl"):
            for name in ("candidate", "baseline"):
                side = getattr(self, name)
                if side is not None and side.model is None:
                    raise inconsistent(f"{name}.model", f"The type '{self.type}' compares models: name one")
        if (
            self.type == "reward_kl"
            and self.judge is not None
            and self.judge.type not in ("reward_model", "classifier")
        ):
            raise inconsistent("judge.type", "'reward_kl' needs a reward: a 'reward_model' or a 'classifier'")
        if self.sampling is not None and not any(side.model for side in self.sides()):
            raise inconsistent("sampling", "Neither side is a model: there is nothing to sample")
        return self

    @classmethod
    def stored(cls, data: dict[str, Any]) -> Self:
        """The spec of an evaluation's row, which the next version may have written."""
        return cls.model_validate(data, context=STORED)

    def resolved(self) -> Self:
        """The spec as it will be run: a seed, and how is sampled, written out."""
        samples = "sampling" in TAKES[self.type] and any(side.model for side in self.sides())
        return self.model_copy(
            update={
                "sampling": self.sampling or (Sampling() if samples else None),
                "seed": secrets.randbelow(2**31) if self.seed is None else self.seed,
            }
        )

    def sides(self) -> list[Side]:
        return [side for side in (self.candidate, self.baseline) if side is not None]

    def files(self) -> list[tuple[str, str]]:
        """(field, file id or path) of every file that the evaluation reads."""
        named = [("data", self.data)]
        named += [(f"{name}.file", side.file) for name, side in self._named_sides() if side.file is not None]
        if self.judge is not None and self.judge.classifier is not None:
            named.append(("judge.classifier.file", self.judge.classifier.file))
        return named

    def models(self) -> list[tuple[str, str]]:
        """(field, name) of every model that the evaluation loads."""
        named = [(f"{name}.model", side.model) for name, side in self._named_sides() if side.model is not None]
        if self.judge is not None and self.judge.model is not None:
            named.append(("judge.model", self.judge.model))
        return named

    def _named_sides(self) -> list[tuple[str, Side]]:
        return [(name, side) for name in ("candidate", "baseline") if (side := getattr(self, name)) is not None]

    def needs(self) -> Kind:
        """What the rows of `data` must be good for."""
        if self.type in ("preference", "agreement") or any(side.answers == "rejected" for side in self.sides()):
            return Kind.PREFERENCE
        return Kind.SUPERVISED
