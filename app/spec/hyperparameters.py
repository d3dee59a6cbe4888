"""The hyperparameters of a stage.

Null and "auto" mean the default. `resolved` fills in the defaults. Those that depend on the model, the rows or the
device stay None: the maximum length, the intervals, and activation checkpointing.
"""

from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from app.spec.datasets.example import Kind
from app.spec.datasets.pairs import PairRule, Rule
from app.spec.losses import BETA_HALVED, LOSSES, OPTIONS, Loss, LossName, default_options, refuses
from app.spec.metrics import METRICS, TRAINING, Trait, measured
from app.spec.schema_base import Automatic, inconsistent

if TYPE_CHECKING:
    StoppingMetric = str
else:
    StoppingMetric = Literal[tuple(f"eval/{name}" for name, metric in TRAINING.items() if metric.stops)]


DEFAULT_MAX_LENGTH = 2048
"""The default of `max_length` in tokens, unless the model's context is shorter."""
MOMENT_BYTES = {"adamw": 8, "adamw_8bit": 2, "paged_adamw_8bit": 2, "rmsprop": 4}
"""Bytes of each optimizer's moments per trained parameter. Trained parameters are in float32."""


class EarlyStopping(Automatic):
    """Stop the stage when a validation metric no longer improves, and keep the weights of its best step."""

    metric: StoppingMetric = "eval/loss"
    """The metric to watch. Lower is better for `eval/loss`; higher is better for all others."""
    patience: Annotated[int, Field(ge=1, le=1000)] = 3
    """Validations without an improvement before the stage stops."""
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """A change counts as an improvement only if it is larger than this."""


class SyncReference(Automatic):
    """TR-DPO (Gorbatovski et al. 2024): the reference is updated from the policy during training."""

    alpha: Annotated[float, Field(gt=0, le=1)] = 0.6
    """α of the update: reference ← α policy + (1 − α) reference. The two factors of an adapter are mixed separately."""
    steps: Annotated[int, Field(ge=1, le=10**9)] = 512
    """Optimizer steps between two updates of the reference."""


class WeightedLoss(Automatic):
    """One term of a weighted sum of losses."""

    name: LossName
    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0


class Hyperparameters(Automatic):
    """The hyperparameters that every stage has."""

    METHOD: ClassVar[str]
    """The type of method that runs the stage."""
    STAGE: ClassVar[str]
    """The name of the stage in progress, events and checkpoints."""
    ACCURACY: ClassVar[str]
    """The metric that result files call the accuracy."""
    LEARNING_RATES: ClassVar[tuple[float, float]]
    """The default peak learning rates: for an adapter, and for full-parameter training."""

    batch_size: Annotated[int, Field(ge=1, le=256)] | None = None
    """Rows (for DPO: pairs) per optimizer step; the default is 16."""
    n_epochs: Annotated[int, Field(ge=1, le=50)] | None = None
    """Passes over the training rows; the default is 1."""
    learning_rate_multiplier: Annotated[float, Field(gt=0, le=1e30)] | None = None
    """Factor of the learning rate; the default is 1."""
    learning_rate: Annotated[float, Field(gt=0, le=1)] | None = None
    """Peak learning rate, before the multiplier is applied."""
    max_length: Annotated[int, Field(ge=16, le=10**7)] | None = None
    """Maximum tokens of a prompt and one answer together. The default is the model's context length, at most 2,048."""
    truncation: Literal["keep_end", "keep_start", "drop"] = "keep_end"
    """How to fit a row that is longer than `max_length`: keep the end of its prompt, keep its start, or drop the row.
    Prompt and answer each get half of the tokens, plus those that the other does not need."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """The share of the steps during which the learning rate rises to its peak."""
    warmup_steps: Annotated[int, Field(ge=0, le=10**9)] | None = None
    """Warmup as a number of steps, in place of `warmup_ratio`. The DPO paper uses 150."""
    lr_scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "rmsprop"] = "adamw"
    """The 8-bit optimizers (Dettmers et al. 2022) need a GPU. The DPO paper uses `rmsprop`."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    max_steps: Annotated[int, Field(ge=1, le=10**9)] | None = None
    """Number of optimizer steps, in place of `n_epochs`: the data is repeated or cut short to reach it."""
    eval_every: Annotated[int, Field(ge=1, le=10**9)] | None = None
    """Optimizer steps between validations. The default is a fifth of the stage."""
    checkpoint_every: Annotated[int, Field(ge=1, le=10**9)] | None = None
    """Optimizer steps between checkpoints. The default is a fifth of the stage."""
    early_stopping: EarlyStopping | None = None
    activation_checkpointing: bool | None = None
    """Recompute activations in the backward pass to save memory. The default: only if they would not fit."""
    compile: bool | None = None
    """Compile the model's layers with torch.compile. The start takes a minute longer; the steps are then faster. The
    default: on a GPU, if the stage is long enough to repay it."""

    @property
    @abstractmethod
    def data(self) -> Kind:
        """The kind of examples that the stage learns from."""

    @property
    @abstractmethod
    def traits(self) -> set[Trait]:
        """The properties that decide which metrics the stage reports."""

    @property
    @abstractmethod
    def title(self) -> str:
        """The stage in an error message, as the subject of a sentence."""

    def require_metric(self, metric: str, field: str) -> None:
        """Refuse a metric of another stage. `field` names the setting that asks for it."""
        if metric in METRICS and metric not in measured(self.traits, validates=True):
            raise inconsistent(field, f"{self.title} has no metric '{metric}'")

    @model_validator(mode="after")
    def _early_stopping_fits(self) -> Self:
        if self.early_stopping is not None:
            self.require_metric(self.early_stopping.metric, "early_stopping.metric")
        return self

    @property
    def scored(self) -> Literal["answers", "turns", "text"]:
        """The part of a row on which the loss is computed."""
        return "answers"

    @property
    def repeats(self) -> int:
        """Optimizer steps in a row that have the same rows."""
        return 1

    @property
    def pair_rule(self) -> PairRule:
        """Which pairs a row with ranked answers gives."""
        return PairRule()

    def resolved(self, full: bool) -> Self:
        """A copy with its defaults written out. `full`: the job trains all parameters."""
        return self.model_copy(
            update={
                "batch_size": self.batch_size or 16,
                "n_epochs": self.n_epochs or 1,
                "learning_rate_multiplier": self.learning_rate_multiplier or 1.0,
                "learning_rate": self.learning_rate or self.LEARNING_RATES[full],
            }
        )


class SupervisedHyperparameters(Hyperparameters):
    """The hyperparameters of supervised fine-tuning (SFT)."""

    METHOD = "supervised"
    STAGE = "sft"
    ACCURACY = "mean_token_accuracy"
    LEARNING_RATES = (2e-4, 2e-5)

    loss: Literal["nll", "dft"] = "nll"
    """Negative log-likelihood, or Dynamic Fine-Tuning (Wu et al. 2025), which weights each token by its probability."""
    loss_on: Literal["answers", "turns", "text"] = "answers"
    """Compute the loss on the last answer, on every assistant turn of the conversation, or on the whole text."""

    @property
    def data(self) -> Kind:
        return Kind.SUPERVISED

    @property
    def traits(self) -> set[Trait]:
        return {"tokens"}

    @property
    def title(self) -> str:
        return "SFT"

    @property
    def scored(self) -> Literal["answers", "turns", "text"]:
        return self.loss_on


class DPOHyperparameters(Hyperparameters):
    """The hyperparameters of the preference stage: DPO (Rafailov et al. 2023) and later methods."""

    METHOD = "dpo"
    STAGE = "dpo"
    ACCURACY = "rewards/accuracies"
    LEARNING_RATES = (5e-5, 1e-6)

    beta: Annotated[float, Field(gt=0, le=100)] | None = None
    """β of Eq. 7: how strongly the policy is kept close to the reference. Each loss has its own default."""
    loss: LossName | Annotated[list[WeightedLoss], Field(min_length=1, max_length=8)] = "sigmoid"
    """The name of a loss, or a weighted sum of losses."""
    pairs: Rule | None = None
    """The pairs of a row with ranked answers: every two of them (`all`), the best and the worst, or the best and a
    random other one. The default is `all`."""
    min_margin: Annotated[float, Field(ge=0)] | None = None
    """Leave out pairs whose scores differ by less. Each row needs scores, or ranks."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] | None = None
    """The assumed share of wrong labels. With the loss `sigmoid` this is cDPO."""
    f_divergence: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] | None = None
    """The divergence that keeps the policy close to the reference (Wang et al. 2023). The default is `reverse_kl`."""
    f_alpha: Annotated[float, Field(gt=0, lt=1)] | None = None
    """α of the divergence `alpha_divergence`; the default is 0.5."""
    ld_alpha: Annotated[float, Field(ge=0, le=1)] | None = None
    """LD-DPO (Liu et al. 2024): the weight of an answer's tokens beyond the other answer's length."""
    use_weighting: bool | None = None
    """WPO (Zhou et al. 2024): weight each pair by how likely the policy is to generate it."""
    ipo_length_average: bool | None = None
    """Average IPO's log-ratios over the answer's tokens, as in the paper's results, or sum them. Default: average."""
    discopop_tau: Annotated[float, Field(gt=0)] | None = None
    """τ of DiscoPOP; the default is 0.05."""
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
    """Update the reference during training. Without it, the reference stays fixed."""
    reference_model: Annotated[str, StringConstraints(min_length=1, max_length=512, pattern=r"^[^\x00]*$")] | None = (
        None
    )
    """Another model as the reference: a base model or one made here, with the same tokenizer."""

    @property
    def losses(self) -> list[WeightedLoss]:
        """The terms of the loss, each with its weight."""
        return [WeightedLoss(name=self.loss)] if isinstance(self.loss, str) else self.loss

    @property
    def loss_records(self) -> list[Loss]:
        """The record of each term's loss."""
        return [LOSSES[term.name] for term in self.losses]

    @property
    def data(self) -> Kind:
        return self.loss_records[0].data

    @property
    def traits(self) -> set[Trait]:
        traits: set[Trait] = {"rewards", "kl" if self.data == Kind.LABELLED else "pairs"}
        if not self.rewards:
            traits.add("logps")
        if self.needs_reference:
            traits.add("reference")
        return traits

    @property
    def title(self) -> str:
        return f"The loss '{self.losses[0].name}'"

    @property
    def pair_rule(self) -> PairRule:
        return PairRule(self.pairs or "all", self.min_margin)

    @property
    def rewards(self) -> bool:
        """Whether the stage trains a reward model instead of a policy."""
        return self.losses[0].name == "reward_model"

    @property
    def needs_reference(self) -> bool:
        return any(loss.reference for loss in self.loss_records)

    @property
    def couples(self) -> bool:
        return any(loss.couples for loss in self.loss_records)

    @model_validator(mode="after")
    def _options_fit_the_loss(self) -> Self:
        names = [term.name for term in self.losses]
        if len(set(names)) < len(names):
            raise inconsistent("loss", "'loss' names a loss twice; give it the sum of the weights")
        alone = [name for name in names if LOSSES[name].alone]
        if alone and len(names) > 1:
            raise inconsistent("loss", f"The loss '{alone[0]}' cannot be mixed with others")
        for field in OPTIONS:
            value, refusing = getattr(self, field), refuses(field, names)
            is_set = value is not None and not (field == "use_weighting" and value is False)
            if is_set and refusing is not None:
                raise inconsistent(field, f"'{field}' has no meaning with the loss '{refusing}'")
        for field in ("pairs", "min_margin"):
            if getattr(self, field) is not None and self.data != Kind.PREFERENCE:
                message = f"'{field}' has no meaning with the loss '{names[0]}', which takes whole rows"
                raise inconsistent(field, message)
        if self.f_alpha is not None and self.f_divergence != "alpha_divergence":
            raise inconsistent("f_alpha", "'f_alpha' goes with 'f_divergence': 'alpha_divergence'")
        if "exo_pair" in names and self.label_smoothing == 0:
            raise inconsistent("label_smoothing", "The loss 'exo_pair' needs a 'label_smoothing' above 0")
        for field in ("sync_reference", "reference_model"):
            if getattr(self, field) is not None and not self.needs_reference:
                raise inconsistent(field, f"'{field}' has no meaning: the loss '{names[0]}' has no reference")
        if self.sync_reference is not None and self.reference_model is not None:
            raise inconsistent("sync_reference", "Give 'sync_reference' or 'reference_model', not both")
        if self.sync_reference is not None and self.ld_alpha is not None:
            raise inconsistent("sync_reference", "'sync_reference' does not go with 'ld_alpha'")
        defaults = {loss.beta for loss in self.loss_records if loss.beta is not None}
        if self.beta is None and len(defaults) > 1:
            raise inconsistent("beta", f"Give 'beta': the losses {', '.join(names)} have different defaults")
        if self.beta is not None and not defaults:
            raise inconsistent("beta", f"'beta' has no meaning with the loss '{names[0]}'")
        return self

    def resolved(self, full: bool) -> Self:
        options = default_options([term.name for term in self.losses])
        options |= {name: value for name in ("beta", *OPTIONS) if (value := getattr(self, name)) is not None}
        if options.get("simpo_gamma") == BETA_HALVED:
            options["simpo_gamma"] = options["beta"] / 2
        if options.get("f_divergence") != "alpha_divergence":
            options.pop("f_alpha", None)
        return super().resolved(full).model_copy(update=options)


Algorithm = Literal["rloo", "grpo", "ppo", "online_dpo"]
BETAS: dict[Algorithm, float] = {"rloo": 0.05, "grpo": 0.04, "ppo": 0.05, "online_dpo": 0.1}
"""The default β of each algorithm."""


class ReinforcementHyperparameters(Hyperparameters):
    """The hyperparameters of reinforcement: the model writes answers, a grader gives rewards, and the model learns.

    The objective is Rafailov et al. 2023, Eq. 3: the mean reward, minus β times the KL divergence from the reference,
    which is the model before the first step.
    """

    METHOD = "reinforcement"
    STAGE = "reinforcement"
    ACCURACY = "reward"
    LEARNING_RATES = (2e-5, 1e-6)

    algorithm: Algorithm = "rloo"
    """`rloo`: REINFORCE with the mean of the other answers as baseline (Ahmadian et al. 2024). `grpo`: Group Relative
    Policy Optimization (Shao et al. 2024). `ppo`: Proximal Policy Optimization (Schulman et al. 2017), with a value
    head. `online_dpo`: DPO on the best and the worst answer (Guo et al. 2024)."""
    samples: Annotated[int, Field(ge=2, le=64)] | None = None
    """Answers for each prompt of a step, K; the default is 8 times `compute_multiplier`, at most 64."""
    max_tokens: Annotated[int, Field(ge=1, le=32_768)] = 256
    """Maximum tokens of an answer."""
    beta: Annotated[float, Field(ge=0, le=100)] | None = None
    """β, the price of a nat of KL divergence. The default is 0.05 for `rloo` and `ppo`, 0.04 for `grpo` and 0.1 for
    `online_dpo`."""
    updates_per_batch: Annotated[int, Field(ge=1, le=16)] | None = None
    """Optimizer steps on the same answers. Beyond the first, ratios of probabilities are clipped. The default is 1, and
    4 for `ppo`."""
    clip: Annotated[float, Field(gt=0, lt=1)] | None = None
    """ε of the clipping: a ratio counts between 1 − ε and 1 + ε (Schulman et al. 2017, Eq. 7). The default is 0.2."""
    gae_lambda: Annotated[float, Field(ge=0, le=1)] | None = None
    """λ of `ppo`'s advantages (Schulman et al. 2016): 1 takes whole answers, and 0 only the next value.
    The default is 0.95."""
    value_weight: Annotated[float, Field(gt=0, le=100)] | None = None
    """The weight of the loss of `ppo`'s value head. The default is 0.1."""
    compute_multiplier: Annotated[float, Field(gt=0, le=10)] | None = None
    """OpenAI's name for the amount of exploration: a factor of `samples`."""
    eval_interval: Annotated[int, Field(ge=1, le=10**9)] | None = None
    """OpenAI's name for `eval_every`."""
    eval_samples: Annotated[int, Field(ge=1, le=64)] | None = None
    """Answers for each validation prompt; the default is 1."""
    reasoning_effort: Literal["default"] = "default"
    """OpenAI's field for its reasoning models. Only the default is available."""

    @property
    def data(self) -> Kind:
        return Kind.PROMPTS

    @property
    def traits(self) -> set[Trait]:
        return {"rollouts", "kl"}

    @property
    def title(self) -> str:
        return "Reinforcement"

    @property
    def repeats(self) -> int:
        return self.updates_per_batch or (4 if self.algorithm == "ppo" else 1)

    @property
    def answers(self) -> int:
        """Answers for each prompt of a step, K."""
        return self.samples or min(64, max(2, round(8 * (self.compute_multiplier or 1.0))))

    @model_validator(mode="after")
    def _options_fit(self) -> Self:
        if self.samples is not None and self.compute_multiplier is not None:
            raise inconsistent("compute_multiplier", "Give 'samples' or 'compute_multiplier', not both")
        if self.eval_every is not None and self.eval_interval is not None:
            raise inconsistent("eval_interval", "Give 'eval_every' or 'eval_interval', not both")
        if self.algorithm == "online_dpo" and self.beta == 0:
            raise inconsistent("beta", "The algorithm 'online_dpo' needs a 'beta' above 0")
        if self.algorithm == "online_dpo" and self.clip is not None:
            raise inconsistent("clip", "'clip' has no meaning with the algorithm 'online_dpo'")
        for name in ("gae_lambda", "value_weight"):
            if getattr(self, name) is not None and self.algorithm != "ppo":
                raise inconsistent(name, f"'{name}' has no meaning with the algorithm '{self.algorithm}'")
        if self.max_length is not None and self.max_tokens >= self.max_length:
            raise inconsistent("max_tokens", "'max_tokens' leaves no room for a prompt within 'max_length'")
        return self

    def resolved(self, full: bool) -> Self:
        ppo = self.algorithm == "ppo"
        return (
            super()
            .resolved(full)
            .model_copy(
                update={
                    "samples": self.answers,
                    "updates_per_batch": self.repeats,
                    "gae_lambda": (0.95 if self.gae_lambda is None else self.gae_lambda) if ppo else None,
                    "value_weight": (self.value_weight or 0.1) if ppo else None,
                    "compute_multiplier": None,
                    "beta": BETAS[self.algorithm] if self.beta is None else self.beta,
                    "clip": None if self.algorithm == "online_dpo" else self.clip or 0.2,
                    "eval_every": self.eval_every or self.eval_interval,
                    "eval_interval": None,
                    "eval_samples": self.eval_samples or 1,
                }
            )
        )
