"""The losses that a preference stage can be trained on, and what goes with each.

The functions themselves, with papers and equations, are in `worker/trainer/objectives`.
"""

from dataclasses import dataclass

from app.datasets.example import Kind


@dataclass(frozen=True)
class Loss:
    """`options`: the hyperparameters that the loss reads, besides `beta`."""

    data: Kind = Kind.PREFERENCE
    """What the loss compares."""
    reference: bool = True
    options: frozenset[str] = frozenset()
    beta: float | None = 0.1
    """The default of β; None where the loss has no β."""
    length_average: bool = False
    """Whether its reward is averaged over the answer's tokens (IPO's may be summed: `ipo_length_average`)."""
    couples: bool = False
    """Whether the loss of one row depends on the other rows of its batch."""


def _loss(options: str = "", **fields: object) -> Loss:
    return Loss(options=frozenset(options.split()), **fields)  # type: ignore[arg-type]


PAIR_OPTIONS = "ld_alpha use_weighting"
LOSSES = {
    "sigmoid": _loss(f"label_smoothing f_divergence f_alpha {PAIR_OPTIONS}"),
    "hinge": _loss(f"f_divergence f_alpha {PAIR_OPTIONS}"),
    "ipo": _loss(f"f_divergence f_alpha ipo_length_average {PAIR_OPTIONS}", length_average=True),
    "robust": _loss(f"label_smoothing f_divergence f_alpha {PAIR_OPTIONS}"),
    "exo_pair": _loss(f"label_smoothing f_divergence f_alpha {PAIR_OPTIONS}"),
    "nca_pair": _loss(PAIR_OPTIONS),
    "bco_pair": _loss(PAIR_OPTIONS, couples=True),
    "sppo_hard": _loss(PAIR_OPTIONS),
    "aot": _loss("label_smoothing ld_alpha", couples=True),
    "aot_unpaired": _loss("label_smoothing ld_alpha", couples=True),
    "apo_zero": _loss(PAIR_OPTIONS),
    "apo_down": _loss(PAIR_OPTIONS),
    "discopop": _loss(f"discopop_tau f_divergence f_alpha {PAIR_OPTIONS}", beta=0.05),
    "sigmoid_norm": _loss(f"f_divergence f_alpha {PAIR_OPTIONS}", beta=5.0, length_average=True),
    "sft": _loss("use_weighting", reference=False, beta=None),
    "simpo": _loss(f"simpo_gamma {PAIR_OPTIONS}", reference=False, beta=2.0, length_average=True),
    "orpo": _loss("use_weighting", reference=False, length_average=True),
    "cpo": _loss("label_smoothing cpo_alpha use_weighting", reference=False),
    "unlikelihood": _loss("unlikelihood_alpha use_weighting", reference=False, beta=None),
    "kto": _loss("desirable_weight undesirable_weight", data=Kind.LABELLED, couples=True),
    "plackett_luce": _loss(data=Kind.RANKED),
    "reward_model": _loss(reference=False, beta=None),
}
"""By the name that `loss` takes."""
SHARED = frozenset({"label_smoothing", "f_divergence", "f_alpha", "ld_alpha", "use_weighting"})
"""Options that every term of a weighted sum must read."""
OPTIONS = frozenset().union(*(loss.options for loss in LOSSES.values()))
