"""Sharing prompts and packing rows change only the time that a step takes."""

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from tests.helpers.trainer import ROWS, disturb, gradients, load, make_row, of_kind, pack_of, parse, plain_logps
from worker.trainer.data import Response, Row
from worker.trainer.errors import UserError
from worker.trainer.events import Events
from worker.trainer.exactness import check
from worker.trainer.logps import Head, score_logits, score_tokens
from worker.trainer.masks import BLOCK_TOKENS, TreeMask
from worker.trainer.model import Policy
from worker.trainer.packing import Packing, Segment, plan, tree_pack, trees

RAW = [make_row(1, 0, 9), make_row(2, 0, 5), make_row(3, 4, 3)]
RANKED = [make_row(1, 12, 5, 9, 3, 2), make_row(2, 3, 7), make_row(3, 20, 4, 6, 1)]
COMMON = [
    ROWS[0],
    replace(ROWS[0], responses=(ROWS[0].responses[1], ROWS[1].responses[0])),
    ROWS[2],
    replace(ROWS[0], responses=ROWS[0].responses[::-1]),
]
"""Three pairs of one prompt, with three different answers among them, and a pair of another prompt."""


@pytest.fixture(params=["llama", "qwen3", "mistral"])
def policy(request: pytest.FixtureRequest) -> Policy:
    return disturb(load(request.getfixturevalue(request.param)))


@pytest.mark.parametrize(
    "rows", [ROWS, RAW, RANKED, COMMON], ids=["pairs", "without prompts", "ranked lists", "one prompt"]
)
@pytest.mark.parametrize("shared", [True, False], ids=["tree", "padded"])
def test_packed_log_probs_and_gradients_equal_those_of_one_text_at_a_time(
    policy: Policy, rows: list[Row], shared: bool
) -> None:
    policy.model.double()
    assert policy.shared
    policy.shared = shared
    pack = pack_of(policy, rows, [2, 0, 1, 3][: len(rows)])
    packed = policy.score(pack).responses
    expected = torch.cat([plain_logps(policy, rows[number]) for number in pack.rows])
    torch.testing.assert_close(packed, expected, rtol=1e-6, atol=0)

    # Each response counts differently, so that none can stand in for another.
    weights = torch.arange(1, len(packed) + 1, dtype=packed.dtype)
    packed_gradients = gradients(policy, (packed * weights).sum())
    expected_gradients = gradients(policy, (expected * weights).sum())
    assert len(packed_gradients) == 28  # A and B of seven projections in two layers
    for name, gradient in expected_gradients.items():
        assert gradient.any()
        tolerance = 1e-5 * gradient.abs().max().item()
        torch.testing.assert_close(packed_gradients[name], gradient, rtol=0, atol=tolerance, msg=name)


def test_packed_log_probs_in_single_precision_are_within_1e_5(policy: Policy) -> None:
    pack = pack_of(policy, ROWS, [0, 1, 2])
    packed = policy.score(pack).responses
    expected = torch.cat([plain_logps(policy, ROWS[number]) for number in pack.rows])
    assert bool(((packed - expected).abs() <= 1e-5 * expected.abs().clamp(min=1)).all())


def test_a_row_scores_the_same_in_any_pack(policy: Policy) -> None:
    policy.model.double()
    alone = policy.score(pack_of(policy, ROWS, [1])).responses
    together = pack_of(policy, ROWS, [0, 2, 1])
    in_row = together.row_of == together.rows.index(1)
    torch.testing.assert_close(policy.score(together).responses[in_row], alone, rtol=1e-6, atol=0)


def test_rows_of_one_prompt_share_it_and_the_responses_that_they_have_in_common(policy: Policy) -> None:
    pack, apart = pack_of(policy, COMMON, [0, 1, 2, 3]), pack_of(policy, COMMON, [0, 1, 2, 3], merge=False)
    distinct = (ROWS[0].responses[0], ROWS[0].responses[1], ROWS[1].responses[0])
    assert pack.tokens == len(ROWS[0].prompt) + sum(len(response.ids) for response in distinct) + ROWS[2].tokens
    assert len(pack.lengths) == 3 + 2
    assert apart.tokens == sum(row.tokens for row in COMMON)
    merged, unmerged = policy.score(pack).responses, policy.score(apart).responses
    by_row = {number: merged[pack.row_of == index] for index, number in enumerate(pack.rows)}
    by_row_apart = {number: unmerged[apart.row_of == index] for index, number in enumerate(apart.rows)}
    for number in range(4):
        torch.testing.assert_close(by_row[number], by_row_apart[number], rtol=1e-5, atol=0)
    assert torch.equal(by_row[0], by_row[3].flip(0))


@pytest.mark.parametrize("tail_weight", [0.0, 0.3, 1.0])
def test_tokens_beyond_the_shorter_response_are_weighted_as_in_ld_dpo(policy: Policy, tail_weight: float) -> None:
    """LD-DPO, arXiv:2409.06411: log π of the common length, and α times log π of the rest."""
    policy.model.double()
    pack = pack_of(policy, ROWS, [0, 1, 2], merge=False)
    actual = policy.score(pack, tail_weight=tail_weight).responses
    expected = []
    for number in pack.rows:
        row = ROWS[number]
        common_length = min(sum(response.scored) for response in row.responses)
        whole = plain_logps(policy, row)
        shortened = [first_scored(response, common_length) for response in row.responses]
        head = plain_logps(policy, replace(row, responses=tuple(shortened)))
        expected.append(head + tail_weight * (whole - head))
    torch.testing.assert_close(actual, torch.cat(expected), rtol=1e-6, atol=0)


def first_scored(response: Response, count: int) -> Response:
    """The same tokens, of which only the first `count` scored ones are scored."""
    counts = [sum(response.scored[: j + 1]) for j in range(len(response.ids))]
    return replace(
        response,
        scored=tuple(scored and number <= count for scored, number in zip(response.scored, counts, strict=True)),
    )


def test_a_sliding_window_is_measured_by_position_and_changes_the_log_probs(mistral: Path) -> None:
    """The tree's mask has the window. Without it, the log-probs are others."""
    policy = disturb(load(mistral))
    window = policy.causal.config.sliding_window
    assert window < min(
        len(row.prompt) + max(len(response.ids) for response in row.responses) for row in (ROWS[0], ROWS[2])
    )
    windowed = policy.score(pack_of(policy, ROWS, [0, 1, 2])).responses
    policy.causal.config.sliding_window = None
    windowless = policy.score(pack_of(policy, ROWS, [0, 1, 2])).responses
    assert bool(((windowless - windowed).abs() > 1e-3 * windowed.abs()).any())


def test_the_check_before_training_falls_back_if_the_tree_mask_is_wrong(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_causal_mask(mask: TreeMask, window: int | None = None) -> list[tuple[int, int, None]]:
        return [(0, len(mask.positions), None)]

    monkeypatch.setattr(TreeMask, "tree_masks", one_causal_mask)
    stream = io.StringIO()
    check(policy, ROWS, Events(stream))
    assert not policy.shared
    (message,) = of_kind(parse(stream), "message")
    assert message["level"] == "warn"
    pack = pack_of(policy, ROWS, [0, 1, 2])
    expected = torch.cat([plain_logps(policy, ROWS[number]) for number in pack.rows])
    torch.testing.assert_close(policy.score(pack).responses, expected, rtol=1e-5, atol=0)


def test_the_check_before_training_keeps_a_tree_mask_that_is_right(policy: Policy) -> None:
    stream = io.StringIO()
    check(policy, ROWS, Events(stream))
    assert policy.shared
    assert parse(stream) == []


def test_a_model_whose_head_is_not_linear_computes_its_own_logits(llama: Path) -> None:
    policy, stream = disturb(load(llama)), io.StringIO()
    policy.causal.lm_head.register_forward_hook(lambda module, args, logits: logits.tanh())
    check(policy, ROWS, Events(stream))
    assert policy.own_logits
    warnings = [event["message"] for event in parse(stream)]
    assert any("needs more memory" in message for message in warnings)
    pack = pack_of(policy, ROWS, [0, 1, 2])
    expected = torch.cat([plain_logps(policy, ROWS[number]) for number in pack.rows])
    scores = policy.score(pack, entropy=True, alignment=True)
    torch.testing.assert_close(scores.responses, expected, rtol=1e-5, atol=0)
    theirs = gradients(policy, expected.sum())
    for name, gradient in gradients(policy, scores.responses.sum()).items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-4, atol=1e-6)


def test_logits_give_the_same_scores_as_hidden_states() -> None:
    """There are two ways to the same scores: from the hidden states a chunk at a time, and from all logits."""
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(7, 4), torch.randn(11, 4), torch.randint(11, (7,))
    from_logits = score_logits(hidden @ weight.T, targets, entropy=True, alignment=True)
    from_states = score_tokens(hidden, Head(weight), targets, entropy=True, alignment=True)
    for name, value in vars(from_states).items():
        torch.testing.assert_close(getattr(from_logits, name), value)


def test_the_check_before_training_refuses_a_model_that_draws_at_random(llama: Path) -> None:
    policy = load(llama)
    policy.causal.lm_head.register_forward_hook(lambda module, args, logits: logits + torch.randn_like(logits))
    with pytest.raises(UserError, match="draws at random") as caught:
        check(policy, ROWS, Events(io.StringIO()))
    assert caught.value.code == "unsupported_model"


def test_the_check_before_training_refuses_a_model_that_looks_ahead(llama: Path) -> None:
    policy = load(llama)
    policy.causal.lm_head.register_forward_pre_hook(lambda module, args: (args[0] + args[0].mean(1, keepdim=True),))
    with pytest.raises(UserError, match="not a causal model") as caught:
        check(policy, ROWS, Events(io.StringIO()))
    assert caught.value.code == "unsupported_model"


sizes = st.tuples(st.integers(0, 8), st.lists(st.integers(1, 8), min_size=1, max_size=3))


def rows_of(sizes: list[tuple[int, list[int]]]) -> list[Row]:
    """Rows of these lengths. Prompts of equal length are one prompt, and so are the responses of equal length."""
    rows = []
    for line, (prompt, responses) in enumerate(sizes, 1):
        row = make_row(prompt, prompt, *responses)
        equal_responses = [make_row(length, 0, length).responses[0] for length in responses]
        rows.append(replace(row, line=line, responses=tuple(equal_responses)))
    return rows


@given(st.lists(sizes, max_size=12), st.integers(1, 40), st.booleans(), st.data())
@settings(deadline=None, max_examples=150)
def test_every_row_is_in_one_pack_and_packs_keep_to_the_budget(
    sizes: list[tuple[int, list[int]]], budget: int, merge: bool, data: st.DataObject
) -> None:
    rows = rows_of(sizes)
    numbers = data.draw(st.lists(st.sampled_from(range(len(rows))), unique=True) if rows else st.just([]))
    planned = trees(rows, numbers, budget, merge=merge)
    for tree in planned:
        assert tree.tokens <= budget or len(tree.rows) == 1
        for number, leaves in tree.rows:
            assert rows[number].prompt == tree.prompt
            assert rows[number].responses == tuple(tree.responses[leaf] for leaf in leaves)
    packs = plan(planned, budget)
    assert sorted(number for pack in packs for tree in pack for number, _ in tree.rows) == sorted(numbers)
    for pack in packs:
        assert sum(tree.tokens for tree in pack) <= budget or len(pack) == 1
    assert packs == plan(planned[::-1], budget)


def dense(mask: TreeMask, window: int | None = None) -> Tensor:
    """[T, T], true where a query (dim 0) sees a key (dim 1): the masks of the trees, put together."""
    length = len(mask.positions)
    visible = torch.zeros(length, length, dtype=torch.bool)
    for start, stop, tree_mask in mask.tree_masks(window):
        causal = torch.ones(stop - start, stop - start, dtype=torch.bool).tril()
        visible[start:stop, start:stop] = causal if tree_mask is None else tree_mask[0, 0]
    return visible


@given(st.lists(sizes, max_size=12), st.integers(1, 60))
@settings(deadline=None, max_examples=80)
def test_unshared_packs_keep_to_the_budget_with_their_padding(sizes: list[tuple[int, list[int]]], budget: int) -> None:
    rows = rows_of(sizes)
    packs = list(Packing(budget, shared=False, segment_tokens=budget).packs(rows, range(len(rows))))
    assert sorted(number for pack in packs for number in pack.rows) == list(range(len(rows)))
    for pack in packs:
        assert pack.slots <= budget or len(pack.rows) == 1 or len(pack.ids) == len(rows[pack.rows[0]].responses)


def visible_by_definition(segments: Sequence[Segment], length: int, window: int | None, block: int = 1) -> Tensor:
    """[length, length], true where a query (dim 0) sees a key (dim 1). Padding sees itself.

    By the definition: the same tree, the prompt or the own response, not later, and within the window. Segments begin
    at multiples of `block`.
    """
    tree, branch, position = (torch.full((length,), -1) for _ in range(3))  # branch 0 is the prompt
    slot = number = 0
    for segment in segments:
        slot += -slot % block
        for each in segment.trees:
            parts = [each.prompt, *(response.ids for response in each.responses)]
            for k, ids in enumerate(parts):
                after = slot + len(ids)
                tree[slot:after], branch[slot:after] = number, k
                position[slot:after] = torch.arange(len(ids)) + (len(each.prompt) if k else 0)
                slot = after
            number += 1
    slots = torch.arange(length)
    visible = (tree[:, None] == tree) & (tree >= 0) & ((branch == 0) | (branch[:, None] == branch))
    visible &= slots[:, None] >= slots
    if window is not None:
        visible &= position[:, None] - position < window
    return visible | torch.eye(length, dtype=torch.bool)


windows = st.none() | st.integers(1, 12)


@given(st.lists(sizes, min_size=1, max_size=4), windows)
@settings(deadline=None, max_examples=60)
def test_the_masks_of_trees_are_those_of_the_definition(sizes: list[tuple[int, list[int]]], window: int | None) -> None:
    rows = rows_of(sizes)
    group = [Segment(tuple(trees(rows, range(len(rows)), 1000)))]
    pack = tree_pack(group)
    assert torch.equal(dense(pack.mask, window), visible_by_definition(group, pack.slots, window))


@given(st.lists(st.lists(sizes, min_size=1, max_size=3), min_size=1, max_size=3), windows, st.integers(1, 300))
@settings(deadline=None, max_examples=40)
def test_the_mask_in_blocks_is_the_one_that_flex_attention_makes_of_the_definition(
    sizes: list[list[tuple[int, list[int]]]], window: int | None, scale: int
) -> None:
    """Its blocks are counted without a look at each pair. FlexAttention looks at each pair. `scale` makes long rows."""
    rows = rows_of([(prompt * scale // 8, [1 + k * scale // 8 for k in row]) for part in sizes for prompt, row in part])
    ends = list(accumulate(len(part) for part in sizes))
    groups = [range(end - len(part), end) for part, end in zip(sizes, ends, strict=True)]
    segments = [Segment(tuple(trees(rows, group, 10_000))) for group in groups]
    pack = tree_pack(segments, 256, (None, window))
    expected = visible_by_definition(segments, pack.slots, window, BLOCK_TOKENS)
    blocks = pack.mask.blocks[window]
    theirs = create_block_mask(lambda b, h, q, k: expected[q, k], None, None, pack.slots, pack.slots, "cpu")
    slots = torch.arange(pack.slots)
    assert torch.equal(blocks.block_mask.mask_mod(slots, slots, slots[:, None], slots[None, :]), expected)
    for name in ("kv", "full_kv", "q", "full_q"):
        count, indices = f"{name}_num_blocks", f"{name}_indices"
        numbers = getattr(theirs, count)
        assert torch.equal(getattr(blocks, count), numbers), name
        used = torch.arange(getattr(theirs, indices).shape[-1]) < numbers[..., None]
        assert torch.equal(getattr(blocks, indices)[used], getattr(theirs, indices)[used]), name
    assert theirs.full_kv_num_blocks is not None
    assert blocks.computed == int((theirs.kv_num_blocks + theirs.full_kv_num_blocks).sum())


@given(st.lists(sizes, min_size=1, max_size=4))
@settings(deadline=None, max_examples=60)
def test_a_token_is_predicted_from_the_text_before_it_and_nothing_else(sizes: list[tuple[int, list[int]]]) -> None:
    rows = rows_of(sizes)
    pack = tree_pack([Segment(tuple(trees(rows, range(len(rows)), 1000)))])
    mask = dense(pack.mask)
    predictions: dict[int, list[tuple[list[int], int]]] = {leaf: [] for leaf in range(len(pack.lengths))}
    scored = zip(pack.predictors.tolist(), pack.targets.tolist(), pack.leaf.tolist(), strict=True)
    for predictor, target, leaf in scored:
        visible = mask[predictor].nonzero().flatten()
        assert pack.positions[0, visible].tolist() == list(range(len(visible)))
        predictions[leaf].append((pack.ids[0, visible].tolist(), target))
    for leaf, row in zip(pack.leaves.tolist(), pack.row_of.tolist(), strict=True):
        expected = [texts_of(rows[pack.rows[row]], response) for response in rows[pack.rows[row]].responses]
        assert predictions[leaf] in expected
    flat = [predictions[leaf] for leaf in pack.leaves.tolist()]
    assert flat == [texts_of(rows[number], response) for number in pack.rows for response in rows[number].responses]


def texts_of(row: Row, response: Response) -> list[tuple[list[int], int]]:
    """(text before, token) of each scored token. The very first token has no text before it and is left out."""
    return [
        (list(row.prompt + response.ids[:j]), response.ids[j])
        for j, scored in enumerate(response.scored)
        if scored and len(row.prompt) + j > 0
    ]


@given(st.lists(sizes, min_size=1, max_size=6), st.integers(8, 40), st.integers(1, 20))
@settings(deadline=None, max_examples=25)
def test_random_rows_in_random_packs_score_as_they_do_alone(
    tiny: Policy, sizes: list[tuple[int, list[int]]], budget: int, seed: int
) -> None:
    rows = [row for row in rows_of(sizes) if row.learnable] or ROWS
    tiny.packing = Packing(budget, segment_tokens=budget)
    weights = torch.rand(sum(len(row.responses) for row in rows), generator=torch.Generator().manual_seed(seed))
    offsets = [sum(len(row.responses) for row in rows[:number]) for number in range(len(rows))]

    def of_row(number: int) -> Tensor:
        return weights[offsets[number] : offsets[number] + len(rows[number].responses)].double()

    scores_by_row, total, packs_by_row = {}, torch.zeros((), dtype=torch.float64), Counter[int]()
    for pack in tiny.packs(rows, range(len(rows))):
        scores = tiny.score(pack).responses
        for index, number in enumerate(pack.rows):
            scores_by_row[number] = scores[pack.row_of == index]
            packs_by_row[number] += 1
            total = total + (scores_by_row[number] * of_row(number)).sum()
    assert packs_by_row == Counter(range(len(rows)))
    expected = [plain_logps(tiny, row) for row in rows]
    for number, logps in enumerate(expected):
        torch.testing.assert_close(scores_by_row[number], logps, rtol=1e-6, atol=1e-9)
    weighted = torch.stack([(logps * of_row(number)).sum() for number, logps in enumerate(expected)]).sum()
    theirs = gradients(tiny, weighted)
    for name, gradient in gradients(tiny, total).items():
        tolerance = 1e-6 * max(theirs[name].abs().max().item(), 1e-6)
        torch.testing.assert_close(gradient, theirs[name], rtol=0, atol=tolerance, msg=name)


@pytest.fixture(scope="module")
def tiny(llama: Path) -> Policy:
    policy = disturb(load(llama))
    policy.model.double()
    return policy


def test_packs_for_kernels_with_blocks_have_few_widths_and_segments_that_begin_with_a_block() -> None:
    """Two rows of 450 tokens are a segment of 900, or 1,024 slots. Two of these fill the budget, one is left."""
    rows: Sequence[Row] = [make_row(line, 200, 100, 150) for line in range(5)]
    packs = list(Packing(2048, windows=(None,)).packs(rows, range(5)))
    assert [(pack.tokens, pack.slots) for pack in packs] == [(1800, 2048), (450, 1024)]
    assert [[extent.slots for extent in pack.extents] for pack in packs] == [
        [slice(0, 1024), slice(1024, 2048)], [slice(0, 512)]
    ]  # fmt: skip
    starts = [packs[0].mask.spans[number][0] for number in (0, 2)]
    assert starts == [0, 1024]
    assert packs[0].is_token[0].nonzero().flatten().tolist() == [*range(900), *range(1024, 1924)]
    assert [(pack.tokens, pack.slots) for pack in Packing(2048).packs(rows, range(5))] == [(1800, 1800), (450, 450)]
