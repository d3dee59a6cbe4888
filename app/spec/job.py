"""The job spec: the body of `POST /v1/fine_tuning/jobs`, and of `dpo train` with paths in place of file ids.

Pure pydantic; the trainer imports it too. A field that is not here is refused by name, and so is one of the
contract that is not built yet. Numbers left out or "auto" mean the default; `JobSpec.resolved` fills them in,
so that what is stored says what was run.
"""

import secrets
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, StringConstraints, model_validator

from app.spec.datasets.example import Kind
from app.spec.datasets.mapping import Mapping
from app.spec.datasets.rendering import RenderingSettings, today
from app.spec.evaluation import JobEvaluation
from app.spec.hyperparameters import DPOHyperparameters, SupervisedHyperparameters
from app.spec.metrics import METRICS
from app.spec.quality_gates import Gates, require_metric
from app.spec.schema_base import NO_NUL, STORED, FileName, Metadata, ModelName, Quantization, Strict, inconsistent

KEEP_CHECKPOINTS = 10
DEFAULT_VALIDATION_SPLIT = 0.05


class SupervisedMethod(Strict):
    """Configuration of the method `supervised`."""

    hyperparameters: SupervisedHyperparameters = SupervisedHyperparameters()


class DPOMethod(Strict):
    """Configuration of the method `dpo`."""

    hyperparameters: DPOHyperparameters = DPOHyperparameters()


METHODS: dict[str, type[SupervisedMethod | DPOMethod]] = {"supervised": SupervisedMethod, "dpo": DPOMethod}
"""By the type that a job gives; each is a field of `Method`."""
if TYPE_CHECKING:
    MethodType = str
else:
    MethodType = Literal[tuple(METHODS)]


class MethodSpec(Strict):
    """Which method, and its configuration."""

    NOT_BUILT = frozenset({"reinforcement"})

    type: MethodType
    supervised: SupervisedMethod | None = None
    dpo: DPOMethod | None = None

    @model_validator(mode="after")
    def _one_method(self) -> Self:
        for other in METHODS.keys() - {self.type}:
            if getattr(self, other) is not None:
                raise inconsistent(other, f"'{other}' does not go with the method type '{self.type}'")
        return self

    @property
    def hyperparameters(self) -> SupervisedHyperparameters | DPOHyperparameters:
        """Those of its type, the defaults where none are given."""
        return self._chosen.hyperparameters

    def resolved(self, full: bool) -> Self:
        """The same with every default filled in; `full` for full-parameter training."""
        method = self._chosen.model_copy(update={"hyperparameters": self.hyperparameters.resolved(full)})
        return self.model_copy(update={self.type: method})

    @property
    def _chosen(self) -> SupervisedMethod | DPOMethod:
        method: SupervisedMethod | DPOMethod = getattr(self, self.type) or METHODS[self.type]()
        return method


class SftStage(Strict):
    """A supervised stage before the preference stage, in the same job."""

    training_file: FileName | None = None
    """Without one, the stage trains on the preferred answers."""
    validation_file: FileName | None = None
    mapping: Mapping | None = None
    """How the rows of these files are read."""
    hyperparameters: SupervisedHyperparameters = SupervisedHyperparameters()


@dataclass(frozen=True)
class StageSpec:
    """A stage as a job asks for it: what it learns from, and how."""

    settings: SupervisedHyperparameters | DPOHyperparameters
    field: str
    """Where its hyperparameters are in the job."""
    file_field: str
    """Where its training file is."""
    training: tuple[str, ...]
    validation: str | None
    validation_split: float
    """The share of the training rows that is held out where there is no validation file."""
    mapping: Mapping | None

    @property
    def name(self) -> str:
        return self.settings.STAGE


SavedModule = Literal["embed_tokens", "lm_head"]


class Adapter(Strict):
    """A LoRA adapter (Hu et al. 2021)."""

    r: Annotated[int, Field(ge=1, le=1024)] = 16
    """Rank."""
    alpha: Annotated[float, Field(gt=0)] = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Acts in the SFT stage; the DPO stage has no dropout."""
    target_modules: Literal["all-linear"] | Annotated[list[str], Field(min_length=1, max_length=64)] = "all-linear"
    use_rslora: bool = False
    """Rank-stabilised scaling α/√r (Kalajdzievski 2023)."""
    use_dora: bool = False
    """Weight-decomposed adaptation (Liu et al. 2024): slower; not every server loads it."""
    modules_to_save: Annotated[list[Literal["embed_tokens", "lm_head"]], Field(min_length=1, max_length=2)] | None = (
        None
    )
    """Train the embeddings or the output head whole beside the adapter, where a base never learned its control tokens.
    It needs their memory six times; vLLM loads such a model only merged."""

    @model_validator(mode="after")
    def _head_stays_frozen(self) -> Self:
        if len(set(self.modules_to_save or [])) < len(self.modules_to_save or []):
            raise inconsistent("modules_to_save", "'modules_to_save' names a module twice")
        if "lm_head" in self.target_modules or "embed_tokens" in self.target_modules:
            raise inconsistent(
                "target_modules",
                "'target_modules' can name layers inside the model, not its head or embeddings; 'modules_to_save' "
                "trains those whole",
            )
        return self


class Wandb(Strict):
    """Where Weights & Biases keeps the run."""

    project: Annotated[str, StringConstraints(min_length=1, max_length=128, pattern=NO_NUL)]
    name: Annotated[str, StringConstraints(min_length=1, max_length=256, pattern=NO_NUL)] | None = None
    """The run's name; without one, the job's id."""
    entity: Annotated[str, StringConstraints(min_length=1, max_length=128, pattern=NO_NUL)] | None = None
    tags: Annotated[
        list[Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=NO_NUL)]], Field(max_length=32)
    ] = []


class Integration(Strict):
    """Another service that gets the job's metrics."""

    type: Literal["wandb"]
    wandb: Wandb


MORE = "more_training_files"


class JobSpec(RenderingSettings):
    """The body of `POST /v1/fine_tuning/jobs`."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "model": "meta-llama/Llama-3.1-8B",
                "training_file": "file-abc123",
                "sft": {"hyperparameters": {"n_epochs": 1}},
                "method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.1}}},
                "adapter": {"r": 16, "alpha": 32},
                "quantization": "nf4",
                "suffix": "support",
            }
        }
    )
    NOT_BUILT = frozenset({"evaluation"})

    model: ModelName
    training_file: FileName
    more_training_files: Annotated[list[FileName], Field(min_length=1, max_length=31)] | None = None
    """Files whose rows are trained on beside those of `training_file`, all read by one `mapping`."""
    validation_file: FileName | None = None
    method: MethodSpec = MethodSpec(type="supervised")
    hyperparameters: SupervisedHyperparameters | None = None
    """Deprecated by OpenAI in favour of `method`; for supervised jobs only."""
    sft: SftStage | None = None
    adapter: Adapter | Literal["none"] | None = None
    """None: a new LoRA adapter with the defaults, or the one that `model` already has."""
    quantization: Quantization | None = None
    double_quantization: bool | None = None
    """`nf4` quantises the blocks' scales too (Dettmers et al. 2023). With `false` it does not, for 0.37 bits a weight
    more."""
    compute_dtype: Literal["bf16", "fp16"] | None = None
    """The precision in which a GPU trains an adapter. The default is bf16, which cards before Ampere lack; with fp16
    losses are scaled. A CPU computes in float32."""
    suffix: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] | None = None
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    metadata: Annotated[Metadata, Field(max_length=16)] | None = None
    validation_split: Annotated[float, Field(ge=0, le=0.5)] | None = None
    priority: Annotated[int, Field(ge=-100, le=100)] = 0
    """Jobs of higher priority start first."""
    timeout_seconds: Annotated[int, Field(ge=1, le=10**8)] | None = None
    """Seconds that the job may train, waiting not counted; then it fails and keeps its checkpoints."""
    keep_checkpoints: Annotated[int, Field(ge=2, le=100)] = KEEP_CHECKPOINTS
    """The latest ones that are kept; older ones are removed unless another job or model needs them."""
    integrations: Annotated[list[Integration], Field(max_length=5)] | None = None
    evaluations: Annotated[list[JobEvaluation], Field(max_length=8)] | None = None
    """Of the model that the job makes, once it has: jobs of their own, which wait for it."""
    gates: Gates | None = None
    """On metrics of the training, or `evaluations/NAME/METRIC`."""
    mapping: Mapping | None = None
    """How the rows of `training_file` and `validation_file` are read, where their columns do not say it."""

    @model_validator(mode="before")
    @classmethod
    def _nulls(cls, data: Any) -> Any:
        # The official client sends null for what was passed as None.
        if isinstance(data, dict):
            return {k: v for k, v in data.items() if v is not None or k not in ("method", "priority")}
        return data

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.hyperparameters is not None:
            if self.method.type != "supervised" or self.method.supervised is not None:
                raise inconsistent(
                    "hyperparameters",
                    "'hyperparameters' goes with a supervised job without 'method'; set it there",
                )
            self.method = MethodSpec(
                type="supervised", supervised=SupervisedMethod(hyperparameters=self.hyperparameters)
            )
            self.hyperparameters = None
        trained = [self.training_file, *(self.more_training_files or [])]
        if len(set(trained)) < len(trained):
            raise inconsistent("more_training_files", "A file is named twice; 'n_epochs' goes round all of them again")
        if self.sft is not None and self.method.type == "supervised":
            raise inconsistent("sft", "'sft' runs before the method 'dpo'; a supervised job has that one stage already")
        if self.sft is not None and self.sft.validation_file is not None and self.sft.training_file is None:
            raise inconsistent("sft.validation_file", "'sft.validation_file' goes with 'sft.training_file'")
        if self.sft is not None and self.sft.mapping is not None and self.sft.training_file is None:
            raise inconsistent("sft.mapping", "'sft.mapping' goes with 'sft.training_file'")
        if self.adapter == "none" and self.quantization in ("nf4", "int8"):
            raise inconsistent("quantization", "Full-parameter training (adapter 'none') needs quantization 'none'")
        if self.double_quantization is not None and (self.adapter == "none" or self.quantization in ("none", "int8")):
            raise inconsistent("double_quantization", "'double_quantization' goes with 'quantization': 'nf4'")
        if self.compute_dtype is not None and self.adapter == "none":
            raise inconsistent("compute_dtype", "Full-parameter training keeps its weights in float32: it has no other")
        if self.validation_file is not None and self.validation_split:
            raise inconsistent("validation_split", "Give 'validation_file' or 'validation_split', not both")
        self._validated()
        self._gated()
        return self

    def _gated(self) -> None:
        """Gates are on what will be measured."""
        evaluations = {evaluation.name: evaluation for evaluation in self.evaluations or []}
        if len(evaluations) < len(self.evaluations or []):
            raise inconsistent("evaluations", "Two of the 'evaluations' have the same name")
        for number, gate in enumerate(self.gates or []):
            field = f"gates.{number}.metric"
            if not gate.metric.startswith("evaluations/"):
                require_metric(gate.metric, list(METRICS), field)
                continue
            name, _, metric = gate.metric.removeprefix("evaluations/").partition("/")
            if name not in evaluations:
                raise inconsistent(field, f"There is no evaluation '{name}' in 'evaluations'")
            require_metric(metric, evaluations[name].figures(), field)

    def _validated(self) -> None:
        """Early stopping needs something to judge by."""
        for stage in reversed(self.stages()):
            validated = stage.validation is not None or stage.validation_split > 0
            if stage.settings.early_stopping is not None and not validated:
                message = "'early_stopping' needs a 'validation_file' or a 'validation_split' above 0"
                raise inconsistent(f"{stage.field}.early_stopping", message)

    @classmethod
    def stored(cls, data: dict[str, Any]) -> Self:
        """The spec of a job's row, which the next version may have written."""
        return cls.model_validate(data, context=STORED)

    def to_store(self) -> dict[str, Any]:
        """The spec as a job's row has it: what the version before does not know is there only where it was set."""
        stored = self.model_dump(mode="json")
        if self.keep_checkpoints == KEEP_CHECKPOINTS:
            del stored["keep_checkpoints"]
        for name in ("evaluations", MORE, "double_quantization", "compute_dtype"):
            if stored[name] is None:
                del stored[name]
        if isinstance(stored["adapter"], dict) and stored["adapter"]["modules_to_save"] is None:
            del stored["adapter"]["modules_to_save"]
        return stored

    def without_keys(self) -> Self:
        """The same without the keys of judges, which the evaluations' own rows have, sealed."""
        sealed = [evaluation.sealed(lambda _: None) for evaluation in self.evaluations or []]
        return self.model_copy(update={"evaluations": sealed or None})

    def resolved(self) -> Self:
        """The spec as it will be run: no "auto", a seed, and every default written out."""
        full = self.adapter == "none"
        sft = self.sft and self.sft.model_copy(update={"hyperparameters": self.sft.hyperparameters.resolved(full)})
        return self.model_copy(
            update={
                "method": self.method.resolved(full),
                "sft": sft,
                "adapter": Adapter() if self.adapter is None else self.adapter,
                "quantization": self.quantization or ("none" if full else "nf4"),
                "seed": secrets.randbelow(2**31) if self.seed is None else self.seed,
                "validation_split": self.stages()[-1].validation_split,
                "date": self.date or today(),
            }
        )

    def stages(self) -> list[StageSpec]:
        """The stages that the job runs, in order: a supervised stage where it asks for one, then its method."""
        split = self.validation_split
        if split is None:
            split = 0.0 if self.validation_file is not None else DEFAULT_VALIDATION_SPLIT
        training = (self.training_file, *(self.more_training_files or []))
        field = f"method.{self.method.type}.hyperparameters"
        settings = self.method.hyperparameters
        main = StageSpec(settings, field, "training_file", training, self.validation_file, split, self.mapping)
        if self.sft is None:
            return [main]
        sft = replace(main, settings=self.sft.hyperparameters, field="sft.hyperparameters")
        if self.sft.training_file is not None:
            own = split if self.validation_file is None else DEFAULT_VALIDATION_SPLIT
            sft = replace(
                sft,
                file_field="sft.training_file",
                training=(self.sft.training_file,),
                validation=self.sft.validation_file,
                validation_split=own if self.sft.validation_file is None else 0.0,
                mapping=self.sft.mapping,
            )
        return [sft, main]

    def files(self) -> list[tuple[str, str]]:
        """(field, file id or path) of every file that the job reads."""
        named: list[tuple[str, str | None]] = [("training_file", self.training_file)]
        named += [(f"{MORE}.{number}", name) for number, name in enumerate(self.more_training_files or [])]
        named.append(("validation_file", self.validation_file))
        if self.sft is not None:
            named += [
                ("sft.training_file", self.sft.training_file),
                ("sft.validation_file", self.sft.validation_file),
            ]
        return [(field, name) for field, name in named if name is not None]

    def trained(self, field: str = "training_file") -> list[str]:
        """The fields of all files that are trained on together with that of `field`."""
        more = range(len(self.more_training_files or []) if field == "training_file" else 0)
        return [field, *(f"{MORE}.{number}" for number in more)]

    def reads(self, field: str) -> Mapping | None:
        """How the rows of the file of `field` are read."""
        return self.sft.mapping if field.startswith("sft.") and self.sft is not None else self.mapping

    def with_files(self, places: dict[str, str]) -> Self:
        """The same job with other names for its files: `places` maps fields, as `files` names them, to names."""
        body = self.model_dump(mode="json")
        for field, place in places.items():
            if field.startswith(f"{MORE}."):
                body[MORE][int(field.rpartition(".")[2])] = place
            else:
                target = body["sft"] if field.startswith("sft.") else body
                target[field.removeprefix("sft.")] = place
        return self.model_validate(body)

    @property
    def reference_model(self) -> str | None:
        """The name of the model that the policy is held to, where it is not the policy itself."""
        return self.method.dpo.hyperparameters.reference_model if self.method.dpo is not None else None

    @property
    def trains_rewards(self) -> bool:
        """Whether the job makes a reward model."""
        return self.method.dpo is not None and self.method.dpo.hyperparameters.rewards

    def needs(self, field: str) -> Kind:
        """What the examples in the file of `field` must be good for."""
        return Kind.SUPERVISED if field.startswith("sft.") else self.method.hyperparameters.data
