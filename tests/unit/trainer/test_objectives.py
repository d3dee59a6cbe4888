"""Every objective as a pure function, compared with TRL's code and with the papers' closed forms."""

import itertools
import math
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from trl import DPOTrainer, KTOTrainer, RewardTrainer, SFTTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

from app.spec.hyperparameters import DPOHyperparameters
from app.spec.losses import LOSSES
from worker.trainer.objectives import OBJECTIVES, losses_of, supervised
from worker.trainer.objectives.batch import Batch
from worker.trainer.objectives.divergences import link

BETA = 0.3
NAMES = sorted(LOSSES)
TRL_LOSSES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
ACCELERATOR = SimpleNamespace(
    device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x, parallelism_config=None
)


def make_settings(**values: Any) -> DPOHyperparameters:
    """A job's hyperparameters. β defaults to BETA where the loss reads it."""
    names = [values["loss"]] if isinstance(values["loss"], str) else [term["name"] for term in values["loss"]]
    if any(LOSSES[name].beta is not None for name in names):
        values = {"beta": BETA} | values
    return DPOHyperparameters.model_validate(values).resolved(full=False)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_batch(policy: Tensor, reference: Tensor | None = None, **fields: Any) -> Batch:
    """A batch without absent responses. The response of every second row is desirable."""
    lengths = fields.pop("lengths", torch.full(policy.shape, 4))
    defaults = {
        "policy": policy,
        "reference": torch.zeros_like(policy) if reference is None else reference,
        "lengths": lengths,
        "present": torch.ones(policy.shape, dtype=torch.bool),
        "desirable": torch.arange(len(policy)) % 2 == 0,
        "mean_length": lengths[:, 0].double().mean().item(),
    }
    return Batch(**defaults | fields)


def pair_of_logps(seed: int = 0, count: int = 6) -> tuple[Tensor, Tensor]:
    """(policy, reference), each [B, 2]. The log-ratios are a few units, with a mean above 0."""
    reference = -20 + 4 * random(count, 2, seed=seed)
    return reference + 2 + 2 * random(count, 2, seed=seed + 1), reference


@dataclass
class Pairs:
    """The same responses for both engines, in TRL's order: all the chosen ones, then all the rejected ones.

    `tokens` [2B, T]: log-probs of all tokens, padding and prompt included. Gradients are taken with respect to it.
    `mask` [2B, T]: the tokens of the response.
    `reference` [2B]: sums of the reference's log-probs.
    `squares` [2B, T]: log Σ_v p(v)² at each position.
    """

    tokens: Tensor
    mask: Tensor
    reference: Tensor
    squares: Tensor

    @property
    def logps(self) -> Tensor:
        return self.tokens * self.mask

    def batch(self, weighting: bool = False) -> Batch:
        """The batch that our trainer would build."""
        sums, lengths = self.logps.sum(1), self.mask.sum(1)
        aligned = ((self.logps - self.squares) * self.mask).sum(1) / lengths
        policy, reference, lengths, aligned = (
            torch.stack(values.chunk(2), 1) for values in (sums, self.reference, lengths, aligned)
        )
        return make_batch(policy, reference, lengths=lengths, alignment=aligned if weighting else None)

    def centred(self) -> "Pairs":
        """The same pairs, with a reference that makes the mean of the log-ratios zero."""
        return replace(self, reference=self.reference + (self.logps.sum(1) - self.reference).mean().detach())

    def single(self) -> "Pairs":
        """The same pairs in single precision."""
        return Pairs(
            self.tokens.detach().float().requires_grad_(), self.mask, self.reference.float(), self.squares.float()
        )


def make_pairs(count: int = 7, width: int = 12) -> Pairs:
    tokens = -2 * random(2 * count, width, seed=2).abs()
    lengths = 1 + torch.arange(2 * count) * 5 % (width - 1)
    start = torch.arange(2 * count) % (width - lengths)
    positions = torch.arange(width)
    mask = (positions >= start[:, None]) & (positions < (start + lengths)[:, None])
    reference = (tokens * mask).sum(1) + 2.5 * random(2 * count, seed=3)
    return Pairs(tokens.requires_grad_(), mask, reference, -random(2 * count, width, seed=4).abs())


def trl_trainer(**fields: Any) -> SimpleNamespace:
    """A stand-in for `self` in the methods of TRL's trainers, with what they read to log metrics."""
    defaults: dict[str, Any] = {
        "model": SimpleNamespace(training=True),
        "accelerator": ACCELERATOR,
        "aux_loss_enabled": False,
        "_metrics": {"train": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    return SimpleNamespace(**defaults | fields)


def trl_model(logps: Tensor, **fields: Any) -> Any:
    """A model for TRL's trainers that returns these token log-probs for any input."""
    zeros = torch.zeros_like(logps).detach()
    values = {"entropy": zeros, "mean_logits": zeros, "is_top1": zeros.bool(), "log_probs": logps} | fields
    return lambda **_: SimpleNamespace(**values)


def trl_inputs(mask: Tensor) -> dict[str, Tensor]:
    """Inputs that are one token longer than `mask`, because TRL shifts them by one."""
    shifted = torch.cat([torch.zeros(len(mask), 1, dtype=torch.long), mask.long()], 1)
    return {"input_ids": torch.ones_like(shifted), "attention_mask": shifted, "completion_mask": shifted}


def trl_loss(pairs: Pairs, settings: DPOHyperparameters) -> Tensor:
    """The mean loss as TRL's DPOTrainer computes it from the log-probs of tokens."""
    chosen, rejected = pairs.reference.chunk(2)
    trainer = trl_trainer(
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type=settings.f_divergence or "reverse_kl",
        f_alpha_divergence_coef=1 - (settings.f_alpha or 0.5),
        loss_types=[term.name for term in settings.losses],
        loss_weights=[term.weight for term in settings.losses],
        beta=settings.beta or 1.0,
        label_smoothing=settings.label_smoothing or 0.0,
        use_weighting=bool(settings.use_weighting),
        args=SimpleNamespace(discopop_tau=settings.discopop_tau or 0.05),
    )
    model = trl_model(pairs.logps, log_sum_sq_probs=pairs.squares)
    inputs = trl_inputs(pairs.mask) | {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    loss = DPOTrainer._compute_loss(trainer, model, inputs, False)
    assert isinstance(loss, Tensor)
    return loss


def assert_same(ours: Tensor, theirs: Tensor, leaf: Tensor, tolerance: float = 1e-6) -> None:
    """Both losses, and their gradients with respect to `leaf`."""
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    (our_gradient,) = torch.autograd.grad(ours.sum(), leaf, retain_graph=True)
    (their_gradient,) = torch.autograd.grad(theirs.sum(), leaf)
    assert their_gradient.abs().max() > 100 * tolerance
    torch.testing.assert_close(our_gradient, their_gradient, rtol=tolerance, atol=tolerance)


def losses_that_read(option: str) -> list[str]:
    """TRL's losses that read this option of ours."""
    return [name for name in TRL_LOSSES if LOSSES[name].reads(option)]


PARITY: list[dict[str, Any]] = [
    *({"loss": name} for name in TRL_LOSSES if name not in ("bco_pair", "exo_pair")),
    *({"loss": name, "beta": 2.0} for name in TRL_LOSSES if name not in ("bco_pair", "exo_pair", "sft")),
    *({"loss": name, "label_smoothing": 0.2} for name in losses_that_read("label_smoothing") if name != "sigmoid"),
    {"loss": "exo_pair", "label_smoothing": 1e-3},
    {"loss": "discopop", "discopop_tau": 0.5},
    *(
        {"loss": name, "f_divergence": divergence, "label_smoothing": 0.1 if name == "exo_pair" else None}
        for name in losses_that_read("f_divergence")
        for divergence in ("reverse_kl", "forward_kl", "js_divergence")
    ),
    {"loss": [{"name": "sigmoid", "weight": 0.8}, {"name": "sft", "weight": 2.0}]},
    {"loss": [{"name": "ipo", "weight": 0.01}, {"name": "hinge"}, {"name": "sppo_hard", "weight": 0.5}]},
    {"loss": [{"name": "aot", "weight": 0.3}, {"name": "apo_zero", "weight": 3.0}, {"name": "sigmoid_norm"}]},
]


def case_id(case: dict[str, Any]) -> str:
    loss = case["loss"] if isinstance(case["loss"], str) else "+".join(term["name"] for term in case["loss"])
    return "-".join([loss, *(str(value) for key, value in case.items() if key != "loss" and value is not None)])


@pytest.mark.parametrize("case", PARITY, ids=case_id)
def test_loss_and_gradient_equal_trls(case: dict[str, Any]) -> None:
    pairs, settings = make_pairs(), make_settings(**case)
    assert_same(losses_of(pairs.batch(), settings).mean(), trl_loss(pairs, settings), pairs.tokens)


@pytest.mark.parametrize("alpha", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("name", losses_that_read("f_alpha"))
def test_the_alpha_divergence_equals_trls(name: str, alpha: float) -> None:
    """In single precision: TRL 1.16 raises a KeyError in double."""
    pairs = make_pairs().single()
    smoothing = 0.1 if name == "exo_pair" else None
    settings = make_settings(loss=name, f_divergence="alpha_divergence", f_alpha=alpha, label_smoothing=smoothing)
    assert_same(losses_of(pairs.batch(), settings).mean(), trl_loss(pairs, settings), pairs.tokens, tolerance=1e-5)


@pytest.mark.parametrize("name", [name for name in losses_that_read("use_weighting") if name not in ("sft", "hinge")])
def test_wpo_weighs_pairs_as_trl_does(name: str) -> None:
    pairs = make_pairs().centred()
    settings = make_settings(loss=name, use_weighting=True, label_smoothing=0.1 if name == "exo_pair" else None)
    ours = losses_of(pairs.batch(weighting=True), settings).mean()
    assert_same(ours, trl_loss(pairs, settings), pairs.tokens)
    assert not torch.allclose(ours, losses_of(pairs.batch(), settings).mean(), rtol=0.01)


@pytest.mark.parametrize("name", ["sft", "hinge"])
def test_wpo_weighs_each_pair_by_its_probabilities(name: str) -> None:
    """TRL 1.16 raises with these losses: it overwrites a tensor that the backward pass needs."""
    pairs, settings = make_pairs(), make_settings(loss=name, use_weighting=True)
    aligned = (pairs.logps - pairs.squares).detach() * pairs.mask
    chosen, rejected = (aligned.sum(1) / pairs.mask.sum(1)).exp().chunk(2)
    expected = chosen * rejected * losses_of(pairs.batch(), settings)
    assert_same(losses_of(pairs.batch(weighting=True), settings), expected, pairs.tokens)


def test_bco_equals_trls_where_the_rewards_have_mean_zero() -> None:
    settings = make_settings(loss="bco_pair")
    pairs = make_pairs().centred()
    assert_same(losses_of(pairs.batch(), settings).mean(), trl_loss(pairs, settings), pairs.tokens)
    shifted = replace(pairs, reference=pairs.reference - 3)
    assert not torch.allclose(losses_of(shifted.batch(), settings).mean(), trl_loss(shifted, settings), rtol=0.01)


def test_bco_shifts_by_the_mean_reward_without_gradient() -> None:
    policy, reference = pair_of_logps()
    policy.requires_grad_()
    rewards = BETA * (policy - reference)
    delta = 0.5 * (rewards[:, 0].mean() + rewards[:, 1].mean()).item()
    assert abs(delta) > 0.1
    expected = torch.log1p(torch.exp(delta - rewards[:, 0])) + torch.log1p(torch.exp(rewards[:, 1] - delta))
    assert_same(losses_of(make_batch(policy, reference), make_settings(loss="bco_pair")), expected, policy)


def test_ipo_without_length_average_uses_summed_logps() -> None:
    policy, reference = pair_of_logps()
    policy.requires_grad_()
    lengths = torch.arange(12).reshape(6, 2) + 3
    margins = policy[:, 0] - policy[:, 1] - (reference[:, 0] - reference[:, 1])
    settings = make_settings(loss="ipo", ipo_length_average=False)
    assert_same(
        losses_of(make_batch(policy, reference, lengths=lengths), settings), (margins - 0.5 / BETA) ** 2, policy
    )


def test_label_smoothing_of_sigmoid_is_cdpo() -> None:
    policy, reference = pair_of_logps()
    policy.requires_grad_()
    rewards = BETA * (policy - reference)
    margins = rewards[:, 0] - rewards[:, 1]
    expected = 0.8 * torch.log1p(torch.exp(-margins)) + 0.2 * torch.log1p(torch.exp(margins))
    settings = make_settings(loss="sigmoid", label_smoothing=0.2)
    assert_same(losses_of(make_batch(policy, reference), settings), expected, policy)


def test_the_default_smoothing_of_exo_is_a_thousandth() -> None:
    batch = make_batch(*pair_of_logps())
    default, explicit, doubled = (make_settings(loss="exo_pair", label_smoothing=value) for value in (None, 1e-3, 2e-3))
    torch.testing.assert_close(losses_of(batch, default), losses_of(batch, explicit))
    assert not torch.allclose(losses_of(batch, default), losses_of(batch, doubled))


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.99])
@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"])
def test_link_is_the_derivative_of_the_divergence(name: str, alpha: float) -> None:
    """f is that of Wang et al., Table 1. A pair takes the difference of two links, so constants cancel."""
    ratios = torch.linspace(0.05, 8, 40, dtype=torch.float64, requires_grad=True)
    divergence = {
        "reverse_kl": ratios * ratios.log(),
        "forward_kl": -ratios.log(),
        "js_divergence": ratios * ratios.log() - (ratios + 1) * ((ratios + 1) / 2).log(),
        "alpha_divergence": (ratios ** (1 - alpha) - (1 - alpha) * ratios - alpha) / (alpha * (alpha - 1)),
    }[name]
    (expected,) = torch.autograd.grad(divergence.sum(), ratios)
    links = link(ratios.detach().log(), name, alpha)
    torch.testing.assert_close(links - links[0], expected - expected[0], rtol=1e-9, atol=1e-9)
    assert link(torch.zeros(1), name, alpha).item() == 0


def test_alpha_divergence_of_small_alpha_is_reverse_kl() -> None:
    logratios = torch.linspace(-5, 5, 11, dtype=torch.float64)
    torch.testing.assert_close(link(logratios, "alpha_divergence", 1e-9), logratios, rtol=1e-6, atol=1e-6)


def test_the_gradient_of_sigmoid_equals_the_papers() -> None:
    """∇L = −β σ(r̂_l − r̂_w) [∇log π(y_w) − ∇log π(y_l)], below Eq. 7."""
    policy, reference = pair_of_logps()
    policy.requires_grad_()
    losses = losses_of(make_batch(policy, reference), make_settings(loss="sigmoid"))
    (gradient,) = torch.autograd.grad(losses.sum(), policy)
    rewards = BETA * (policy - reference).detach()
    weight = 1 / (1 + torch.exp(rewards[:, 0] - rewards[:, 1]))
    torch.testing.assert_close(gradient, torch.stack([-BETA * weight, BETA * weight], 1), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["sigmoid", "robust", "aot", "sigmoid_norm", "plackett_luce", "reward_model"])
def test_an_undecided_pair_costs_ln_2(name: str) -> None:
    policy, _ = pair_of_logps()
    equal_logps = policy[:, :1].expand(-1, 2)
    losses = losses_of(make_batch(equal_logps, torch.full_like(equal_logps, -18.0)), make_settings(loss=name))
    assert losses.tolist() == pytest.approx([math.log(2)] * len(equal_logps))


@pytest.mark.parametrize("gamma", [0.0, 0.7, None])
def test_simpo_equals_trls(gamma: float | None) -> None:
    policy = pair_of_logps()[0].requires_grad_()
    lengths = torch.arange(12).reshape(6, 2) + 3
    settings = make_settings(loss="simpo", beta=2.0, simpo_gamma=gamma)
    trainer = SimpleNamespace(
        alpha=0.0,
        accelerator=ACCELERATOR,
        loss_type="simpo",
        simpo_gamma=1.0 if gamma is None else gamma,
        beta=2.0,
        label_smoothing=0.0,
    )
    means = policy / lengths
    theirs = CPOTrainer.cpo_loss(trainer, means[:, 0], means[:, 1])[0]
    assert_same(losses_of(make_batch(policy, lengths=lengths), settings), theirs, policy)


@pytest.mark.parametrize(("smoothing", "alpha"), [(None, None), (0.2, None), (None, 0.0), (None, 3.0)])
def test_cpo_equals_trls_loss_plus_the_likelihood(smoothing: float | None, alpha: float | None) -> None:
    policy = pair_of_logps()[0].requires_grad_()
    lengths = torch.arange(12).reshape(6, 2) + 3
    settings = make_settings(loss="cpo", label_smoothing=smoothing, cpo_alpha=alpha)
    trainer = SimpleNamespace(
        alpha=0.0, accelerator=ACCELERATOR, loss_type="sigmoid", beta=BETA, label_smoothing=smoothing or 0.0
    )
    likelihood = -policy[:, 0].sum() / lengths[:, 0].sum()
    theirs = CPOTrainer.cpo_loss(trainer, policy[:, 0], policy[:, 1])[0].mean()
    expected = theirs + (1.0 if alpha is None else alpha) * likelihood
    assert_same(losses_of(make_batch(policy, lengths=lengths), settings).mean(), expected, policy)


def test_orpo_equals_trls_odds_loss_plus_the_likelihood() -> None:
    """TRL computes the odds in single precision."""
    policy = pair_of_logps()[0].requires_grad_()
    lengths = torch.arange(12).reshape(6, 2) * 6 + 3
    means = policy / lengths
    trainer = SimpleNamespace(accelerator=ACCELERATOR, beta=BETA)
    odds = ORPOTrainer.odds_ratio_loss(trainer, means[:, 0], means[:, 1])[0].double().mean()
    expected = -policy[:, 0].sum() / lengths[:, 0].sum() - odds
    ours = losses_of(make_batch(policy, lengths=lengths), make_settings(loss="orpo")).mean()
    assert_same(ours, expected, policy, tolerance=1e-5)


def test_orpo_equals_the_papers_formula() -> None:
    policy = (-4 * random(40, 2, seed=5).abs()).requires_grad_()
    lengths = torch.full((40, 2), 4)
    probabilities = torch.exp(policy / 4)
    assert probabilities.min() < 0.3 and probabilities.max() > 0.95
    odds = probabilities / (1 - probabilities)
    expected = -policy[:, 0] / 4 + BETA * torch.log1p(odds[:, 1] / odds[:, 0])
    assert_same(losses_of(make_batch(policy, lengths=lengths), make_settings(loss="orpo")), expected, policy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_orpo_is_finite_at_probabilities_of_0_and_1(dtype: torch.dtype) -> None:
    values = [0.0, -1e-30, -1e-12, -1e-7, -0.693, -0.6931471805599453, -0.694, -30.0, -2000.0, -1e6]
    policy = torch.tensor(list(itertools.product(values, repeat=2)), dtype=dtype, requires_grad=True)
    losses = losses_of(make_batch(policy, lengths=torch.ones(len(policy), 2)), make_settings(loss="orpo"))
    (gradient,) = torch.autograd.grad(losses.sum(), policy)
    assert losses.isfinite().all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("shift", [2.0, -5.0])
@pytest.mark.parametrize("weights", [{}, {"desirable_weight": 1.7, "undesirable_weight": 0.4}])
def test_kto_equals_trls(shift: float, weights: dict[str, float]) -> None:
    policy, reference = pair_of_logps()
    policy.requires_grad_()
    reference[:, 1] = policy[:, 1].detach() - 2 * random(6, seed=6) - shift
    desirable = torch.tensor([True, True, False, True, False, False])
    divergence = (policy[:, 1] - reference[:, 1]).mean().item()
    assert (divergence > 0) == (shift > 0)

    trainer = trl_trainer(
        calculate_KL=True,
        precompute_ref_logps=True,
        loss_type="kto",
        beta=BETA,
        desirable_weight=weights.get("desirable_weight", 1.0),
        undesirable_weight=weights.get("undesirable_weight", 1.0),
        _compute_kl_logps=lambda *_: policy[:, 1],
    )
    inputs = trl_inputs(torch.ones(6, 1)) | {
        "label": desirable,
        "ref_logps": reference[:, 0],
        "ref_KL_logps": reference[:, 1],
    }
    theirs = KTOTrainer._compute_loss(trainer, trl_model(policy[:, :1]), inputs, False)
    losses = losses_of(make_batch(policy, reference, desirable=desirable), make_settings(loss="kto", **weights))
    assert_same(losses.mean(), theirs, policy)
    (gradient,) = torch.autograd.grad(losses.sum(), policy)
    assert (gradient[:, 0] != 0).all()
    assert (gradient[:, 1] == 0).all()


def test_plackett_luce_of_two_responses_is_dpo() -> None:
    policy, reference = pair_of_logps()
    policy.requires_grad_()
    batch = make_batch(policy, reference)
    listwise = losses_of(batch, make_settings(loss="plackett_luce"))
    assert_same(listwise, losses_of(batch, make_settings(loss="sigmoid")), policy)


def ranking_probability(rewards: Sequence[Tensor]) -> Tensor:
    """Π_k exp r_k / Σ_{j≥k} exp r_j."""
    product = torch.ones((), dtype=torch.float64)
    for k, reward in enumerate(rewards):
        product = product * reward.exp() / sum(other.exp() for other in rewards[k:])
    return product


def test_plackett_luce_of_four_responses_equals_the_closed_form() -> None:
    policy, reference = (-20 + 3 * random(5, 4, seed=7)).requires_grad_(), -20 + 3 * random(5, 4, seed=8)
    rewards = BETA * (policy - reference)
    expected = torch.stack([-ranking_probability(list(row)).log() for row in rewards])
    assert_same(losses_of(make_batch(policy, reference), make_settings(loss="plackett_luce")), expected, policy)


def test_plackett_luce_probabilities_of_all_orderings_sum_to_one() -> None:
    policy, reference = -20 + 3 * random(4, seed=7), -20 + 3 * random(4, seed=8)
    orders = torch.tensor(list(itertools.permutations(range(4))))
    losses = losses_of(make_batch(policy[orders], reference[orders]), make_settings(loss="plackett_luce"))
    probabilities = torch.exp(-losses)
    assert probabilities.max() > 2 * probabilities.min()
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("scale", [1.0, 2000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_padded_list_costs_the_same_as_it_does_alone(dtype: torch.dtype, scale: float) -> None:
    counts = [2, 4, 3, 5, 2]
    settings = make_settings(loss="plackett_luce")
    policy = (scale * random(5, 5, seed=9)).to(dtype).requires_grad_()
    reference = random(5, 5, seed=10).to(dtype)
    present = torch.arange(5) < torch.tensor(counts)[:, None]
    losses = losses_of(make_batch(policy, reference, present=present), settings)
    (gradient,) = torch.autograd.grad(losses.sum(), policy)
    assert (gradient[~present] == 0).all()
    for row, count in enumerate(counts):
        alone = policy[row : row + 1, :count].detach().requires_grad_()
        loss = losses_of(make_batch(alone, reference[row : row + 1, :count]), settings)
        (expected,) = torch.autograd.grad(loss.sum(), alone)
        assert loss.isfinite().all() and expected.isfinite().all()
        torch.testing.assert_close(losses[row : row + 1], loss)
        torch.testing.assert_close(gradient[row : row + 1, :count], expected)


@pytest.mark.parametrize("alpha", [None, 0.0, 1.0])
def test_unlikelihood_adds_the_log_prob_of_the_rejected(alpha: float | None) -> None:
    policy = pair_of_logps()[0].requires_grad_()
    losses = losses_of(make_batch(policy), make_settings(loss="unlikelihood", unlikelihood_alpha=alpha))
    weight = 0.1 if alpha is None else alpha
    torch.testing.assert_close(losses, -policy[:, 0] + weight * policy[:, 1], rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(losses.sum(), policy)
    assert gradient.tolist() == [[-1.0, weight]] * len(policy)


def test_the_reward_model_loss_equals_trls() -> None:
    rewards = (3 * random(6, 2, seed=11)).requires_grad_()
    outputs = SimpleNamespace(logits=torch.cat([rewards[:, 0], rewards[:, 1]])[:, None])
    trainer = trl_trainer(args=SimpleNamespace(center_rewards_coefficient=None))
    inputs = {"attention_mask": torch.ones(12, 3)}
    theirs = RewardTrainer.compute_loss(trainer, lambda **_: outputs, inputs)
    assert_same(losses_of(make_batch(rewards), make_settings(loss="reward_model")).mean(), theirs, rewards)


@pytest.mark.parametrize("name", sorted(supervised.TOKEN_LOSSES))
def test_supervised_losses_equal_trls(name: str) -> None:
    pairs = make_pairs()
    trainer = trl_trainer(
        args=SimpleNamespace(loss_type=name, average_tokens_across_devices=False, max_length=None),
        compute_loss_func=None,
        label_smoother=None,
    )
    model = trl_model(pairs.logps, label_mask=pairs.mask)
    theirs = SFTTrainer.compute_loss(trainer, model, trl_inputs(pairs.mask))
    losses = supervised.TOKEN_LOSSES[name](pairs.tokens[pairs.mask])
    assert losses.shape == (int(pairs.mask.sum()),)
    assert_same(losses.mean(), theirs, pairs.tokens)


def test_the_weight_of_dft_has_no_gradient() -> None:
    logps = torch.log(torch.tensor([0.9, 0.5, 1e-3, 1.0], dtype=torch.float64)).requires_grad_()
    losses = supervised.TOKEN_LOSSES["dft"](logps)
    (gradient,) = torch.autograd.grad(losses.sum(), logps)
    probabilities = [0.9, 0.5, 1e-3, 1.0]
    assert losses.tolist() == pytest.approx([-p * math.log(p) for p in probabilities])
    assert gradient.tolist() == pytest.approx([-p for p in probabilities])


EXTREMES = [
    (name, divergence, dtype)
    for name in NAMES
    for divergence in (None, "forward_kl", "js_divergence", "alpha_divergence")
    for dtype in (torch.float32, torch.float64)
    if (divergence is None or LOSSES[name].reads("f_divergence"))
    # The square of exp(80) overflows float32.
    and (name != "ipo" or divergence in (None, "js_divergence") or dtype == torch.float64)
]


@pytest.mark.parametrize("beta", [None, 1.0])
@pytest.mark.parametrize(("name", "divergence", "dtype"), EXTREMES, ids=str)
def test_losses_and_gradients_stay_finite_at_extreme_log_ratios(
    name: str, divergence: str | None, dtype: torch.dtype, beta: float | None
) -> None:
    logratios = torch.tensor(list(itertools.product([-2000.0, 0.0, 2000.0], repeat=2)), dtype=dtype)
    policy = (logratios - 3000).requires_grad_()
    reference = torch.full_like(logratios, -3000)
    beta = None if LOSSES[name].beta is None else beta
    settings = make_settings(loss=name, f_divergence=divergence, beta=beta)
    for lengths in (torch.ones(9, 2), torch.tensor([[1.0, 1000.0]]).expand(9, 2)):
        losses = losses_of(make_batch(policy, reference, lengths=lengths), settings)
        (gradient,) = torch.autograd.grad(losses.sum(), policy)
        assert losses.isfinite().all(), losses
        assert gradient.isfinite().all(), gradient


def test_every_loss_has_a_record_and_a_function() -> None:
    assert set(OBJECTIVES) == set(LOSSES)


@pytest.mark.parametrize("name", NAMES)
def test_a_loss_couples_rows_exactly_where_its_record_says_so(name: str) -> None:
    policy, reference = pair_of_logps()
    settings = make_settings(loss=name)
    moved = policy.clone()
    moved[0] += torch.tensor([40.0, 15.0])
    before = losses_of(make_batch(policy, reference), settings)
    after = losses_of(make_batch(moved, reference), settings)
    assert before.shape == (6,)
    assert not torch.equal(before, after)
    assert torch.equal(before[1:], after[1:]) != LOSSES[name].couples


CHANGES: dict[str, Any] = {
    "label_smoothing": 0.3,
    "f_divergence": "js_divergence",
    "f_alpha": 0.8,
    "ipo_length_average": False,
    "discopop_tau": 2.0,
    "simpo_gamma": 3.0,
    "cpo_alpha": 0.5,
    "unlikelihood_alpha": 0.9,
    "desirable_weight": 2.0,
    "undesirable_weight": 2.0,
}


@pytest.mark.parametrize("option", sorted(CHANGES))
@pytest.mark.parametrize("name", NAMES)
def test_a_loss_reads_the_options_that_it_declares(name: str, option: str) -> None:
    batch = make_batch(*pair_of_logps())
    divergence = {"f_divergence": "alpha_divergence"} if option == "f_alpha" else {}
    settings = make_settings(loss=name).model_copy(update=divergence)
    changed = settings.model_copy(update={option: CHANGES[option]})
    unchanged = torch.equal(losses_of(batch, settings), losses_of(batch, changed))
    assert unchanged != LOSSES[name].reads(option)


@pytest.mark.parametrize("name", NAMES)
def test_a_loss_reads_beta_and_the_reference_exactly_where_its_record_says_so(name: str) -> None:
    policy, reference = pair_of_logps()
    settings = make_settings(loss=name)
    losses = losses_of(make_batch(policy, reference), settings)
    other_beta = losses_of(make_batch(policy, reference), settings.model_copy(update={"beta": 0.9}))
    other_reference = losses_of(make_batch(policy, reference + random(6, 2, seed=12)), settings)
    assert torch.equal(losses, other_beta) == (LOSSES[name].beta is None)
    assert torch.equal(losses, other_reference) != LOSSES[name].reference


def test_a_sum_of_losses_is_weighted() -> None:
    policy, reference = pair_of_logps()
    batch = make_batch(policy, reference)
    mixed = make_settings(loss=[{"name": "sigmoid", "weight": 0.25}, {"name": "unlikelihood", "weight": 4.0}])
    margins = BETA * ((policy - reference)[:, 0] - (policy - reference)[:, 1])
    expected = -0.25 * logsigmoid(margins) + 4 * (-policy[:, 0] + 0.1 * policy[:, 1])
    torch.testing.assert_close(losses_of(batch, mixed), expected, rtol=1e-12, atol=0)
