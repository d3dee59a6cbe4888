"""Decoding with a cache of shared prompts gives the logits of the model's own pass over each whole text."""

import gc
import io
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from tests.helpers.families import FAMILIES, make_policy
from tests.helpers.hardware import choose_as_on_a_gpu
from tests.helpers.trainer import disturb, load, of_kind, parse
from tests.helpers.versions import CAPPED, needs_transformers
from worker.trainer import decoding
from worker.trainer.decoding import CopiedPrompts, SharedPrompts
from worker.trainer.events import Events
from worker.trainer.model import Policy
from worker.trainer.ranks import Ranks

PROMPTS = [
    (5, 9, 13, 22, 41, 6, 30, 8, 11),
    (7, 8),
    (5, 9, 13, 22, 41, 6, 30, 8, 11),
    (12, 3, 4, 4, 20),
    (7, 8),
    (7, 8),
]
"""The prompts of six completions. Two of them have several, which are not side by side."""
STEPS = 11


@pytest.fixture(autouse=True)
def small_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache of answers has to grow several times."""
    monkeypatch.setattr(decoding, "ANSWER_TOKENS", 4)


def traced(compute: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """`compute` as a list of operators on the tensors that it used, as a GPU records its kernels.

    All numbers and choices of Python are those of the first call. A GPU does not compute while it records.
    """
    decoder: SharedPrompts = compute.__self__  # type: ignore[attr-defined]
    index = decoder._place.index.clone()
    graph = make_fx(lambda _: compute())(torch.zeros(()))
    decoder._place.index.copy_(index)
    return lambda: graph(torch.zeros(()))


OPT = needs_transformers("5.23", "OPT's positions are numbers of the CPU")
MARKS = {("gemma2", None): [CAPPED], ("gemma2", traced): [CAPPED], ("opt", traced): [OPT]}
CASES = [
    pytest.param(family, record, marks=MARKS.get((family, record), []), id=f"{family}-{name}")
    for family in FAMILIES
    for name, record in (("computed", None), ("recorded", traced))
]


@pytest.mark.parametrize(("family", "record"), CASES)
@torch.no_grad()
def test_the_logits_are_those_of_the_models_own_pass(
    family: str, record: Callable[..., Any] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy(family, FAMILIES[family], io.StringIO())
    if record is not None:
        monkeypatch.setattr(decoding, "recorded", record)
    generator = torch.Generator().manual_seed(3)
    answers = torch.randint(2, 300, (len(PROMPTS), STEPS), generator=generator)  # of each completion
    decoder = decoding.begin(policy, PROMPTS)
    assert isinstance(decoder, SharedPrompts)
    for step in range(STEPS + 1):
        with policy.own_attention_in_use():
            for slot, number in enumerate(decoder.active):
                if number >= 0:
                    text = torch.tensor([*PROMPTS[number], *answers[number, :step].tolist()])
                    own = policy.logits(text)[-1]
                    torch.testing.assert_close(decoder.logits[slot], own, rtol=0, atol=1e-6 * float(own.abs().max()))
        if step in (3, 7):  # two completions end, and then a whole prompt
            ended = {3: (0, 1), 7: (3,)}[step]
            kept = decoder.keep(
                [slot for slot, number in enumerate(decoder.active) if number >= 0 and number not in ended]
            )
            assert len(kept) == len(decoder.active)
        if step < STEPS:
            decoder.step(answers[torch.tensor(decoder.active).clamp(min=0), step])
    assert sorted(number for number in decoder.active if number >= 0) == [2, 4, 5]


@pytest.fixture
def policy(llama: Any) -> Policy:
    return disturb(load(llama))


def test_a_prompt_is_kept_once(policy: Policy) -> None:
    decoder = decoding.begin(policy, [PROMPTS[0]] * 5)
    assert isinstance(decoder, SharedPrompts)
    decoder.step(torch.tensor([3, 4, 5, 6, 7]))
    for layer in decoder._layers:
        assert layer.prompt_keys.shape[0] == 1 and layer.keys.shape[0] == 5


def hide_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let shared prompts be without their second token."""
    hidden_keys = SharedPrompts._hidden_keys

    def without_the_second_token(decoder: SharedPrompts, window: int | None) -> Tensor:
        hidden = hidden_keys(decoder, window).clone()
        hidden[..., 1] = True
        return hidden

    monkeypatch.setattr(SharedPrompts, "_hidden_keys", without_the_second_token)


def test_a_cache_that_gives_other_logits_is_not_shared(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    events = Events(stream)
    decoding.check(policy, PROMPTS, 8, events, Ranks())
    assert policy.shared and stream.getvalue() == ""

    hide_a_token(monkeypatch)
    decoding.check(policy, PROMPTS, 8, events, Ranks())
    (message,) = of_kind(parse(stream), "message")
    assert message["level"] == "warn" and "error" in message["message"]
    assert not policy.shared and isinstance(decoding.begin(policy, PROMPTS), CopiedPrompts)


def test_a_model_whose_layers_do_not_decode_this_way_copies_its_prompts(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(SharedPrompts, "attend", lambda *_, **__: 1 / 0)
    decoding.check(policy, PROMPTS, 8, Events(stream), Ranks())
    assert not policy.shared and "division by zero" in stream.getvalue()


def test_the_check_tells_rounding_to_sixteen_bits_from_errors(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    choose_as_on_a_gpu(monkeypatch)
    stream = io.StringIO()
    policy = disturb(load(llama))
    decoding.check(policy, PROMPTS, 8, Events(stream), Ranks())
    assert policy.shared, stream.getvalue()
    hide_a_token(monkeypatch)
    decoding.check(policy, PROMPTS, 8, Events(stream), Ranks())
    assert not policy.shared


def test_completions_may_end_before_the_first_step(policy: Policy) -> None:
    decoder = decoding.begin(policy, PROMPTS)
    decoder.keep([decoder.active.index(0)])
    decoder.step(torch.tensor([7] * len(decoder.active)))
    with policy.own_attention_in_use():
        own = policy.logits(torch.tensor([*PROMPTS[0], 7]))[-1]
    torch.testing.assert_close(decoder.logits[decoder.active.index(0)], own, rtol=0, atol=1e-4)


def test_the_memory_of_a_decoder_is_free_once_nobody_uses_it(policy: Policy) -> None:
    gc.collect()
    gc.disable()
    try:
        decoder = decoding.begin(policy, PROMPTS)
        for _ in range(3):
            decoder.step(torch.zeros(len(decoder.active), dtype=torch.long))
        gone = weakref.ref(decoder)
        del decoder
        assert gone() is None
    finally:
        gc.enable()


def test_a_layer_that_changes_the_keys_of_its_cache_copies_its_prompts(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in DeepSeek's models."""
    stream = io.StringIO()
    attend = SharedPrompts.attend
    monkeypatch.setattr(
        SharedPrompts, "attend", lambda self, query, key, *rest, **more: attend(self, query, key + 0, *rest, **more)
    )
    decoding.check(policy, PROMPTS, 8, Events(stream), Ranks())
    assert not policy.shared and "other keys" in stream.getvalue()


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any))
def test_a_table_has_every_completion_once_and_few_empty_places(sizes: Sequence[int]) -> None:
    groups = [[100 * number + k for k in range(size)] for number, size in enumerate(sizes)]
    rows, places = decoding._arrange(groups)
    assert sorted(place for place in places if place >= 0) == sorted(number for group in groups for number in group)
    width = len(places) // len(rows)
    for row, group in enumerate(rows):
        assert {place // 100 for place in places[row * width : (row + 1) * width] if place >= 0} == {group}
    assert len(places) < 2 * sum(sizes)
