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

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        given = [name for name in ("model", "file", "answers") if getattr(self, name) is not None]
        if len(given) != 1:
            raise inconsistent(
                given[1] if given else "model", "A side is a 'model', a 'file', or 'answers': one of them"
            )
        if self.mapping is not None and self.file is None:
            raise inconsistent("mapping", "'mapping' goes with 'file'")
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


class Classifier(Strict):
    """A linear classifier of words and phrases, as a file: its score is the logit."""

    file: FileName


class Judge(Strict):
    """Who says which of two answers is better: here by a score of each, of which the higher wins."""

    type: Literal["reward_model", "classifier"]
    model: ModelName | None = None
    """A reward model that was trained here."""
    classifier: Classifier | None = None

    @model_validator(mode="after")
    def _as_its_type_says(self) -> Self:
        needs = "model" if self.type == "reward_model" else self.type
        for name in ("model", "classifier"):
            if (getattr(self, name) is not None) != (name == needs):
                raise inconsistent(name, f"A judge of the type '{self.type}' has '{needs}', and no other")
        return self


TAKES = {
    "preference": {"candidate", "baseline", "beta"},
    "win_rate": {"candidate", "baseline", "sampling", "judge"},
    "reward_kl": {"candidate", "baseline", "sampling", "judge"},
}
NEEDS = {
    "preference": {"candidate"},
    "win_rate": {"candidate", "baseline", "judge"},
    "reward_kl": {"candidate", "judge"},
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

    type: Literal["preference", "win_rate", "reward_kl"]
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
    """For `reward_kl` its score is the true reward."""
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

    def models(self) -> list[tuple[str, str]]:
        """(field, name) of every model that the evaluation loads."""
        named = [(f"{name}.model", side.model) for name, side in self._named_sides() if side.model is not None]
        if self.judge is not None and self.judge.model is not None:
            named.append(("judge.model", self.judge.model))
        return named

    def _named_sides(self) -> list[tuple[str, Side]]:
        return [(name, side) for name in ("candidate", "baseline") if (side := getattr(self, name)) is not None]

    def needs(self, field: str = "data") -> Kind | None:
        """What the rows of the file of `field` must be good for; None for a file that has none."""
        if field != "data":
            return None if field.startswith("judge.") else Kind.SUPERVISED
        if self.type == "preference" or any(side.answers == "rejected" for side in self.sides()):
            return Kind.PREFERENCE
        return Kind.SUPERVISED

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
