"""The hyperparameters of a stage. None and "auto" mean the default, which `resolved` fills in."""

from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from app.spec.datasets.example import Kind
from app.spec.losses import LOSSES, OPTIONS, SHARED, Loss, LossName
from app.spec.metrics import TRAINING
from app.spec.schema_base import Auto, Strict, inconsistent

if TYPE_CHECKING:
    StoppingMetric = str
else:
    StoppingMetric = Literal[tuple(f"eval/{name}" for name, metric in TRAINING.items() if metric.stops)]


DEFAULT_MAX_LENGTH = 2048
"""Tokens of a row where a job says nothing, and the model's context is no shorter."""


class EarlyStopping(Strict):
    """Stop when a validation metric no longer gets better, and keep the weights of its best step."""

    metric: StoppingMetric = "eval/loss"
    """`eval/loss` is better when it is lower, every other one when it is higher."""
    patience: Annotated[int, Field(ge=1, le=1000)] = 3
    """Validations without an improvement before the stage stops."""
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """What counts as an improvement."""


class SyncReference(Strict):
    """TR-DPO (Gorbatovski et al. 2024): the reference follows the policy."""

    alpha: Annotated[float, Field(gt=0, le=1)] = 0.6
    """reference ← α policy + (1 − α) reference. Of an adapter its two factors are mixed, each by itself."""
    steps: Annotated[int, Field(ge=1, le=10**9)] = 512
    """Optimizer steps between two updates of the reference."""


class WeightedLoss(Strict):
    """One term of a weighted sum of losses."""

    name: LossName
    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0


class Hyperparameters(Strict):
    """What every stage has."""

    METHOD: ClassVar[str]
    """The type of method that runs the stage."""
    STAGE: ClassVar[str]
    """The name of the stage in progress, events and checkpoints."""
    ACCURACY: ClassVar[str]
    """The metric that result files call the accuracy."""
    LEARNING_RATES: ClassVar[tuple[float, float]]
    """The default peak for an adapter, and for full-parameter training."""

    batch_size: Annotated[Annotated[int, Field(ge=1, le=256)] | None, Auto] = None
    """Rows (for DPO: pairs) per optimizer step."""
    n_epochs: Annotated[Annotated[int, Field(ge=1, le=50)] | None, Auto] = None
    learning_rate_multiplier: Annotated[Annotated[float, Field(gt=0, le=1e30)] | None, Auto] = None
    learning_rate: Annotated[Annotated[float, Field(gt=0, le=1)] | None, Auto] = None
    """Peak learning rate before the multiplier."""
    max_length: Annotated[Annotated[int, Field(ge=16, le=10**7)] | None, Auto] = None
    """Tokens of a prompt and one answer; the default is the model's context, at most 2,048."""
    truncation: Literal["keep_end", "keep_start", "drop"] = "keep_end"
    """Of a row that is longer than `max_length`: keep the end of its prompt, or its start, or leave the row out. Prompt
    and answer each have half of the room, and what the other does not need."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """The share of the steps in which the learning rate rises to its peak."""
    warmup_steps: Annotated[Annotated[int, Field(ge=0, le=10**9)] | None, Auto] = None
    """So many steps of it instead; the DPO paper has 150."""
    lr_scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "rmsprop"] = "adamw"
    """The 8-bit ones (Dettmers et al. 2022) need a GPU; `rmsprop` is the DPO paper's."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    max_steps: Annotated[Annotated[int, Field(ge=1, le=10**9)] | None, Auto] = None
    """Stop after this many optimizer steps, or go round again until they are reached."""
    eval_every: Annotated[Annotated[int, Field(ge=1, le=10**9)] | None, Auto] = None
    """Optimizer steps between validations; the default is a fifth of the stage."""
    checkpoint_every: Annotated[Annotated[int, Field(ge=1, le=10**9)] | None, Auto] = None
    """Optimizer steps between checkpoints; the default is a fifth of the stage."""
    early_stopping: EarlyStopping | None = None
    activation_checkpointing: Annotated[bool | None, Auto] = None
    """Recompute activations in the backward pass. The default: only where they would not fit into memory."""
    compile: bool = False
    """Compile the model's layers with torch.compile: minutes at the start, faster steps after it."""

    @property
    @abstractmethod
    def data(self) -> Kind:
        """The kind of examples that the stage learns from."""

    @property
    def scored(self) -> Literal["answers", "turns", "text"]:
        """Which part of a row the loss is on."""
        return "answers"

    def resolved(self, full: bool) -> Self:
        """The same with every default filled in; `full` for full-parameter training."""
        return self.model_copy(
            update={
                "batch_size": self.batch_size or 16,
                "n_epochs": self.n_epochs or 1,
                "learning_rate_multiplier": self.learning_rate_multiplier or 1.0,
                "learning_rate": self.learning_rate or self.LEARNING_RATES[full],
            }
        )


class SupervisedHyperparameters(Hyperparameters):
    """SFT."""

    METHOD = "supervised"
    STAGE = "sft"
    ACCURACY = "mean_token_accuracy"
    LEARNING_RATES = (2e-4, 2e-5)

    loss: Literal["nll", "dft"] = "nll"
    """Negative log-likelihood, or Dynamic Fine-Tuning (Wu et al. 2025), which weighs each token by its probability."""
    loss_on: Literal["answers", "turns", "text"] = "answers"
    """Score the last answer, every assistant turn of the conversation, or all of the text."""

    @model_validator(mode="after")
    def _validation_metric(self) -> Self:
        if self.early_stopping and self.early_stopping.metric.startswith("eval/rewards"):
            raise inconsistent("early_stopping.metric", f"SFT has no metric '{self.early_stopping.metric}'")
        return self

    @property
    def data(self) -> Kind:
        return Kind.SUPERVISED

    @property
    def scored(self) -> Literal["answers", "turns", "text"]:
        return self.loss_on


class DPOHyperparameters(Hyperparameters):
    """The preference stage: DPO (Rafailov et al. 2023), and what came after it."""

    METHOD = "dpo"
    STAGE = "dpo"
    ACCURACY = "rewards/accuracies"
    LEARNING_RATES = (5e-5, 1e-6)

    beta: Annotated[Annotated[float, Field(gt=0, le=100)] | None, Auto] = None
    """β of Eq. 7: how strongly the policy is held to the reference. Each loss has its own default."""
    loss: LossName | Annotated[list[WeightedLoss], Field(min_length=1, max_length=8)] = "sigmoid"
    """A loss, or a weighted sum of losses."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] | None = None
    """The share of labels believed to be wrong; with `sigmoid` it makes cDPO."""
    f_divergence: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] | None = None
    """What holds the policy to the reference (Wang et al. 2023); the default is the reverse KL divergence."""
    f_alpha: Annotated[float, Field(gt=0, lt=1)] | None = None
    """α of the α-divergence; the default is 0.5."""
    ld_alpha: Annotated[float, Field(ge=0, le=1)] | None = None
    """LD-DPO (Liu et al. 2024): the weight of an answer's tokens beyond the other answer's length."""
    use_weighting: bool | None = None
    """WPO (Zhou et al. 2024): weigh each pair by how likely the policy is to write it."""
    ipo_length_average: bool | None = None
    """Average IPO's log-ratios over the answer's tokens (the default, and the published results), or sum them."""
    discopop_tau: Annotated[float, Field(gt=0)] | None = None
    simpo_gamma: Annotated[float, Field(ge=0)] | None = None
    """SimPO's target margin γ; the default is β/2."""
    cpo_alpha: Annotated[float, Field(ge=0)] | None = None
    """The weight of CPO's likelihood term; the default is 1."""
    unlikelihood_alpha: Annotated[float, Field(ge=0, le=1)] | None = None
    """α of the unlikelihood baseline; the default is 0.1."""
    desirable_weight: Annotated[float, Field(gt=0)] | None = None
    """KTO's λ_D; the default is 1."""
    undesirable_weight: Annotated[float, Field(gt=0)] | None = None
    """KTO's λ_U; the default is 1."""
    sync_reference: SyncReference | None = None
    reference_model: Annotated[str, StringConstraints(min_length=1, max_length=512, pattern=r"^[^\x00]*$")] | None = (
        None
    )
    """Another model to hold the policy to: a base model or one made here, with the same tokenizer."""

    @property
    def losses(self) -> list[WeightedLoss]:
        """The terms of the loss."""
        return [WeightedLoss(name=self.loss)] if isinstance(self.loss, str) else self.loss

    @property
    def kinds(self) -> list[Loss]:
        """What is known about each term."""
        return [LOSSES[term.name] for term in self.losses]

    @property
    def data(self) -> Kind:
        return self.kinds[0].data

    @property
    def rewards(self) -> bool:
        """Whether a reward model is trained, not a policy."""
        return self.losses[0].name == "reward_model"

    @property
    def needs_reference(self) -> bool:
        return any(kind.reference for kind in self.kinds)

    @property
    def couples(self) -> bool:
        return any(kind.couples for kind in self.kinds)

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        names = [term.name for term in self.losses]
        if len(set(names)) < len(names):
            raise inconsistent("loss", "'loss' names a loss twice; give it the sum of the weights")
        alone = [name for name in names if LOSSES[name].alone]
        if alone and len(names) > 1:
            raise inconsistent("loss", f"The loss '{alone[0]}' cannot be mixed with others")
        for field in OPTIONS:
            value, without = getattr(self, field), [name for name in names if not LOSSES[name].reads(field)]
            asked = value is not None and not (field == "use_weighting" and value is False)
            # What shapes the log-probs or the labels shapes those of every term; the rest belongs to one of them.
            exempt = set() if field == "ld_alpha" else {"sft"}
            if asked and (len(without) == len(names) or (field in SHARED and set(without) - exempt)):
                raise inconsistent(field, f"'{field}' has no meaning with the loss '{without[0]}'")
        if self.f_alpha is not None and self.f_divergence != "alpha_divergence":
            raise inconsistent("f_alpha", "'f_alpha' goes with 'f_divergence': 'alpha_divergence'")
        if "exo_pair" in names and self.label_smoothing == 0:
            raise inconsistent("label_smoothing", "The loss 'exo_pair' needs a 'label_smoothing' above 0")
        for field in ("sync_reference", "reference_model"):
            if getattr(self, field) is not None and not self.needs_reference:
                raise inconsistent(field, f"'{field}' has no meaning: the loss '{names[0]}' has no reference")
        if self.sync_reference is not None and self.reference_model is not None:
            raise inconsistent("sync_reference", "'sync_reference' mixes the policy in, 'reference_model' is another")
        if self.sync_reference is not None and self.ld_alpha is not None:
            raise inconsistent("sync_reference", "'sync_reference' does not go with 'ld_alpha'")
        metric = self.early_stopping and self.early_stopping.metric
        if metric == "eval/mean_token_accuracy" or (metric == "eval/rewards/margins" and self.data == Kind.LABELLED):
            raise inconsistent("early_stopping.metric", f"The loss '{names[0]}' has no metric '{metric}'")
        defaults = {kind.beta for kind in self.kinds if kind.beta is not None}
        if self.beta is None and len(defaults) > 1:
            raise inconsistent("beta", f"Give 'beta': the losses {', '.join(names)} have different defaults")
        if self.beta is not None and not defaults:
            raise inconsistent("beta", f"'beta' has no meaning with the loss '{names[0]}'")
        return self

    def resolved(self, full: bool) -> Self:
        """The same with every default filled in; `full` for full-parameter training."""
        default = next((kind.beta for kind in self.kinds if kind.beta is not None), None)
        return super().resolved(full).model_copy(update={"beta": self.beta or default})
