"""Sharing prompts and packing rows must change nothing but the time it takes."""

import io
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.trainer.work import ROWS, disturb, gradients, load, make_row, of_kind, parse, plain_logps
from worker.trainer.attention import tree_mask
from worker.trainer.data import Row
from worker.trainer.events import Events, UserError
from worker.trainer.model import Policy
from worker.trainer.packing import padded_pack, plan, tree_pack

RAW = [make_row(1, 0, 9), make_row(2, 0, 5), make_row(3, 4, 3)]


@pytest.fixture(params=["llama", "qwen3"])
def policy(request: pytest.FixtureRequest) -> Policy:
    return disturb(load(request.getfixturevalue(request.param)))


@pytest.mark.parametrize("rows", [ROWS, RAW], ids=["pairs", "without prompts"])
@pytest.mark.parametrize("shared", [True, False], ids=["tree", "padded"])
def test_packed_log_probs_and_gradients_are_those_of_one_text_at_a_time(
    policy: Policy, rows: list[Row], shared: bool
) -> None:
    policy.model.double()
    assert policy.shared
    numbers = [2, 0, 1]
    pack = (tree_pack if shared else padded_pack)(rows, numbers)
    policy.shared = shared
    found = policy.score(pack).responses
    expected = torch.cat([plain_logps(policy, rows[number]) for number in numbers])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)

    # Each response counts differently, so that none can stand in for another.
    weights = torch.arange(1, len(found) + 1, dtype=found.dtype)
    found_gradients = gradients(policy, (found * weights).sum())
    expected_gradients = gradients(policy, (expected * weights).sum())
    assert len(found_gradients) == 28  # A and B of seven projections in two layers
    for name, gradient in expected_gradients.items():
        assert gradient.any()
        tolerance = 1e-5 * gradient.abs().max().item()
        torch.testing.assert_close(found_gradients[name], gradient, rtol=0, atol=tolerance, msg=name)


def test_single_precision_stays_within_the_tolerance_of_the_contract(policy: Policy) -> None:
    found = policy.score(tree_pack(ROWS, [0, 1, 2])).responses
    expected = torch.cat([plain_logps(policy, row) for row in ROWS])
    assert bool(((found - expected).abs() <= 1e-5 * expected.abs().clamp(min=1)).all())


def test_a_row_scores_the_same_whatever_it_is_packed_with(policy: Policy) -> None:
    policy.model.double()
    alone = policy.score(tree_pack(ROWS, [1])).responses
    together = policy.score(tree_pack(ROWS, [0, 2, 1])).responses
    torch.testing.assert_close(together[-2:], alone, rtol=1e-6, atol=0)


def test_a_sliding_window_is_not_shared_and_is_respected(mistral: Path) -> None:
    stream = io.StringIO()
    policy = disturb(load(mistral, stream=stream))
    assert not policy.shared
    (message,) = of_kind(parse(stream), "message")
    assert message["level"] == "warn"
    assert "sliding-window" in message["message"]

    (pack,) = policy.packs(ROWS, [0, 1, 2])
    found = policy.score(pack).responses
    expected = torch.cat([plain_logps(policy, ROWS[number]) for number in pack.rows])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)

    # The window matters for these rows: without it the log-probs are others.
    policy.shared = True
    windowless = policy.score(tree_pack(ROWS, pack.rows)).responses
    assert bool(((windowless - expected).abs() > 1e-3 * expected.abs()).any())


def test_the_check_before_training_falls_back_where_a_tree_is_off(mistral: Path) -> None:
    policy = disturb(load(mistral))
    policy.shared = True
    stream = io.StringIO()
    policy.check(ROWS, Events(stream))
    assert not policy.shared
    (message,) = of_kind(parse(stream), "message")
    assert message["level"] == "warn"


def test_the_check_before_training_keeps_a_tree_that_is_right(policy: Policy) -> None:
    stream = io.StringIO()
    policy.check(ROWS, Events(stream))
    assert policy.shared
    assert parse(stream) == []


def test_the_check_before_training_refuses_a_head_that_is_not_linear(llama: Path) -> None:
    policy = load(llama)
    policy.causal.lm_head.register_forward_hook(lambda module, args, logits: logits.tanh())
    with pytest.raises(UserError) as caught:
        policy.check(ROWS, Events(io.StringIO()))
    assert caught.value.code == "unsupported_model"


sizes = st.tuples(st.integers(0, 8), st.lists(st.integers(1, 8), min_size=1, max_size=3))


def rows_of(sizes: list[tuple[int, list[int]]]) -> list[Row]:
    return [make_row(line, prompt, *responses) for line, (prompt, responses) in enumerate(sizes, 1)]


@given(st.lists(sizes, max_size=12), st.integers(1, 40), st.data())
@settings(deadline=None, max_examples=100)
def test_plan_puts_every_row_in_one_pack_and_keeps_to_the_budget(
    sizes: list[tuple[int, list[int]]], budget: int, data: st.DataObject
) -> None:
    rows = rows_of(sizes)
    numbers = data.draw(st.lists(st.sampled_from(range(len(rows))), unique=True) if rows else st.just([]))
    packs = plan(rows, numbers, budget)
    assert sorted(number for pack in packs for number in pack) == sorted(numbers)
    for pack in packs:
        used = sum(len(rows[n].prompt) + sum(len(r.ids) for r in rows[n].responses) for n in pack)
        assert used <= budget or len(pack) == 1
    assert packs == plan(rows, list(reversed(numbers)), budget)


@given(st.lists(sizes, min_size=1, max_size=4))
@settings(deadline=None, max_examples=40)
def test_what_predicts_a_token_sees_the_text_before_it_and_nothing_else(sizes: list[tuple[int, list[int]]]) -> None:
    rows = rows_of(sizes)
    pack = tree_pack(rows, list(range(len(rows))))
    seen = tree_mask(pack)[0, 0]
    found: list[tuple[list[int], int]] = []
    for predictor, target in zip(pack.predictors.tolist(), pack.targets.tolist(), strict=True):
        visible = seen[predictor].nonzero().flatten()
        assert pack.positions[0, visible].tolist() == list(range(len(visible)))
        found.append((pack.ids[0, visible].tolist(), target))
    expected = [
        (list(row.prompt + response.ids[:j]), response.ids[j])
        for row in rows
        for response in row.responses
        for j, scored in enumerate(response.scored)
        if scored and len(row.prompt) + j > 0  # nothing comes before the first token of all
    ]
    assert found == expected
