"""Sampled completions follow the requested distribution, and are the same in any batch."""

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


def make_requests(samples: int) -> list[CompletionRequest]:
    return [CompletionRequest(row, number, prompt) for row, prompt in enumerate(PROMPTS) for number in range(samples)]


def sample_all(
    policy: Policy,
    requests: list[CompletionRequest],
    sampling: Sampling,
    tokens: int = 4096,
    ends: Sequence[int] = (END,),
) -> dict[tuple[int, int], Completion]:
    completions = [
        completion
        for batch in batches(requests, tokens, sampling.max_tokens, 1000)
        for completion in sample(policy, batch, sampling, ends)
    ]
    assert len(completions) == len(requests)
    return {(completion.row, completion.sample): completion for completion in completions}


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_completions_do_not_depend_on_their_batch(policy: Policy, temperature: float) -> None:
    sampling = Sampling(temperature, 0.95, 24, seed=3)
    together = sample_all(policy, make_requests(3), sampling)
    alone = sample_all(policy, list(reversed(make_requests(3))), sampling, tokens=1)
    assert {key: completion.ids for key, completion in alone.items()} == {
        key: completion.ids for key, completion in together.items()
    }
    for key, completion in alone.items():
        assert completion.logp == pytest.approx(together[key].logp, abs=1e-4)
    if temperature:
        assert len({completion.ids for completion in together.values()}) == len(together), (
            "each completion has random numbers of its own"
        )


def test_greedy_completions_equal_those_of_transformers(policy: Policy) -> None:
    completions = sample_all(policy, make_requests(1), Sampling(0.0, max_tokens=20))
    with policy.own_attention_in_use():
        for row, prompt in enumerate(PROMPTS):
            ids = torch.tensor([prompt])
            expected = policy.causal.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20, eos_token_id=END,
                pad_token_id=END,
            )  # fmt: skip
            assert list(completions[row, 0].ids) == expected[0, len(prompt) :].tolist()


def test_the_log_prob_of_a_completion_is_the_policys_own(policy: Policy) -> None:
    for completion in sample_all(policy, make_requests(2), Sampling(1.0, max_tokens=16, seed=5)).values():
        row = Row(1, PROMPTS[completion.row], (Response(completion.ids, (True,) * len(completion.ids)),))
        (pack,) = policy.packs([row], [0])
        with torch.no_grad():
            assert completion.logp == pytest.approx(float(policy.score(pack).responses), rel=1e-5)


def test_a_completion_ends_with_its_first_end_token(policy: Policy) -> None:
    plain = sample_all(policy, make_requests(6), Sampling(1.0, max_tokens=12, seed=2))
    longest = max(plain.values(), key=lambda completion: len(set(completion.ids)))
    end = longest.ids[5]
    ended = sample_all(policy, make_requests(6), Sampling(1.0, max_tokens=12, seed=2), ends=[END, end])
    for key, completion in plain.items():
        length = completion.ids.index(end) + 1 if end in completion.ids else len(completion.ids)
        assert ended[key].ids == completion.ids[:length] and ended[key].ended == (
            end in completion.ids or completion.ended
        )


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.7), (2.0, 0.9)])
def test_tokens_are_drawn_with_their_probabilities(temperature: float, top_p: float) -> None:
    logits = torch.tensor([1.2, -0.3, 2.0, 0.1, -4.0, 1.9])
    expected = logits / temperature
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(torch.zeros(1, 1), expected[None])[0]
    probabilities = expected.double().softmax(-1)
    count = 20_000
    uniform = torch.tensor(random_stream(7, 1, 2, count))
    tokens, logps = draw(logits.expand(count, -1), uniform, Sampling(temperature, top_p))
    assert torch.allclose(logps, probabilities[tokens].log())
    counts, possible = Counter(tokens.tolist()), [k for k in range(6) if probabilities[k] > 0]
    assert set(counts) <= set(possible)
    assert chisquare([counts[k] for k in possible], (probabilities[possible] * count).numpy()).pvalue > 0.001


def test_random_streams_are_uniform_and_uncorrelated() -> None:
    streams = [random_stream(1, row, number, 500) for row in range(20) for number in range(5)]
    assert kstest(numpy.concatenate(streams), "uniform").pvalue > 0.001
    correlations = numpy.atleast_2d(numpy.corrcoef(streams))[numpy.triu_indices(len(streams), 1)]
    assert abs(correlations).max() < 0.25 and abs(correlations.mean()) < 0.01
    assert not numpy.array_equal(random_stream(1, 2, 3, 9), random_stream(2, 2, 3, 9))
