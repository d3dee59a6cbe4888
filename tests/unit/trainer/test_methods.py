"""The gradient of a step: over several packs, for lists and labels, and with a moving reference."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import pytest
import torch
from torch import Tensor

from app.spec.datasets.example import Kind
from app.spec.hyperparameters import DPOHyperparameters, SupervisedHyperparameters
from app.spec.losses import LOSSES
from tests.helpers.trainer import disturb, dpo_method, load, make_row, plain_logps
from worker.trainer import reference
from worker.trainer.arrays import Shelf
from worker.trainer.averages import Averages
from worker.trainer.data import Row
from worker.trainer.dataset import Rows
from worker.trainer.launcher import Launcher
from worker.trainer.methods.method import Method
from worker.trainer.methods.metrics import gradient_weights, report
from worker.trainer.methods.mismatches import with_mismatches
from worker.trainer.methods.preference import Preference
from worker.trainer.methods.supervised import Supervised
from worker.trainer.objectives import losses_of, rewards_of
from worker.trainer.objectives.batch import Batch
from worker.trainer.reference import Reference, References

PAIRS = [make_row(line, 6 + line % 3, 3 + line, 9 - line) for line in range(1, 8)]
RANKED = [make_row(line, 5, *[3 + k for k in range(2 + line % 3)]) for line in range(1, 8)]
EMPTY_REFERENCE = Reference(torch.zeros(0), torch.zeros(0, dtype=torch.long), torch.zeros(0))


def rows_for(name: str) -> Rows:
    kind = LOSSES[name].data
    if kind == Kind.RANKED:
        return Rows.of(RANKED)
    if kind == Kind.LABELLED:
        single = [replace(row, responses=row.responses[:1], desirable=row.line % 3 > 0) for row in PAIRS]
        return with_mismatches(Rows.of(single), 64, Shelf())
    return Rows.of(PAIRS)


def make_method(llama: Path, rows: Rows, **settings: Any) -> Preference:
    """A preference method in float64 on a policy that has left its reference."""
    hyperparameters = DPOHyperparameters(**settings).resolved(full=False)
    policy = load(llama, method=dpo_method(**settings))
    policy.model.double()
    if policy.reward_head is not None:
        policy.reward_head.double()
    references = None
    if hyperparameters.needs_reference:
        references = References(reference.compute(Launcher(policy), rows, hyperparameters.ld_alpha), EMPTY_REFERENCE)
    disturb(policy, 0.05)
    method = Preference(Launcher(policy), hyperparameters, rows, Rows.of([]))
    method.references = references
    return method


def step_gradients(method: Method, budget: int) -> tuple[dict[str, float], dict[str, Tensor]]:
    """(metrics, gradients) of a step over all rows, in packs of at most `budget` tokens."""
    policy = method.policy
    policy.packing = replace(policy.packing, budget=budget, segment_tokens=budget)
    averages = Averages()
    method.gradient(list(range(len(method.train))), averages)
    gradients = {name: parameter.grad for name, parameter in policy.trainable().items() if parameter.grad is not None}
    for parameter in policy.trainable().values():
        parameter.grad = None
    return averages.means(), gradients


@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_split_over_many_packs_has_the_gradient_of_one_pack(llama: Path, name: str) -> None:
    """This includes the losses that couple rows: AOT, BCO and KTO."""
    method = make_method(llama, rows_for(name), loss=name)
    packing = replace(method.policy.packing, budget=60, segment_tokens=60)
    packs = list(packing.packs(method.train, range(len(method.train))))
    assert len(packs) >= 3
    whole, expected = step_gradients(method, 100_000)
    split, actual = step_gradients(method, 60)
    assert_same_gradients(actual, expected)
    for metric, value in whole.items():
        assert split[metric] == pytest.approx(value, rel=1e-6, abs=1e-9), metric


def test_a_weighted_sum_with_wpo_has_the_same_gradient_over_many_packs(llama: Path) -> None:
    terms = [{"name": "bco_pair", "weight": 0.5}, {"name": "sft", "weight": 2.0}]
    method = make_method(llama, Rows.of(PAIRS), loss=terms, use_weighting=True)
    expected, actual = step_gradients(method, 100_000)[1], step_gradients(method, 60)[1]
    assert_same_gradients(actual, expected)


@pytest.mark.parametrize("name", ["sigmoid", "bco_pair"])
def test_a_row_that_a_batch_has_twice_counts_twice(llama: Path, name: str) -> None:
    """A batch can continue over the end of an epoch."""
    method = make_method(llama, Rows.of(PAIRS), loss=name)
    method.policy.packing = replace(method.policy.packing, budget=60, segment_tokens=60)
    twice = make_method(llama, Rows.of([*PAIRS[:3], PAIRS[1]]), loss=name)
    method.gradient([0, 1, 2, 1], Averages())
    twice.gradient([0, 1, 2, 3], Averages())
    actual, expected = (
        {name: parameter.grad for name, parameter in made.policy.trainable().items() if parameter.grad is not None}
        for made in (method, twice)
    )
    assert_same_gradients(actual, expected)


@pytest.mark.parametrize("loss", ["nll", "dft"])
def test_a_supervised_batch_split_over_many_packs_has_the_gradient_of_one_pack(
    llama: Path, loss: Literal["nll", "dft"]
) -> None:
    rows = Rows.of([replace(row, responses=row.responses[:1]) for row in PAIRS])
    policy = disturb(load(llama), 0.05)
    policy.model.double()
    settings = SupervisedHyperparameters(loss=loss).resolved(full=False)
    method = Supervised(Launcher(policy), settings, rows, Rows.of([]))
    (whole, expected), (split, actual) = step_gradients(method, 100_000), step_gradients(method, 40)
    assert_same_gradients(actual, expected)
    assert split == pytest.approx(whole)


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        tolerance = 1e-6 * gradient.abs().max().item()
        torch.testing.assert_close(actual[name], gradient, rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("name", ["sigmoid", "kto", "plackett_luce", "simpo"])
def test_the_loss_of_a_step_equals_that_of_the_log_probs_of_one_text_at_a_time(llama: Path, name: str) -> None:
    rows = rows_for(name)
    method = make_method(llama, rows, loss=name)
    with torch.no_grad():
        policy_logps = [plain_logps(method.policy, row) for row in rows]
        base = load(llama)
        base.model.double()
        reference_logps = [plain_logps(base, row) for row in rows]
    loss = losses_of(batch_of_logps(rows, policy_logps, reference_logps), method.settings).mean().item()
    assert step_gradients(method, 60)[0]["loss"] == pytest.approx(loss, rel=1e-5)


def batch_of_logps(rows: Rows, policy_logps: list[Tensor], reference_logps: list[Tensor]) -> Batch:
    """The batch of these rows, given the log-probs of their responses."""

    def padded(values: list[Tensor]) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(values, batch_first=True)

    lengths = [torch.tensor([sum(response.scored) for response in row.responses]) for row in rows]
    return Batch(
        padded(policy_logps),
        padded(reference_logps),
        padded(lengths),
        padded([torch.ones(len(row.responses), dtype=torch.bool) for row in rows]),
        torch.tensor([row.desirable for row in rows]),
        sum(int(length[0]) for length in lengths) / len(rows),
    )


def test_rewards_are_the_heads_output_at_the_last_token(llama: Path) -> None:
    method = make_method(llama, Rows.of(PAIRS), loss="reward_model")
    policy = method.policy
    assert policy.reward_head is not None
    (pack,) = replace(policy.packing, budget=100_000).packs(PAIRS, range(len(PAIRS)))
    rewards = policy.rewards(pack)
    expected = []
    for number in pack.rows:
        for response in PAIRS[number].responses:
            ids = torch.tensor([PAIRS[number].prompt + response.ids])
            with policy.own_attention_in_use():
                states = policy.causal.base_model(input_ids=ids, use_cache=False).last_hidden_state
            expected.append(policy.reward_head(states[0, -1]))
    torch.testing.assert_close(rewards, torch.cat(expected), rtol=1e-6, atol=0)


def test_a_reference_that_follows_the_policy_is_a_mixture_of_both(llama: Path) -> None:
    """TR-DPO: reference ← α policy + (1 − α) reference, every few steps."""
    rows = Rows.of(PAIRS)
    method = make_method(llama, rows, sync_reference={"alpha": 0.25, "steps": 2})
    policy = method.policy
    assert method.anchor is not None and method.references is not None
    start = load(llama)
    start.model.double()
    method.anchor = {name: parameter.detach().clone() for name, parameter in start.trainable().items()}

    method.after_step(1)
    before, _ = step_gradients(method, 100_000)
    assert before["logratios/chosen"] != pytest.approx(0, abs=1e-3)
    method.after_step(2)
    mixture = load(llama)
    mixture.model.double()
    with torch.no_grad():
        for name, parameter in mixture.trainable().items():
            parameter.mul_(0.75).add_(0.25 * policy.trainable()[name])
        policy_logps = torch.stack([plain_logps(policy, row) for row in rows])
        mixture_logps = torch.stack([plain_logps(mixture, row) for row in rows])
    after, _ = step_gradients(method, 60)
    assert after["logratios/chosen"] == pytest.approx((policy_logps - mixture_logps)[:, 0].mean().item(), rel=1e-6)
    assert after["logratios/rejected"] == pytest.approx((policy_logps - mixture_logps)[:, 1].mean().item(), rel=1e-6)


def test_mismatched_answers_come_from_other_prompts_and_fit_into_max_length() -> None:
    rows = [replace(make_row(line, 4, 3 + line), line=line) for line in range(1, 5)]
    rows[1] = replace(rows[1], prompt=rows[0].prompt)
    mismatched = with_mismatches(Rows.of(rows), 8, Shelf())
    assert [row.responses[0] for row in mismatched] == [row.responses[0] for row in rows]
    lenders = [rows[2], rows[2], rows[3], rows[0]]
    assert [row.responses[1].ids for row in mismatched] == [lender.responses[0].ids[:4] for lender in lenders]
    assert all(any(row.responses[1].scored) for row in mismatched)


def test_mismatched_answers_come_from_other_rows_if_all_have_one_prompt() -> None:
    rows = [replace(make_row(1, 4, 3 + line), line=line) for line in range(3)]
    rows_of_one_prompt: list[Row] = [replace(row, prompt=rows[0].prompt) for row in rows]
    mismatched = with_mismatches(Rows.of(rows_of_one_prompt), 64, Shelf())
    assert [row.responses[1].ids for row in mismatched] == [
        rows_of_one_prompt[(k + 1) % 3].responses[0].ids for k in range(3)
    ]


def test_kto_metrics_tell_good_and_bad_answers_apart(llama: Path) -> None:
    method = make_method(llama, rows_for("kto"), loss="kto")
    means, _ = step_gradients(method, 60)
    assert means["kl"] >= 0
    with torch.no_grad():
        policy_logps = [plain_logps(method.policy, row)[0].item() for row in method.train]
    assert method.references is not None
    reference_logps = [
        float(method.references.train.look_up(torch.tensor([k]), torch.tensor([0]))[1])
        for k in range(len(policy_logps))
    ]
    desirable_rewards = [
        0.1 * (policy_logp - reference_logp)
        for policy_logp, reference_logp, row in zip(policy_logps, reference_logps, method.train, strict=True)
        if row.desirable
    ]
    undesirable_rewards = [
        0.1 * (policy_logp - reference_logp)
        for policy_logp, reference_logp, row in zip(policy_logps, reference_logps, method.train, strict=True)
        if not row.desirable
    ]
    assert means["rewards/chosen"] == pytest.approx(sum(desirable_rewards) / len(desirable_rewards), rel=1e-5)
    assert means["rewards/rejected"] == pytest.approx(sum(undesirable_rewards) / len(undesirable_rewards), rel=1e-5)


def test_a_ranked_lists_accuracy_counts_its_ordered_pairs(llama: Path) -> None:
    method = make_method(llama, Rows.of(RANKED), loss="plackett_luce")
    means, _ = step_gradients(method, 60)
    assert method.references is not None
    ordered = total = 0
    for number, row in enumerate(RANKED):
        with torch.no_grad():
            policy_logps = plain_logps(method.policy, row)
        count = len(row.responses)
        reference_logps = method.references.train.look_up(torch.full((count,), number), torch.arange(count))[1]
        rewards = policy_logps - reference_logps
        for k in range(count):
            for j in range(k + 1, count):
                ordered, total = ordered + int(rewards[k] > rewards[j]), total + 1
    assert means["rewards/accuracies"] == pytest.approx(ordered / total)


def test_a_moving_reference_leaves_the_policy_unchanged(llama: Path) -> None:
    method = make_method(llama, Rows.of(PAIRS), sync_reference={"alpha": 0.5, "steps": 1})
    before = {name: parameter.detach().clone() for name, parameter in method.policy.trainable().items()}
    method.after_step(1)
    step_gradients(method, 60)
    for name, parameter in method.policy.trainable().items():
        assert torch.equal(parameter, before[name])


CLOSED_FORMS: dict[str, tuple[dict[str, Any], Callable[[Tensor], Tensor]]] = {
    "DPO": ({"loss": "sigmoid"}, lambda margins: torch.sigmoid(-margins)),
    "cDPO": ({"loss": "sigmoid", "label_smoothing": 0.2}, lambda margins: torch.sigmoid(-margins) - 0.2),
    "robust": ({"loss": "robust", "label_smoothing": 0.2},
               lambda margins: (0.8 * torch.sigmoid(-margins) + 0.2 * torch.sigmoid(margins)) / 0.6),
    "hinge": ({"loss": "hinge"}, lambda margins: (margins < 1).double()),
    "IPO": ({"loss": "ipo", "beta": 0.2}, lambda margins: 2 * (2.5 - margins / 0.2) / 0.2),
    "length-normalised DPO": ({"loss": "sigmoid_norm"}, lambda margins: torch.sigmoid(-margins)),
    "SimPO": ({"loss": "simpo", "simpo_gamma": 0.5}, lambda margins: torch.sigmoid(-(margins - 0.5))),
    "CPO": ({"loss": "cpo", "cpo_alpha": 0.0}, lambda margins: torch.sigmoid(-margins)),
    "reward model": ({"loss": "reward_model"}, lambda margins: torch.sigmoid(-margins)),
    "DPO and likelihood": ({"loss": [{"name": "sft", "weight": 1e-9}, {"name": "sigmoid"}]},
                           lambda margins: torch.sigmoid(-margins)),
}  # fmt: skip


def batch_of(settings: DPOHyperparameters) -> Batch:
    generator = torch.Generator().manual_seed(5)
    policy, reference = torch.randn(2, 6, 2, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, 9, (6, 2), generator=generator)
    present = torch.ones(6, 2, dtype=torch.bool)
    if not settings.needs_reference:
        reference = torch.zeros_like(reference)
    return Batch(policy, reference, lengths, present, torch.ones(6, dtype=torch.bool), 4.0)


@pytest.mark.parametrize("case", CLOSED_FORMS)
def test_the_gradient_weight_is_the_negative_derivative_of_the_loss_by_the_margin(case: str) -> None:
    values, expected = CLOSED_FORMS[case]
    settings = DPOHyperparameters(**values).resolved(full=False)
    batch, averages = batch_of(settings), Averages()
    rewards = rewards_of(batch, settings)
    margins = rewards[:, 0] - rewards[:, 1]
    torch.testing.assert_close(gradient_weights(batch, settings), expected(margins), rtol=1e-5, atol=1e-6)
    report(batch, losses_of(batch, settings), settings, averages)
    assert averages.means()["gradient_weight"] == pytest.approx(expected(margins).mean().item(), rel=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_reports_a_gradient_weight(llama: Path, name: str) -> None:
    means, _ = step_gradients(make_method(llama, rows_for(name), loss=name), 60)
    assert means["gradient_weight"] > 0


def test_rewards_are_averaged_over_tokens_where_the_loss_does_that() -> None:
    sigmoid, sigmoid_norm, ipo = (
        DPOHyperparameters(loss=name, beta=0.3).resolved(full=False) for name in ("sigmoid", "sigmoid_norm", "ipo")
    )
    batch = batch_of(sigmoid)
    torch.testing.assert_close(rewards_of(batch, sigmoid), 0.3 * batch.logratios)
    torch.testing.assert_close(rewards_of(batch, sigmoid_norm), 0.3 * batch.logratios / batch.lengths)
    torch.testing.assert_close(rewards_of(batch, ipo), rewards_of(batch, sigmoid_norm))
    summed = ipo.model_copy(update={"ipo_length_average": False})
    torch.testing.assert_close(rewards_of(batch, summed), rewards_of(batch, sigmoid))


PAIRED = list(itertools.combinations(["sigmoid", "sft", "simpo", "sigmoid_norm", "apo_zero"], 2))


@pytest.mark.parametrize("names", PAIRED)
def test_the_metrics_of_a_sum_of_losses_do_not_depend_on_their_order(names: tuple[str, str]) -> None:
    terms = [{"name": name, "weight": 1.0 + k} for k, name in enumerate(names)]
    means_by_order = []
    for ordered in (terms, terms[::-1]):
        settings = DPOHyperparameters.model_validate({"loss": ordered, "beta": 0.4}).resolved(full=False)
        averages, batch = Averages(), batch_of(settings)
        report(batch, losses_of(batch, settings), settings, averages)
        means_by_order.append(averages.means())
    assert means_by_order[0].keys() == means_by_order[1].keys()
    for name, value in means_by_order[0].items():
        assert means_by_order[1][name] == pytest.approx(value), name


def test_reported_log_probs_are_unweighted_where_the_loss_weighs_tails_less(llama: Path) -> None:
    """LD-DPO: the loss sees a weighted sum. The metrics and the results of the validation have log π itself."""
    method = make_method(llama, Rows.of(PAIRS), loss="sigmoid", ld_alpha=0.3)
    method.validation, method.references = (
        method.train,
        References(EMPTY_REFERENCE, cast(References, method.references).train),
    )
    averages = Averages()
    validated = {row.number: (row.logps, row.reference_logps) for row in method.validate(averages, lambda: None)}
    base = load(llama)
    base.model.double()
    with torch.no_grad():
        policy_logps = [plain_logps(method.policy, row) for row in method.train]
        base_logps = [plain_logps(base, row) for row in method.train]
    for number, (validated_logps, validated_reference) in validated.items():
        torch.testing.assert_close(validated_logps, policy_logps[number], rtol=1e-6, atol=0)
        torch.testing.assert_close(validated_reference, base_logps[number], rtol=1e-6, atol=0)
    means = averages.means()
    assert means["logps/chosen"] == pytest.approx(torch.stack(policy_logps)[:, 0].mean().item(), rel=1e-6)
    ratios = torch.stack(policy_logps) - torch.stack(base_logps)
    assert means["logratios/rejected"] == pytest.approx(ratios[:, 1].mean().item(), rel=1e-6)
    assert means["rewards/chosen"] != pytest.approx(0.1 * ratios[:, 0].mean().item(), rel=1e-3)
