"""Sampled completions: from the distribution that is asked for, and the same in any batch."""

from collections import Counter
from collections.abc import Sequence

import numpy
import pytest
import torch
from scipy.stats import chisquare, kstest
from transformers import TopPLogitsWarper

from tests.helpers.trainer import disturb, load
from worker.trainer.data import Response, Row
from worker.trainer.model import Policy
from worker.trainer.sampling import Completion, CompletionRequest, Sampling, batches, draw, random_stream, sample

PROMPTS = [(5, 9, 13), (7, 8, 30, 44, 61, 3, 9), (12,), (5, 9, 13, 77, 90)]
END = 1


@pytest.fixture(params=["llama", "mistral"])
def policy(request: pytest.FixtureRequest) -> Policy:
    """Mistral has a sliding window, shorter than some of the texts."""
    return disturb(load(request.getfixturevalue(request.param)))


def wanted(samples: int) -> list[CompletionRequest]:
    return [CompletionRequest(row, number, prompt) for row, prompt in enumerate(PROMPTS) for number in range(samples)]


def made(
    policy: Policy, asked: list[CompletionRequest], sampling: Sampling, tokens: int = 4096, ends: Sequence[int] = (END,)
) -> dict[tuple[int, int], Completion]:
    found = [
        one
        for batch in batches(asked, tokens, sampling.max_tokens, 1000)
        for one in sample(policy, batch, sampling, ends)
    ]
    assert len(found) == len(asked)
    return {(one.row, one.sample): one for one in found}


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_batch_changes_nothing(policy: Policy, temperature: float) -> None:
    sampling = Sampling(temperature, 0.95, 24, seed=3)
    together = made(policy, wanted(3), sampling)
    alone = made(policy, list(reversed(wanted(3))), sampling, tokens=1)
    assert {key: one.ids for key, one in alone.items()} == {key: one.ids for key, one in together.items()}
    for key, one in alone.items():
        assert one.logp == pytest.approx(together[key].logp, abs=1e-4)
    if temperature:
        assert len({one.ids for one in together.values()}) == len(together), "each has random numbers of its own"


def test_the_likeliest_tokens_are_those_of_transformers(policy: Policy) -> None:
    found = made(policy, wanted(1), Sampling(0.0, max_tokens=20))
    with policy.own_attention_in_use():
        for row, prompt in enumerate(PROMPTS):
            ids = torch.tensor([prompt])
            expected = policy.causal.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20, eos_token_id=END,
                pad_token_id=END,
            )  # fmt: skip
            assert list(found[row, 0].ids) == expected[0, len(prompt) :].tolist()


def test_the_log_probability_is_the_policys_own(policy: Policy) -> None:
    for one in made(policy, wanted(2), Sampling(1.0, max_tokens=16, seed=5)).values():
        row = Row(1, PROMPTS[one.row], (Response(one.ids, (True,) * len(one.ids)),))
        (pack,) = policy.packs([row], [0])
        with torch.no_grad():
            assert one.logp == pytest.approx(float(policy.score(pack).responses), rel=1e-5)


def test_an_answer_ends_where_the_model_ends_it(policy: Policy) -> None:
    plain = made(policy, wanted(6), Sampling(1.0, max_tokens=12, seed=2))
    longest = max(plain.values(), key=lambda one: len(set(one.ids)))
    end = longest.ids[5]
    found = made(policy, wanted(6), Sampling(1.0, max_tokens=12, seed=2), ends=[END, end])
    for key, one in plain.items():
        at = one.ids.index(end) + 1 if end in one.ids else len(one.ids)
        assert found[key].ids == one.ids[:at] and found[key].ended == (end in one.ids or one.ended)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.7), (2.0, 0.9)])
def test_tokens_come_as_often_as_they_should(temperature: float, top_p: float) -> None:
    logits = torch.tensor([1.2, -0.3, 2.0, 0.1, -4.0, 1.9])
    expected = logits / temperature
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(torch.zeros(1, 1), expected[None])[0]
    probabilities = expected.double().softmax(-1)
    count = 20_000
    uniform = torch.tensor(random_stream(7, 1, 2, count))
    tokens, logps = draw(logits.expand(count, -1), uniform, Sampling(temperature, top_p))
    assert torch.allclose(logps, probabilities[tokens].log())
    seen, possible = Counter(tokens.tolist()), [k for k in range(6) if probabilities[k] > 0]
    assert set(seen) <= set(possible)
    assert chisquare([seen[k] for k in possible], (probabilities[possible] * count).numpy()).pvalue > 0.001


def test_streams_are_uniform_and_their_own() -> None:
    streams = [random_stream(1, row, number, 500) for row in range(20) for number in range(5)]
    assert kstest(numpy.concatenate(streams), "uniform").pvalue > 0.001
    correlations = numpy.atleast_2d(numpy.corrcoef(streams))[numpy.triu_indices(len(streams), 1)]
    assert abs(correlations).max() < 0.25 and abs(correlations.mean()) < 0.01
    assert not numpy.array_equal(random_stream(1, 2, 3, 9), random_stream(2, 2, 3, 9))
