"""The labelling spec: the body of `POST /v1/labellings`. This module is pure pydantic; the engine imports it too.

A labelling makes preference data: models answer prompts, and labellers say which answers are better.
"""

import secrets
from collections.abc import Callable, Iterator
from typing import Annotated, Literal, Self, get_args

from pydantic import ConfigDict, Field, StringConstraints, model_validator

from app.spec.datasets import limits
from app.spec.datasets.example import Kind
from app.spec.datasets.mapping import Mapping
from app.spec.datasets.rendering import RenderingSettings, today
from app.spec.evaluation import Endpoint, Judge, SamplingSpec
from app.spec.graders.schemas import ByModel, Grader, RewardModel, by_models
from app.spec.json_types import JsonObject
from app.spec.metrics import figures_of_labelling
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
    inconsistent,
    with_files,
)

LabellerKind = Literal["judge", "grader", "people"]
MAX_WRITERS, MAX_LABELLERS = 8, 8
MAX_COMPARED = 16
"""The most answers to a prompt that a judge compares: it is asked about every two of them, in both orders."""
MAX_ITEMS = 50_000
"""The most prompts that people can be given."""
MAX_SHOWN = 9
"""The most answers to a prompt that people rank: a key of the keyboard for each."""


class WriterEndpoint(Endpoint):
    """A server with OpenAI's chat completions API that answers the prompts."""

    parameters: Annotated[JsonObject, Field(max_length=32)] = {}
    """Further fields of each request. They replace those of `sampling`: `temperature`, `top_p` and `max_tokens`. Null
    leaves a field out, for models that refuse it."""


class Writer(Defaulted):
    """Answers the prompts: a model of the service, or an endpoint."""

    model: ModelName | None = None
    """A base model, a model trained here, or a checkpoint."""
    endpoint: WriterEndpoint | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.model is None) == (self.endpoint is None):
            field = "model" if self.model is None else "endpoint"
            raise inconsistent(field, "A writer is a 'model' or an 'endpoint': one of them")
        return self

    @property
    def name(self) -> str:
        """The name of its model."""
        return self.model if self.endpoint is None else self.endpoint.model  # type: ignore[return-value]


class People(Defaulted):
    """People who label on the page `/dashboard/label/ID`, each with a key of the scope `label`."""

    guideline: Annotated[str, StringConstraints(min_length=1, max_length=16_384, pattern=NO_NUL)] | None = None
    """The rule for what is a good answer, in Markdown. The page shows it."""
    verdicts: Annotated[int, Field(ge=1, le=16)] = 1
    """The number of people who label each prompt. With two or more, their agreement is measured."""
    minutes: Annotated[int, Field(ge=1, le=1440)] = 15
    """The time for which a prompt is kept for the person to whom it was given."""


class Labeller(Defaulted):
    """Says which answers are better: a judge, which scores or compares them, a grader, which checks them, or people."""

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] | None = None
    """Its name in rows and metrics. The default is the kind of labeller."""
    judge: Judge | None = None
    """As in evaluations. A judge that is asked compares every two answers, in both orders."""
    grader: Grader | None = None
    """As in reinforcement. It reads the row of the prompt as `{{item.FIELD}}`."""
    people: People | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        kinds = [kind for kind in get_args(LabellerKind) if getattr(self, kind) is not None]
        if len(kinds) != 1:
            field = kinds[1] if kinds else "judge"
            raise inconsistent(field, "A labeller is a 'judge', a 'grader' or 'people': one of them")
        return self

    @property
    def kind(self) -> LabellerKind:
        return "judge" if self.judge is not None else "grader" if self.grader is not None else "people"

    @property
    def title(self) -> str:
        """Its name."""
        return self.name or self.kind

    @property
    def asked(self) -> bool:
        """Whether it compares two answers at a time. Otherwise it scores each."""
        return self.judge is not None and self.judge.asked

    @property
    def scores(self) -> bool:
        """Whether it scores each answer. Others compare answers, and their scores always have the same mean."""
        return self.people is None and not self.asked

    @property
    def is_local(self) -> bool:
        """Whether a model or a grader of the service labels. The others are endpoints, and people."""
        return self.people is None and self.endpoint is None

    @property
    def endpoint(self) -> Endpoint | None:
        """The endpoint that it asks, if any."""
        return None if self.judge is None else self.judge.endpoint


class LabellingSpec(RenderingSettings):
    """The body of `POST /v1/labellings`."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "data": "file-abc123",
                "writers": [{"model": "ft:meta-llama/Llama-3.1-8B:default:support:1a2b3c4d"}],
                "sampling": {"samples": 4},
                "labellers": [
                    {"judge": {"type": "reward_model", "model": "ft:meta-llama/Llama-3.1-8B:default:rm:5e6f"}}
                ],
            }
        }
    )

    data: FileName
    """A file with prompts. The answers of a file for training are not read, unless `own_answers` says so."""
    mapping: Mapping | None = None
    """How to read the rows of `data`, if their columns do not tell."""
    max_rows: Annotated[int, Field(ge=1, le=10**7)] | None = None
    """Use at most this many prompts. The seed decides which."""
    writers: Annotated[list[Writer], Field(max_length=MAX_WRITERS)] = []
    """The models that answer each prompt. Equal answers to a prompt count once."""
    own_answers: bool = False
    """Also label the answers that the rows of `data` have."""
    sampling: SamplingSpec | None = None
    """How each writer answers: `samples` answers at each of the `temperatures`."""
    labellers: Annotated[list[Labeller], Field(min_length=1, max_length=MAX_LABELLERS)]
    """The first one decides the order of the answers. The others give second opinions, and the report has their
    agreement."""
    quantization: Quantization | None = None
    """Quantisation of the base models. The default is that of the first writer's training."""
    max_length: Annotated[int, Field(ge=8, le=10**6)] | None = None
    """Maximum tokens of a prompt and its answer. In a longer row, the start of the prompt is cut off."""
    name: Annotated[str, StringConstraints(min_length=1, max_length=256, pattern=NO_NUL)] | None = None
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    gates: Gates | None = None
    """Bounds on the labelling's metrics, such as `margin/low`, or `kappa/low@NAME` for the second labeller NAME."""
    metadata: Annotated[Metadata, Field(max_length=16)] | None = None
    resources: Resources = Resources()
    """The devices that sample and score together. The file has the same bytes whatever their number. Null: one."""
    priority: Annotated[int, Field(ge=-100, le=100)] = 0
    timeout_seconds: Annotated[int, Field(ge=1, le=10**8)] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.writers and not self.own_answers:
            raise inconsistent("writers", "Nobody answers: name 'writers', or set 'own_answers'")
        if self.sampling is not None and not self.writers:
            raise inconsistent("sampling", "There are no 'writers': there is nothing to sample")
        if self.written == 1 and not self.own_answers:
            message = "One answer to a prompt cannot be compared: ask for more 'samples', or name more 'writers'"
            raise inconsistent("sampling.samples", message)
        if self.written > limits.MAX_ANSWERS:
            message = (
                f"{self.written} answers to a prompt are more than {limits.MAX_ANSWERS}, the most that a row holds"
            )
            raise inconsistent("sampling.samples", message)
        for number, labeller in enumerate(self.labellers):
            if labeller.asked and self.written > MAX_COMPARED:
                message = (
                    f"A judge that is asked compares every two answers: at most {MAX_COMPARED} answers to a prompt, "
                    f"not {self.written}"
                )
                raise inconsistent(f"labellers.{number}.judge", message)
            if labeller.people is not None and self.written > MAX_SHOWN:
                message = f"People rank at most {MAX_SHOWN} answers to a prompt, not {self.written}"
                raise inconsistent(f"labellers.{number}.people", message)
            if labeller.people is not None and any(other.people for other in self.labellers[:number]):
                raise inconsistent(f"labellers.{number}.people", "One labeller is 'people': all who have a key for it")
            if labeller.title in [other.title for other in self.labellers[:number]]:
                message = f"Two labellers are called '{labeller.title}': give them a 'name' each"
                raise inconsistent(f"labellers.{number}.name", message)
        for number, gate in enumerate(self.gates or []):
            require_metric(gate.metric, self.figures(), f"gates.{number}.metric")
        return self

    @property
    def written(self) -> int:
        """The number of answers to a prompt that the writers give."""
        return self.answers_of_a_writer * len(self.writers)

    @property
    def most_answers(self) -> int:
        """The most answers to a prompt that all labellers take, with those of the data."""
        most = MAX_COMPARED if any(labeller.asked for labeller in self.labellers) else limits.MAX_ANSWERS
        return min(most, MAX_SHOWN) if self.people is not None else most

    @property
    def answers_of_a_writer(self) -> int:
        """The number of answers that each writer gives to a prompt. At temperature 0 there is only one."""
        sampling = self.sampling or SamplingSpec()
        return sum(sampling.samples if temperature else 1 for temperature in sampling.temperatures)

    @property
    def people(self) -> People | None:
        """The people who label, if any."""
        return next((labeller.people for labeller in self.labellers if labeller.people is not None), None)

    def figures(self) -> list[str]:
        """The names of the metrics that the labelling will have."""
        first, *others = self.labellers
        return figures_of_labelling(
            [labeller.title for labeller in others],
            asked=first.asked,
            scores=first.scores,
            people=self.people is not None,
            endpoints=bool(self.endpoints()),
            priced=any(endpoint.price is not None for _, endpoint in self.endpoints()),
        )

    def endpoints(self) -> list[tuple[str, Endpoint]]:
        """(field, endpoint) of every endpoint that is asked."""
        writers = [(f"writers.{number}.endpoint", writer.endpoint) for number, writer in enumerate(self.writers)]
        judges = [(f"labellers.{number}.judge.endpoint", one.endpoint) for number, one in enumerate(self.labellers)]
        return [(field, endpoint) for field, endpoint in (*writers, *judges) if endpoint is not None]

    @classmethod
    def stored(cls, data: JsonObject) -> Self:
        """Read the spec from a labelling's database row. The next version may have written it."""
        return cls.model_validate(data, context=STORED)

    def to_store(self) -> JsonObject:
        """The spec for a database row."""
        return self.model_dump(mode="json")

    def resolved(self) -> Self:
        """The spec as it will be run: with a seed, a date and the sampling settings written out."""
        return self.model_copy(
            update={
                "sampling": self.sampling or (SamplingSpec() if self.writers else None),
                "seed": secrets.randbelow(2**31) if self.seed is None else self.seed,
                "date": self.date or today(),
            }
        )

    def files(self) -> list[tuple[str, str]]:
        """(field, file id or path) of every file that the labelling reads."""
        files = [("data", self.data)]
        for number, labeller in enumerate(self.labellers):
            if labeller.judge is not None and labeller.judge.classifier is not None:
                files.append((f"labellers.{number}.judge.classifier.file", labeller.judge.classifier.file))
        files += [(f"{field}classifier.file", one.classifier.file)
                  for field, one in self._graders() if not isinstance(one, RewardModel)]  # fmt: skip
        return files

    def with_files(self, places: dict[str, str]) -> Self:
        """A copy with other file names. `places` maps the fields that `files` returns to the new names."""
        return self.model_validate(with_files(self.model_dump(mode="json"), places))

    def sealed(self, seal: Callable[[str], str | None]) -> Self:
        """A copy in which `seal` has replaced the API keys of all endpoints."""
        body = self.model_copy(deep=True)
        for _, endpoint in body.endpoints():
            endpoint.api_key = None if endpoint.api_key is None else seal(endpoint.api_key)
        return body

    def models(self) -> list[tuple[str, str]]:
        """(field, name) of every model that the labelling loads."""
        models = [(f"writers.{number}.model", one.model) for number, one in enumerate(self.writers) if one.model]
        for number, labeller in enumerate(self.labellers):
            if labeller.judge is not None and labeller.judge.model is not None:
                models.append((f"labellers.{number}.judge.model", labeller.judge.model))
        return models + [(f"{field}model", one.model) for field, one in self._graders() if isinstance(one, RewardModel)]

    def scores(self, field: str) -> bool:
        """Whether the model of `field` scores answers. The others write."""
        _, number, kind, *_ = field.split(".")
        if not field.startswith("labellers."):
            return False
        return kind == "grader" or not self.labellers[int(number)].asked

    def _graders(self) -> Iterator[tuple[str, ByModel]]:
        """(path of its fields, grader) of every grader whose scores come from a model."""
        for number, labeller in enumerate(self.labellers):
            if labeller.grader is not None:
                for path, one in by_models(labeller.grader):
                    yield f"labellers.{number}.grader.{path}", one

    def needs(self, field: str = "data") -> Kind | None:
        """The kind of examples that the file of `field` must provide; None for a file without rows."""
        if field != "data":
            return None
        return Kind.SUPERVISED if self.own_answers else Kind.PROMPTS

    def reads(self, field: str) -> Mapping | None:
        """The mapping for the file of `field`; None if its columns tell."""
        return self.mapping if field == "data" else None

    def reading(self, field: str, mapping: Mapping) -> Self:
        """A copy that reads `data` by the mapping of its upload, unless the spec has its own."""
        return self.model_copy(update={"mapping": mapping}) if field == "data" and self.mapping is None else self
