"""The job spec: the body of `POST /v1/fine_tuning/jobs`, and of `dpo train` with paths in place of file ids.

This module is pure pydantic; the trainer imports it too. Unknown fields are refused by name. Fields of OpenAI's
contract that are not supported yet are refused too. A field that is left out, null or "auto" has its default.
`JobSpec.resolved` fills in the defaults, so that the stored spec says what was run.
"""

import secrets
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import ConfigDict, Field, StringConstraints, ValidationInfo, model_validator

from app.spec.datasets.example import Kind
from app.spec.datasets.mapping import Mapping
from app.spec.datasets.rendering import RenderingSettings, today
from app.spec.evaluation import JobEvaluation
from app.spec.graders.schemas import ByClassifier, ByModel, Grader, RewardModel, by_models
from app.spec.hyperparameters import (
    DPOHyperparameters,
    Hyperparameters,
    ReinforcementHyperparameters,
    SupervisedHyperparameters,
)
from app.spec.json_types import JsonObject
from app.spec.metrics import METRICS, VALIDATION
from app.spec.quality_gates import Gates, require_metric
from app.spec.resources import Parallel, Resources
from app.spec.schema_base import (
    NO_NUL,
    STORED,
    Automatic,
    FileName,
    Metadata,
    ModelName,
    Quantization,
    Strict,
    inconsistent,
    with_files,
)

KEEP_CHECKPOINTS = 10
DEFAULT_VALIDATION_SPLIT = 0.05


class SupervisedMethod(Automatic):
    """Configuration of the method `supervised`."""

    hyperparameters: SupervisedHyperparameters = SupervisedHyperparameters()


class DPOMethod(Automatic):
    """Configuration of the method `dpo`."""

    hyperparameters: DPOHyperparameters = DPOHyperparameters()


class ReinforcementMethod(Automatic):
    """Configuration of the method `reinforcement`, as OpenAI's client types it."""

    NOT_BUILT = frozenset({"response_format"})

    grader: Grader
    """It gives each answer its reward."""
    hyperparameters: ReinforcementHyperparameters = ReinforcementHyperparameters()


AnyMethod = SupervisedMethod | DPOMethod | ReinforcementMethod
METHODS: dict[str, type[AnyMethod]] = {
    "supervised": SupervisedMethod,
    "dpo": DPOMethod,
    "reinforcement": ReinforcementMethod,
}
"""The configuration of each method, by the `type` that a job names. Each is also a field of `MethodSpec`."""
if TYPE_CHECKING:
    MethodType = str
else:
    MethodType = Literal[tuple(METHODS)]


class MethodSpec(Automatic):
    """The training method and its configuration."""

    type: MethodType
    supervised: SupervisedMethod | None = None
    dpo: DPOMethod | None = None
    reinforcement: ReinforcementMethod | None = None

    @model_validator(mode="after")
    def _one_method(self) -> Self:
        for other in METHODS.keys() - {self.type}:
            if getattr(self, other) is not None:
                raise inconsistent(other, f"'{other}' does not go with the method type '{self.type}'")
        if self.type == "reinforcement" and self.reinforcement is None:
            raise inconsistent("reinforcement", "The method 'reinforcement' needs 'reinforcement.grader'")
        return self

    @property
    def hyperparameters(self) -> Hyperparameters:
        """The hyperparameters of the chosen method; the defaults if the job gives none."""
        return self._chosen.hyperparameters

    def resolved(self, full: bool) -> Self:
        """A copy with the defaults of its hyperparameters filled in. `full`: the job trains all parameters."""
        method = self._chosen.model_copy(update={"hyperparameters": self.hyperparameters.resolved(full)})
        return self.model_copy(update={self.type: method})

    @property
    def _chosen(self) -> AnyMethod:
        method: AnyMethod | None = getattr(self, self.type)
        if method is None:  # not for reinforcement, which needs a grader
            method = DPOMethod() if self.type == "dpo" else SupervisedMethod()
        return method


class SftStage(Automatic):
    """A supervised stage before the stage of the method, in the same job."""

    training_file: FileName | None = None
    """Without it, the stage trains on the preferred answers of the job's own training files."""
    validation_file: FileName | None = None
    mapping: Mapping | None = None
    """The mapping by which the rows of these two files are read."""
    hyperparameters: SupervisedHyperparameters = SupervisedHyperparameters()


@dataclass(frozen=True)
class StageSpec:
    """A stage that a job asks for: its data and its settings."""

    settings: Hyperparameters
    field: str
    """The path of its hyperparameters in the job spec."""
    file_field: str
    """The path of its training file in the job spec."""
    training: tuple[str, ...]
    validation: str | None
    validation_split: float
    """The share of the training rows to hold out for validation, if there is no validation file."""
    mapping: Mapping | None

    @property
    def name(self) -> str:
        return self.settings.STAGE

    @property
    def validates(self) -> bool:
        """Whether the stage asks for validation rows."""
        return self.validation is not None or self.validation_split > 0

    @property
    def writes(self) -> bool:
        """Whether the model writes the answers that it learns from."""
        return self.settings.data == Kind.PROMPTS


SavedModule = Literal["embed_tokens", "lm_head"]


class Adapter(Automatic):
    """A LoRA adapter (Hu et al. 2021)."""

    r: Annotated[int, Field(ge=1, le=1024)] = 16
    """The rank of the update."""
    alpha: Annotated[float, Field(gt=0)] = 32
    """The update is scaled by α/r."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input, in the SFT stage only: the DPO stage has no dropout."""
    target_modules: Literal["all-linear"] | Annotated[list[str], Field(min_length=1, max_length=64)] = "all-linear"
    use_rslora: bool = False
    """Scale the update by α/√r instead of α/r: rank-stabilised LoRA (Kalajdzievski 2023)."""
    use_dora: bool = False
    """Weight-decomposed adaptation (Liu et al. 2024). It is slower, and not every inference server loads it."""
    modules_to_save: Annotated[list[SavedModule], Field(min_length=1, max_length=2)] | None = None
    """Also train the embeddings or the output head in full: for a base that never learned its control tokens. This
    takes six times their memory. vLLM loads such a model only if it is merged."""

    @model_validator(mode="after")
    def _modules_are_valid(self) -> Self:
        if len(set(self.modules_to_save or [])) < len(self.modules_to_save or []):
            raise inconsistent("modules_to_save", "'modules_to_save' names a module twice")
        if "lm_head" in self.target_modules or "embed_tokens" in self.target_modules:
            raise inconsistent(
                "target_modules",
                "'target_modules' can name layers inside the model, not its head or embeddings; 'modules_to_save' "
                "trains those whole",
            )
        return self


class Wandb(Automatic):
    """The Weights & Biases run that gets the job's metrics."""

    project: Annotated[str, StringConstraints(min_length=1, max_length=128, pattern=NO_NUL)]
    name: Annotated[str, StringConstraints(min_length=1, max_length=256, pattern=NO_NUL)] | None = None
    """The run's name; the default is the job's id."""
    entity: Annotated[str, StringConstraints(min_length=1, max_length=128, pattern=NO_NUL)] | None = None
    tags: Annotated[
        list[Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=NO_NUL)]], Field(max_length=32)
    ] = []


class Integration(Strict):
    """An external service that gets the job's metrics."""

    type: Literal["wandb"]
    wandb: Wandb


MORE, CLASSIFIER = "more_training_files", "classifier.file"


class JobSpec(RenderingSettings, Automatic):
    """The body of `POST /v1/fine_tuning/jobs`. A field that is null or "auto" has its default."""

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
    """More training files. Their rows are added to those of `training_file` and read with the same `mapping`."""
    validation_file: FileName | None = None
    method: MethodSpec = MethodSpec(type="supervised")
    hyperparameters: SupervisedHyperparameters | None = None
    """Deprecated by OpenAI in favour of `method`. Only supervised jobs take it."""
    sft: SftStage | None = None
    """A supervised stage to run before the stage of the method."""
    adapter: Adapter | Literal["none"] | None = None
    """Null: the adapter of `model`, or a new LoRA adapter with the defaults. `none`: train all parameters."""
    quantization: Quantization | None = None
    double_quantization: bool | None = None
    """Whether `nf4` also quantises the scales of its blocks (Dettmers et al. 2023), which is the default. `false` takes
    0.37 bits more per weight."""
    compute_dtype: Literal["bf16", "fp16", "fp8"] | None = None
    """The precision in which a GPU trains an adapter. The default is bf16, which GPUs before Ampere do not support.
    With fp16 the loss is scaled. With fp8 the base's weights and products have 8 bits, and all else has bf16; GPUs
    before Ada do not support it. A CPU computes in float32."""
    suffix: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] | None = None
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    metadata: Annotated[Metadata, Field(max_length=16)] | None = None
    validation_split: Annotated[float, Field(ge=0, le=0.5)] | None = None
    """The share of the training rows to hold out for validation. The default is 0.05 without a `validation_file`."""
    resources: Resources = Resources()
    parallel: Parallel = Parallel()
    priority: Annotated[int, Field(ge=-100, le=100)] = 0
    """Within a project, jobs with a higher priority start first."""
    timeout_seconds: Annotated[int, Field(ge=1, le=10**8)] | None = None
    """Maximum training time in seconds, without waiting time. A job that exceeds it fails and keeps its checkpoints."""
    keep_checkpoints: Annotated[int, Field(ge=2, le=100)] = KEEP_CHECKPOINTS
    """How many of the latest checkpoints to keep. Older ones are removed unless another job or model needs them."""
    integrations: Annotated[list[Integration], Field(max_length=5)] | None = None
    evaluations: Annotated[list[JobEvaluation], Field(max_length=8)] | None = None
    """Evaluations of the model that the job makes. They are separate jobs, which start when this one has succeeded."""
    gates: Gates | None = None
    """Bounds on metrics of the training, or of its evaluations as `evaluations/NAME/METRIC`."""
    mapping: Mapping | None = None
    """How to read the rows of `training_file` and `validation_file`, if their columns do not tell."""

    @model_validator(mode="after")
    def _consistent(self, info: ValidationInfo) -> Self:
        if self.hyperparameters is not None:
            if self.method.type != "supervised" or self.method.supervised is not None:
                raise inconsistent(
                    "hyperparameters",
                    "'hyperparameters' is for a supervised job without 'method'; else set them in 'method'",
                )
            self.method = MethodSpec(
                type="supervised", supervised=SupervisedMethod(hyperparameters=self.hyperparameters)
            )
            self.hyperparameters = None
        training_files = [self.training_file, *(self.more_training_files or [])]
        if len(set(training_files)) < len(training_files):
            raise inconsistent("more_training_files", "A file is named twice; use 'n_epochs' to repeat all files")
        if self.sft is not None and self.method.type == "supervised":
            raise inconsistent("sft", "'sft' runs before another method; a supervised job is one SFT stage already")
        has_no_answers = self.method.type == "reinforcement" and info.context != STORED
        if self.sft is not None and self.sft.training_file is None and has_no_answers:
            message = "'sft' before reinforcement needs a file with answers of its own: the job's files are prompts"
            raise inconsistent("sft.training_file", message)
        if self.sft is not None and self.sft.validation_file is not None and self.sft.training_file is None:
            raise inconsistent("sft.validation_file", "'sft.validation_file' goes with 'sft.training_file'")
        if self.sft is not None and self.sft.mapping is not None and self.sft.training_file is None:
            raise inconsistent("sft.mapping", "'sft.mapping' goes with 'sft.training_file'")
        if self.adapter == "none" and self.quantization in ("nf4", "int8"):
            raise inconsistent("quantization", "Full-parameter training (adapter 'none') needs quantization 'none'")
        if self.double_quantization is not None and (self.adapter == "none" or self.quantization in ("none", "int8")):
            raise inconsistent("double_quantization", "'double_quantization' goes with 'quantization': 'nf4'")
        if self.compute_dtype is not None and self.adapter == "none":
            raise inconsistent("compute_dtype", "Full-parameter training always keeps its weights in float32")
        if self.compute_dtype == "fp8":
            if self.quantization in ("nf4", "int8"):
                message = "'compute_dtype': 'fp8' gives the base 8 bits a weight; it goes with 'quantization': 'none'"
                raise inconsistent("compute_dtype", message)
            if isinstance(self.adapter, Adapter) and self.adapter.use_dora:
                raise inconsistent("adapter.use_dora", "DoRA needs the base's own weights; it has no 'fp8'")
        if self.parallel.shard and (reason := self.why_not_sharded()) is not None:
            raise inconsistent("parallel.shard", reason)
        if self.validation_file is not None and self.validation_split:
            raise inconsistent("validation_split", "Give 'validation_file' or 'validation_split', not both")
        self._require_validation_rows()
        if info.context != STORED:  # a job that was accepted is not refused later
            self._require_known_metrics()
        return self

    def why_not_sharded(self) -> str | None:
        """The reason why the model of this job cannot be divided among devices; None if it can."""
        for stage in self.stages():
            settings = stage.settings
            if settings.data == Kind.PROMPTS:
                return "To write answers, each device needs the whole model"
            if settings.compile:
                return f"Compiled layers cannot be sharded; drop '{stage.field}.compile'"
            if self.adapter == "none" and settings.optimizer not in ("adamw", "rmsprop"):
                return f"The optimizer '{settings.optimizer}' cannot be sharded; use 'adamw'"
            if self.adapter == "none" and getattr(settings, "sync_reference", None) is not None:
                return f"A model that is trained in full cannot be sharded with '{stage.field}.sync_reference'"
        return None

    def _require_known_metrics(self) -> None:
        """Refuse a gate on a metric that will not be measured."""
        evaluations, last = {evaluation.name: evaluation for evaluation in self.evaluations or []}, self.stages()[-1]
        if len(evaluations) < len(self.evaluations or []):
            raise inconsistent("evaluations", "Two of the 'evaluations' have the same name")
        for number, gate in enumerate(self.gates or []):
            field = f"gates.{number}.metric"
            if not gate.metric.startswith("evaluations/"):
                require_metric(gate.metric, list(METRICS), field)
                last.settings.require_metric(gate.metric, field)
                if gate.metric in VALIDATION and not last.validates:
                    message = f"'{gate.metric}' needs a 'validation_file' or a 'validation_split' above 0"
                    raise inconsistent(field, message)
                continue
            name, _, metric = gate.metric.removeprefix("evaluations/").partition("/")
            if name not in evaluations:
                raise inconsistent(field, f"There is no evaluation '{name}' in 'evaluations'")
            require_metric(metric, evaluations[name].figures(), field)

    def _require_validation_rows(self) -> None:
        """Refuse early stopping without validation rows."""
        for stage in reversed(self.stages()):
            if stage.settings.early_stopping is not None and not stage.validates:
                message = "'early_stopping' needs a 'validation_file' or a 'validation_split' above 0"
                raise inconsistent(f"{stage.field}.early_stopping", message)

    @classmethod
    def stored(cls, data: JsonObject) -> Self:
        """Read the spec of a job that was accepted. The next version may have written it."""
        return cls.model_validate(data, context=STORED)

    def to_store(self) -> JsonObject:
        """The spec for a job's database row. Fields that the previous version does not know are left out unless set."""
        stored = self.model_dump(mode="json")
        if self.keep_checkpoints == KEEP_CHECKPOINTS:
            del stored["keep_checkpoints"]
        for name in ("evaluations", MORE, "double_quantization", "compute_dtype"):
            if stored[name] is None:
                del stored[name]
        for name, default in (("resources", Resources()), ("parallel", Parallel())):
            if getattr(self, name) == default:
                del stored[name]
        if self.method.reinforcement is None:
            del stored["method"]["reinforcement"]
        if self.parallel.shard is None and "parallel" in stored:
            del stored["parallel"]["shard"]
        for name in ("pairs", "min_margin"):
            settings = (stored["method"]["dpo"] or {}).get("hyperparameters") or {}
            if settings.get(name) is None:
                settings.pop(name, None)
        if isinstance(stored["adapter"], dict) and stored["adapter"]["modules_to_save"] is None:
            del stored["adapter"]["modules_to_save"]
        return stored

    def without_keys(self) -> Self:
        """A copy without the API keys of judges. The rows of the evaluations have them, encrypted."""
        evaluations = [evaluation.sealed(lambda _: None) for evaluation in self.evaluations or []]
        return self.model_copy(update={"evaluations": evaluations or None})

    def resolved(self) -> Self:
        """The spec as it will be run: with a seed, a date, and the defaults written out.

        Settings that depend on the model, the rows or the device stay null.
        """
        full = self.adapter == "none"
        sft = self.sft and self.sft.model_copy(update={"hyperparameters": self.sft.hyperparameters.resolved(full)})
        return self.model_copy(
            update={
                "method": self.method.resolved(full),
                "sft": sft,
                "adapter": Adapter() if self.adapter is None else self.adapter,
                "quantization": self.quantization or ("none" if full or self.compute_dtype == "fp8" else "nf4"),
                "seed": secrets.randbelow(2**31) if self.seed is None else self.seed,
                "validation_split": self.stages()[-1].validation_split,
                "date": self.date or today(),
            }
        )

    @property
    def weights(self) -> str:
        """How a GPU holds the weights of the base's layers: `nf4`, `int8`, `fp8` or `none`, which is 16 bits."""
        return "fp8" if self.compute_dtype == "fp8" else self.quantization or "none"

    def stages(self) -> list[StageSpec]:
        """The stages of the job in order: the supervised stage if it asks for one, then the stage of its method."""
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
            sft_split = split if self.validation_file is None else DEFAULT_VALIDATION_SPLIT
            sft = replace(
                sft,
                file_field="sft.training_file",
                training=(self.sft.training_file,),
                validation=self.sft.validation_file,
                validation_split=sft_split if self.sft.validation_file is None else 0.0,
                mapping=self.sft.mapping,
            )
        return [sft, main]

    def files(self) -> list[tuple[str, str]]:
        """(field, file id or path) of every file that the job reads."""
        files: list[tuple[str, str | None]] = [("training_file", self.training_file)]
        files += [(f"{MORE}.{number}", name) for number, name in enumerate(self.more_training_files or [])]
        files.append(("validation_file", self.validation_file))
        if self.sft is not None:
            files += [
                ("sft.training_file", self.sft.training_file),
                ("sft.validation_file", self.sft.validation_file),
            ]
        files += [
            (f"{path}{CLASSIFIER}", grader.source)
            for path, grader in self._by_models if isinstance(grader, ByClassifier)
        ]  # fmt: skip
        return [(field, name) for field, name in files if name is not None]

    def training_fields(self, field: str = "training_file") -> list[str]:
        """The fields of all files that are trained on together with the file of `field`, itself included."""
        numbers = range(len(self.more_training_files or []) if field == "training_file" else 0)
        return [field, *(f"{MORE}.{number}" for number in numbers)]

    def reads(self, field: str) -> Mapping | None:
        """The mapping for the file of `field`; None if its columns tell."""
        return self.sft.mapping if field.startswith("sft.") and self.sft is not None else self.mapping

    def with_files(self, places: dict[str, str]) -> Self:
        """A copy with other file names. `places` maps the fields that `files` returns to the new names."""
        return self.stored(with_files(self.model_dump(mode="json"), places))

    @property
    def reference_model(self) -> str | None:
        """The name of the reference model, if the job names one other than the initial policy."""
        return self.method.dpo.hyperparameters.reference_model if self.method.dpo is not None else None

    @property
    def grader_models(self) -> list[tuple[str, str]]:
        """(field, name) of every reward model that grades answers."""
        return [(f"{path}model", grader.model) for path, grader in self._by_models if isinstance(grader, RewardModel)]

    @property
    def _by_models(self) -> list[tuple[str, ByModel]]:
        """(path, grader) of every grader whose scores come from a model."""
        graders = [] if self.method.reinforcement is None else by_models(self.method.reinforcement.grader)
        return [(f"method.reinforcement.grader.{path}", grader) for path, grader in graders]

    @property
    def trains_rewards(self) -> bool:
        """Whether the job trains a reward model."""
        return self.method.dpo is not None and self.method.dpo.hyperparameters.rewards

    def needs(self, field: str) -> Kind | None:
        """The kind of examples that the file of `field` must provide; None for a file without rows."""
        if field.endswith(CLASSIFIER):
            return None
        return Kind.SUPERVISED if field.startswith("sft.") else self.method.hyperparameters.data
