"""The losses of a preference stage. Each has one record, which describes the loss and lists the options it reads.

The function of a loss has the loss's name and lies in `worker/trainer/objectives`. These records decide all else that
depends on the loss: the hyperparameters that a job may set, their defaults, the data, the rewards, the docs' table.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

from app.spec.datasets.example import Kind

Default = float | str | bool


@dataclass(frozen=True)
class LossOptions:
    """The options of loss functions. An option that a loss does not read keeps the value given here."""

    beta: float = 1.0
    """β of Rafailov et al. 2023, Eq. 7."""
    label_smoothing: float = 0.0
    """ε, the assumed share of wrong labels."""
    f_divergence: str = "reverse_kl"
    """The divergence that keeps the policy close to the reference (Wang et al. 2023)."""
    f_alpha: float = 0.5
    """α of the α-divergence."""
    ipo_length_average: bool = True
    """Whether IPO averages each log-ratio over the answer's tokens."""
    discopop_tau: float = 0.05
    """τ of DiscoPOP."""
    simpo_gamma: float = 0.0
    """γ, the target margin of SimPO."""
    cpo_alpha: float = 1.0
    """The weight of CPO's likelihood term."""
    unlikelihood_alpha: float = 0.1
    """α of the unlikelihood baseline."""
    desirable_weight: float = 1.0
    """λ_D of KTO."""
    undesirable_weight: float = 1.0
    """λ_U of KTO."""


BETA_HALVED = "β/2"
"""Marks the default of an option that is half of β."""


@dataclass(frozen=True)
class Loss:
    """A loss over the log-probs of a row's answers."""

    title: str
    """Its name in the literature."""
    paper: str
    """The paper that defines it, with the equation."""
    options: Mapping[str, Default] = field(default_factory=dict)
    """The hyperparameters that its function reads, with their defaults."""
    weighting: bool = True
    """Whether WPO's `use_weighting` may weight its rows."""
    tails: bool = True
    """Whether LD-DPO's `ld_alpha` may reduce the weight of the longer answer's tail."""
    data: Kind = Kind.PREFERENCE
    """The kind of examples that it learns from."""
    reference: bool = True
    """Whether it compares the policy with a reference."""
    averaged: bool = False
    """Whether its rewards are averaged over the answer's tokens. IPO can also sum them: see `ipo_length_average`."""
    couples: bool = False
    """Whether the loss of a row depends on the other rows of its batch."""
    alone: bool = False
    """Whether it cannot be a term of a weighted sum."""

    @property
    def beta(self) -> float | None:
        """The default of β; None where the loss has no β."""
        beta = self.options.get("beta")
        return None if beta is None else float(beta)

    def reads(self, option: str) -> bool:
        """Whether a job with this loss may set the hyperparameter `option`."""
        return {"use_weighting": self.weighting, "ld_alpha": self.tails}.get(option, option in self.options)

    def options_of(self, settings: object) -> LossOptions:
        """The options for the loss function: the values in the hyperparameters `settings`, else the loss's defaults."""
        job_values = {name: getattr(settings, name) for name in self.options}
        values: dict[str, Any] = {
            name: self.options[name] if value is None else value for name, value in job_values.items()
        }
        return LossOptions(
            **{name: values["beta"] / 2 if value == BETA_HALVED else value for name, value in values.items()}
        )


_DIVERGENCE: dict[str, Default] = {"f_divergence": "reverse_kl", "f_alpha": 0.5}
_SMOOTHING: dict[str, Default] = {"label_smoothing": 0.0}
LOSSES = {
    "sigmoid": Loss(
        "DPO; with label smoothing cDPO",
        "Rafailov et al. 2023, arXiv:2305.18290, Eq. 7",
        {"beta": 0.1} | _SMOOTHING | _DIVERGENCE,
    ),
    "hinge": Loss("SLiC", "Zhao et al. 2023, arXiv:2305.10425", {"beta": 0.1} | _DIVERGENCE),
    "ipo": Loss(
        "IPO",
        "Azar et al. 2023, arXiv:2310.12036, Eq. 17",
        {"beta": 0.1, "ipo_length_average": True} | _DIVERGENCE,
        averaged=True,
    ),
    "robust": Loss(
        "Robust DPO", "Chowdhury et al. 2024, arXiv:2403.00409, Eq. 12", {"beta": 0.1} | _SMOOTHING | _DIVERGENCE
    ),
    "exo_pair": Loss(
        "EXO",
        "Ji et al. 2024, arXiv:2402.00856, Eq. 16",
        {"beta": 0.1, "label_smoothing": 1e-3} | _DIVERGENCE,
    ),
    "nca_pair": Loss("NCA", "Chen et al. 2024, arXiv:2402.05369, Eq. 6", {"beta": 0.1}),
    "bco_pair": Loss("BCO", "Jung et al. 2024, arXiv:2404.04656, Eq. 10", {"beta": 0.1}, couples=True),
    "sppo_hard": Loss("SPPO", "Wu et al. 2024, arXiv:2405.00675, Eq. 4.7", {"beta": 0.1}),
    "aot": Loss(
        "AOT on pairs",
        "Melnyk et al. 2024, arXiv:2406.05882, Eq. 9",
        {"beta": 0.1} | _SMOOTHING,
        weighting=False,
        couples=True,
    ),
    "aot_unpaired": Loss(
        "AOT without pairs",
        "Melnyk et al. 2024, arXiv:2406.05882, Eq. 8",
        {"beta": 0.1} | _SMOOTHING,
        weighting=False,
        couples=True,
    ),
    "apo_zero": Loss("APO-zero", "D'Oosterlinck et al. 2024, arXiv:2408.06266, Eq. 7", {"beta": 0.1}),
    "apo_down": Loss("APO-down", "D'Oosterlinck et al. 2024, arXiv:2408.06266, Eq. 8", {"beta": 0.1}),
    "discopop": Loss(
        "DiscoPOP", "Lu et al. 2024, arXiv:2406.08414, Eq. 5", {"beta": 0.05, "discopop_tau": 0.05} | _DIVERGENCE
    ),
    "sigmoid_norm": Loss(
        "Length-normalised DPO",
        "Lambert et al. 2024 (Tülu 3), arXiv:2411.15124, Eq. 6",
        {"beta": 5.0} | _DIVERGENCE,
        averaged=True,
    ),
    "sft": Loss("Likelihood of the chosen answer", "maximum likelihood", tails=False, reference=False),
    "simpo": Loss(
        "SimPO",
        "Meng et al. 2024, arXiv:2405.14734, Eq. 6",
        {"beta": 2.0, "simpo_gamma": BETA_HALVED},
        reference=False,
        averaged=True,
    ),
    "orpo": Loss(
        "ORPO",
        "Hong et al. 2024, arXiv:2403.07691, Eq. 6 and 7",
        {"beta": 0.1},
        tails=False,
        reference=False,
        averaged=True,
    ),
    "cpo": Loss(
        "CPO",
        "Xu et al. 2024, arXiv:2401.08417, Eq. 3 to 5",
        {"beta": 0.1, "cpo_alpha": 1.0} | _SMOOTHING,
        tails=False,
        reference=False,
    ),
    "unlikelihood": Loss(
        "Unlikelihood, the DPO paper's baseline",
        "Rafailov et al. 2023, arXiv:2305.18290, Sec. 6",
        {"unlikelihood_alpha": 0.1},
        tails=False,
        reference=False,
    ),
    "kto": Loss(
        "KTO",
        "Ethayarajh et al. 2024, arXiv:2402.01306, Eq. 8",
        {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0},
        weighting=False,
        tails=False,
        data=Kind.LABELLED,
        couples=True,
        alone=True,
    ),
    "plackett_luce": Loss(
        "Plackett–Luce",
        "Rafailov et al. 2023, arXiv:2305.18290, App. A.3, Eq. 20",
        {"beta": 0.1},
        weighting=False,
        tails=False,
        data=Kind.RANKED,
        alone=True,
    ),
    "reward_model": Loss(
        "Reward model (Bradley–Terry)",
        "Rafailov et al. 2023, arXiv:2305.18290, Eq. 2",
        weighting=False,
        tails=False,
        reference=False,
        alone=True,
    ),
}
"""All losses, by the name that the hyperparameter `loss` takes."""
if TYPE_CHECKING:
    LossName = str
else:
    LossName = Literal[tuple(LOSSES)]
SHARED = ("label_smoothing", "f_divergence", "f_alpha", "ld_alpha", "use_weighting")
"""Options that every term of a weighted sum must read. The term `sft` is exempt, except from `ld_alpha`."""
OPTIONS = tuple(sorted({option.name for option in fields(LossOptions)} - {"beta"} | {"ld_alpha", "use_weighting"}))
"""The hyperparameters that only some losses read, without β, which has its own rule."""


def refuses(option: str, names: Sequence[str]) -> str | None:
    """The loss that forbids a stage with the losses `names` to set `option`; None if the stage may set it."""
    ignoring = [name for name in names if not LOSSES[name].reads(option)]
    # A shared option changes the log-probs or labels of every term. Any other needs one term that reads it.
    exempt = set() if option == "ld_alpha" else {"sft"}
    if len(ignoring) == len(names) or (option in SHARED and set(ignoring) - exempt):
        return ignoring[0]
    return None


def default_options(names: Sequence[str]) -> dict[str, Any]:
    """The default of each option that a stage with the losses `names` may set.

    An option whose default differs between the losses is missing: each of them takes its own.
    """
    defaults: dict[str, Any] = {} if refuses("use_weighting", names) else {"use_weighting": False}
    for option in ("beta", *OPTIONS):
        values = {LOSSES[name].options[option] for name in names if option in LOSSES[name].options}
        if len(values) == 1 and refuses(option, names) is None:
            defaults[option] = values.pop()
    return defaults
