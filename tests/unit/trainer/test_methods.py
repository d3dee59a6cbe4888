"""What a step's gradient is: over packs that share a batch, over lists and labels, with references that move."""

import itertools
from collections.abc import Callable, Sequence
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
from worker.trainer.averages import Averages
from worker.trainer.data import Row
from worker.trainer.dataset import Rows
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
NOBODY = Reference(torch.zeros(0), torch.zeros(0, dtype=torch.long), torch.zeros(0))


def rows_for(name: str) -> Rows:
    kind = LOSSES[name].data
    if kind == Kind.RANKED:
        return Rows.of(RANKED)
    if kind == Kind.LABELLED:
        single = [replace(row, responses=row.responses[:1], desirable=row.line % 3 > 0) for row in PAIRS]
        return with_mismatches(Rows.of(single), 64)
    return Rows.of(PAIRS)


def make_method(llama: Path, rows: Rows, **settings: Any) -> Preference:
    """A preference method in float64 on a policy that has left its reference."""
    given = DPOHyperparameters(**settings).resolved(full=False)
    policy = load(llama, method=dpo_method(**settings))
    policy.model.double()
    if policy.reward_head is not None:
        policy.reward_head.double()
    references = None
    if given.needs_reference:
        references = References(reference.compute(policy, rows, given.ld_alpha), NOBODY)
    disturb(policy, 0.05)
    method = Preference(policy, given, rows, Rows.of([]))
    method.references = references
    return method


def step_gradients(method: Method, budget: int) -> tuple[dict[str, float], dict[str, Tensor]]:
    policy = method.policy
    policy.packing = replace(policy.packing, budget=budget)
    averages, numbers = Averages(), list(range(len(method.train)))
    method.backward(numbers, method.totals(numbers, averages), averages)
    found = {name: p.grad for name, p in policy.trainable().items() if p.grad is not None}
    for parameter in policy.trainable().values():
        parameter.grad = None
    return averages.means(), found


@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_split_over_many_packs_has_the_gradient_of_one(llama: Path, name: str) -> None:
    """Those that couple rows (aot, bco, KTO) too."""
    method = make_method(llama, rows_for(name), loss=name)
    packs = list(replace(method.policy.packing, budget=60).packs(method.train, range(len(method.train))))
    assert len(packs) >= 3
    together, expected = step_gradients(method, 100_000)
    split, found = step_gradients(method, 60)
    assert_same_gradients(found, expected)
    for metric, value in together.items():
        assert split[metric] == pytest.approx(value, rel=1e-6, abs=1e-9), metric


def test_a_weighted_sum_with_wpo_is_split_over_packs_alike(llama: Path) -> None:
    terms = [{"name": "bco_pair", "weight": 0.5}, {"name": "sft", "weight": 2.0}]
    method = make_method(llama, Rows.of(PAIRS), loss=terms, use_weighting=True)
    expected, found = step_gradients(method, 100_000)[1], step_gradients(method, 60)[1]
    assert_same_gradients(found, expected)


def gradient_of_parts(method: Method, parts: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """The gradient of a batch whose parts are computed one after another, as ranks would."""
    averages = Averages()
    totals = method.totals([number for part in parts for number in part], averages, divided=True)
    for part in parts:
        method.backward(part, totals, averages)
    found = {name: p.grad for name, p in method.policy.trainable().items() if p.grad is not None}
    for parameter in method.policy.trainable().values():
        parameter.grad = None
    return found


PARTS = [[0, 4, 2], [1], [6, 3, 5]]


@pytest.mark.parametrize("budget", [60, 100_000])
@pytest.mark.parametrize("name", LOSSES)
def test_the_gradients_of_a_batchs_parts_add_up_to_that_of_the_batch(llama: Path, name: str, budget: int) -> None:
    """Likelihood terms divide by the tokens of the whole batch; KTO, BCO and AOT compare with all of its rows."""
    method = make_method(llama, rows_for(name), loss=name)
    _, expected = step_gradients(method, budget)
    assert_same_gradients(gradient_of_parts(method, PARTS), expected)


@pytest.mark.parametrize("loss", ["nll", "dft"])
def test_the_gradients_of_a_supervised_batchs_parts_add_up_to_that_of_the_batch(
    llama: Path, loss: Literal["nll", "dft"]
) -> None:
    rows = Rows.of([replace(row, responses=row.responses[:1]) for row in PAIRS])
    policy = disturb(load(llama), 0.05)
    policy.model.double()
    method = Supervised(policy, SupervisedHyperparameters(loss=loss).resolved(full=False), rows, Rows.of([]))
    _, expected = step_gradients(method, 100_000)
    assert_same_gradients(gradient_of_parts(method, PARTS), expected)


def test_a_row_that_a_batch_has_twice_counts_twice_in_its_parts(llama: Path) -> None:
    """Batches run on over the ends of epochs."""
    method = make_method(llama, Rows.of(PAIRS), loss="bco_pair")
    method.policy.packing = replace(method.policy.packing, budget=60)
    numbers, averages = [0, 1, 2, 1], Averages()
    method.backward(numbers, method.totals(numbers, averages), averages)
    expected = {name: p.grad.clone() for name, p in method.policy.trainable().items() if p.grad is not None}
    method.policy.model.zero_grad(set_to_none=True)
    assert_same_gradients(gradient_of_parts(method, [[0, 1], [2, 1]]), expected)


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        tolerance = 1e-6 * gradient.abs().max().item()
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("name", ["sigmoid", "kto", "plackett_luce", "simpo"])
def test_the_loss_of_a_step_is_that_of_the_log_probs_one_text_at_a_time(llama: Path, name: str) -> None:
    rows = rows_for(name)
    method = make_method(llama, rows, loss=name)
    with torch.no_grad():
        ours = [plain_logps(method.policy, row) for row in rows]
        base = load(llama)
        base.model.double()
        theirs = [plain_logps(base, row) for row in rows]
    loss = losses_of(table(rows, ours, theirs), method.settings).mean().item()
    assert step_gradients(method, 60)[0]["loss"] == pytest.approx(loss, rel=1e-5)


def table(rows: Rows, ours: list[Tensor], theirs: list[Tensor]) -> Batch:
    def padded(values: list[Tensor]) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(values, batch_first=True)

    lengths = [torch.tensor([sum(response.scored) for response in row.responses]) for row in rows]
    return Batch(
        padded(ours),
        padded(theirs),
        padded(lengths),
        padded([torch.ones(len(row.responses), dtype=torch.bool) for row in rows]),
        torch.tensor([row.desirable for row in rows]),
        sum(int(length[0]) for length in lengths) / len(rows),
    )


def test_rewards_are_the_heads_answer_to_the_last_token(llama: Path) -> None:
    method = make_method(llama, Rows.of(PAIRS), loss="reward_model")
    policy = method.policy
    assert policy.reward_head is not None
    (pack,) = replace(policy.packing, budget=100_000).packs(PAIRS, range(len(PAIRS)))
    found = policy.rewards(pack)
    expected = []
    for number in pack.rows:
        for response in PAIRS[number].responses:
            ids = torch.tensor([PAIRS[number].prompt + response.ids])
            with policy.own_attention_in_use():
                states = policy.causal.base_model(input_ids=ids, use_cache=False).last_hidden_state
            expected.append(policy.reward_head(states[0, -1]))
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-6, atol=0)


def test_a_reference_that_follows_the_policy_is_a_mixture_of_both(llama: Path) -> None:
    """TR-DPO: reference ← α policy + (1 − α) reference, every few steps."""
    rows = Rows.of(PAIRS)
    method = make_method(llama, rows, sync_reference={"alpha": 0.25, "steps": 2})
    policy = method.policy
    assert method.anchor is not None and method.references is not None
    start = load(llama)
    start.model.double()
    method.anchor = {name: p.detach().clone() for name, p in start.trainable().items()}

    method.after_step(1)
    before, _ = step_gradients(method, 100_000)
    assert before["logratios/chosen"] != pytest.approx(0, abs=1e-3)
    method.after_step(2)
    mixture = load(llama)
    mixture.model.double()
    with torch.no_grad():
        for name, parameter in mixture.trainable().items():
            parameter.mul_(0.75).add_(0.25 * policy.trainable()[name])
        ours = torch.stack([plain_logps(policy, row) for row in rows])
        theirs = torch.stack([plain_logps(mixture, row) for row in rows])
    after, _ = step_gradients(method, 60)
    assert after["logratios/chosen"] == pytest.approx((ours - theirs)[:, 0].mean().item(), rel=1e-6)
    assert after["logratios/rejected"] == pytest.approx((ours - theirs)[:, 1].mean().item(), rel=1e-6)


def test_mismatched_answers_are_those_of_other_prompts_and_fit() -> None:
    rows = [replace(make_row(line, 4, 3 + line), line=line) for line in range(1, 5)]
    rows[1] = replace(rows[1], prompt=rows[0].prompt)
    made = with_mismatches(Rows.of(rows), 8)
    assert [row.responses[0] for row in made] == [row.responses[0] for row in rows]
    borrowed = [rows[2], rows[2], rows[3], rows[0]]
    assert [row.responses[1].ids for row in made] == [other.responses[0].ids[:4] for other in borrowed]
    assert all(any(row.responses[1].scored) for row in made)


def test_mismatched_answers_where_there_is_one_prompt_only() -> None:
    rows = [replace(make_row(1, 4, 3 + line), line=line) for line in range(3)]
    same: list[Row] = [replace(row, prompt=rows[0].prompt) for row in rows]
    made = with_mismatches(Rows.of(same), 64)
    assert [row.responses[1].ids for row in made] == [same[(k + 1) % 3].responses[0].ids for k in range(3)]


def test_kto_metrics_tell_good_and_bad_answers_apart(llama: Path) -> None:
    method = make_method(llama, rows_for("kto"), loss="kto")
    means, _ = step_gradients(method, 60)
    assert means["kl"] >= 0
    with torch.no_grad():
        ratios = [plain_logps(method.policy, row)[0].item() for row in method.train]
    assert method.references is not None
    known = [
        float(method.references.train.look_up(torch.tensor([k]), torch.tensor([0]))[1]) for k in range(len(ratios))
    ]
    good = [0.1 * (a - b) for a, b, row in zip(ratios, known, method.train, strict=True) if row.desirable]
    bad = [0.1 * (a - b) for a, b, row in zip(ratios, known, method.train, strict=True) if not row.desirable]
    assert means["rewards/chosen"] == pytest.approx(sum(good) / len(good), rel=1e-5)
    assert means["rewards/rejected"] == pytest.approx(sum(bad) / len(bad), rel=1e-5)


def test_a_ranked_lists_accuracy_counts_its_ordered_pairs(llama: Path) -> None:
    method = make_method(llama, Rows.of(RANKED), loss="plackett_luce")
    means, _ = step_gradients(method, 60)
    assert method.references is not None
    right = total = 0
    for number, row in enumerate(RANKED):
        with torch.no_grad():
            ours = plain_logps(method.policy, row)
        count = len(row.responses)
        theirs = method.references.train.look_up(torch.full((count,), number), torch.arange(count))[1]
        rewards = ours - theirs
        for k in range(count):
            for j in range(k + 1, count):
                right, total = right + int(rewards[k] > rewards[j]), total + 1
    assert means["rewards/accuracies"] == pytest.approx(right / total)


def test_a_policy_is_left_as_it_was_by_the_references_weights(llama: Path) -> None:
    method = make_method(llama, Rows.of(PAIRS), sync_reference={"alpha": 0.5, "steps": 1})
    before = {name: p.detach().clone() for name, p in method.policy.trainable().items()}
    method.after_step(1)
    step_gradients(method, 60)
    for name, parameter in method.policy.trainable().items():
        assert torch.equal(parameter, before[name])


CLOSED_FORMS: dict[str, tuple[dict[str, Any], Callable[[Tensor], Tensor]]] = {
    "DPO": ({"loss": "sigmoid"}, lambda m: torch.sigmoid(-m)),
    "cDPO": ({"loss": "sigmoid", "label_smoothing": 0.2}, lambda m: torch.sigmoid(-m) - 0.2),
    "robust": ({"loss": "robust", "label_smoothing": 0.2},
               lambda m: (0.8 * torch.sigmoid(-m) + 0.2 * torch.sigmoid(m)) / 0.6),
    "hinge": ({"loss": "hinge"}, lambda m: (m < 1).double()),
    "IPO": ({"loss": "ipo", "beta": 0.2}, lambda m: 2 * (2.5 - m / 0.2) / 0.2),
    "length-normalised DPO": ({"loss": "sigmoid_norm"}, lambda m: torch.sigmoid(-m)),
    "SimPO": ({"loss": "simpo", "simpo_gamma": 0.5}, lambda m: torch.sigmoid(-(m - 0.5))),
    "CPO": ({"loss": "cpo", "cpo_alpha": 0.0}, lambda m: torch.sigmoid(-m)),
    "reward model": ({"loss": "reward_model"}, lambda m: torch.sigmoid(-m)),
    "DPO and likelihood": ({"loss": [{"name": "sft", "weight": 1e-9}, {"name": "sigmoid"}]},
                           lambda m: torch.sigmoid(-m)),
}  # fmt: skip


def batch_of(settings: DPOHyperparameters) -> Batch:
    generator = torch.Generator().manual_seed(5)
    policy, reference = torch.randn(2, 6, 2, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, 9, (6, 2), generator=generator)
    there = torch.ones(6, 2, dtype=torch.bool)
    if not settings.needs_reference:
        reference = torch.zeros_like(reference)
    return Batch(policy, reference, lengths, there, torch.ones(6, dtype=torch.bool), 4.0)


@pytest.mark.parametrize("case", CLOSED_FORMS)
def test_the_gradient_weight_is_the_fall_of_the_loss_for_a_rise_of_the_margin(case: str) -> None:
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
    sums, means, ipo = (
        DPOHyperparameters(loss=name, beta=0.3).resolved(full=False) for name in ("sigmoid", "sigmoid_norm", "ipo")
    )
    batch = batch_of(sums)
    torch.testing.assert_close(rewards_of(batch, sums), 0.3 * batch.logratios)
    torch.testing.assert_close(rewards_of(batch, means), 0.3 * batch.logratios / batch.lengths)
    torch.testing.assert_close(rewards_of(batch, ipo), rewards_of(batch, means))
    summed = ipo.model_copy(update={"ipo_length_average": False})
    torch.testing.assert_close(rewards_of(batch, summed), rewards_of(batch, sums))


PAIRED = list(itertools.combinations(["sigmoid", "sft", "simpo", "sigmoid_norm", "apo_zero"], 2))


@pytest.mark.parametrize("names", PAIRED)
def test_what_a_sum_of_losses_reports_does_not_depend_on_their_order(names: tuple[str, str]) -> None:
    terms = [{"name": name, "weight": 1.0 + k} for k, name in enumerate(names)]
    found = []
    for ordered in (terms, terms[::-1]):
        settings = DPOHyperparameters.model_validate({"loss": ordered, "beta": 0.4}).resolved(full=False)
        averages, batch = Averages(), batch_of(settings)
        report(batch, losses_of(batch, settings), settings, averages)
        found.append(averages.means())
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        assert found[1][name] == pytest.approx(value), name


def test_log_probs_are_the_models_own_where_the_loss_counts_tails_less(llama: Path) -> None:
    """LD-DPO: the loss sees a weighted sum; what is reported and kept of the validation is log π."""
    method = make_method(llama, Rows.of(PAIRS), loss="sigmoid", ld_alpha=0.3)
    method.validation, method.references = method.train, References(NOBODY, cast(References, method.references).train)
    averages = Averages()
    found = {number: (ours, theirs) for number, ours, theirs in method.validate(averages, lambda: None)}
    base = load(llama)
    base.model.double()
    with torch.no_grad():
        ours = [plain_logps(method.policy, row) for row in method.train]
        theirs = [plain_logps(base, row) for row in method.train]
    for number, (mine, reference_logps) in found.items():
        torch.testing.assert_close(mine, ours[number], rtol=1e-6, atol=0)
        torch.testing.assert_close(reference_logps, theirs[number], rtol=1e-6, atol=0)
    means = averages.means()
    assert means["logps/chosen"] == pytest.approx(torch.stack(ours)[:, 0].mean().item(), rel=1e-6)
    ratios = torch.stack(ours) - torch.stack(theirs)
    assert means["logratios/rejected"] == pytest.approx(ratios[:, 1].mean().item(), rel=1e-6)
    assert means["rewards/chosen"] != pytest.approx(0.1 * ratios[:, 0].mean().item(), rel=1e-3)
