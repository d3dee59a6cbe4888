"""Log-probs of tokens, computed in chunks, compared with log_softmax over all logits."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.hardware import choose
from worker.trainer.logps import Head, score_tokens

POSITIONS, HIDDEN, VOCABULARY = 7, 5, 11


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three positions at a time: two full chunks and a part of one."""
    choose(monkeypatch, head_logits=3 * VOCABULARY)


def token_logps(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor]:
    scores = score_tokens(hidden, Head(weight, bias), targets)
    return scores.logps, scores.correct


def make_inputs(dtype: torch.dtype = torch.float64, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(hidden, weight, bias, targets)"""
    generator = torch.Generator().manual_seed(0)
    hidden = scale * torch.randn(POSITIONS, HIDDEN, generator=generator, dtype=torch.float64)
    weight = scale * torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=torch.float64)
    bias = torch.randn(VOCABULARY, generator=generator, dtype=torch.float64)
    targets = torch.randint(VOCABULARY, (POSITIONS,), generator=generator)
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype), targets


def expected_logps(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    logits = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    return torch.log_softmax(logits, dim=-1)[torch.arange(len(targets)), targets]


@pytest.mark.parametrize("with_bias", [True, False])
def test_values_and_gradients_equal_those_of_log_softmax(with_bias: bool) -> None:
    hidden, weight, bias, targets = make_inputs()
    inputs = [hidden, weight, bias] if with_bias else [hidden, weight]
    for tensor in inputs:
        tensor.requires_grad_()
    head_bias = bias if with_bias else None
    coefficients = torch.linspace(-1, 2, POSITIONS, dtype=torch.float64)

    actual, _ = token_logps(hidden, weight, head_bias, targets)
    expected = expected_logps(hidden, weight, head_bias, targets)

    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad((actual * coefficients).sum(), inputs),
        torch.autograd.grad((expected * coefficients).sum(), inputs),
        rtol=1e-12,
        atol=1e-12,
    )


@pytest.mark.parametrize(("scale", "softcap"), [(0.0625, None), (1.0, 2.0), (3.0, 5.0)])
def test_a_head_can_scale_and_cap_its_logits(scale: float, softcap: float | None) -> None:
    hidden, weight, bias, targets = make_inputs()
    inputs = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]
    coefficients = torch.linspace(-1, 2, POSITIONS, dtype=torch.float64)
    actual = score_tokens(hidden, Head(weight, bias, scale, softcap), targets).logps
    logits = scale * (hidden @ weight.T + bias)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    expected = logits.log_softmax(-1)[torch.arange(POSITIONS), targets]
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad((actual * coefficients).sum(), inputs),
        torch.autograd.grad((expected * coefficients).sum(), inputs),
        rtol=1e-11,
        atol=1e-12,
    )


def test_entropy_and_alignment_equal_those_of_the_distribution() -> None:
    hidden, weight, bias, targets = make_inputs()
    scores = score_tokens(hidden.requires_grad_(), Head(weight, bias), targets, entropy=True, alignment=True)
    logps = (hidden @ weight.T + bias).log_softmax(-1)
    torch.testing.assert_close(scores.entropy, -(logps.exp() * logps).sum(-1), rtol=1e-12, atol=1e-12)
    expected = scores.logps - logps.exp().square().sum(-1).log()
    torch.testing.assert_close(scores.alignment, expected, rtol=1e-12, atol=1e-12)


def test_entropy_and_alignment_are_absent_unless_requested() -> None:
    hidden, weight, bias, targets = make_inputs()
    scores = score_tokens(hidden, Head(weight, bias), targets)
    assert scores.entropy is None
    assert scores.alignment is None


def test_gradients_equal_finite_differences() -> None:
    hidden, weight, bias, targets = make_inputs()

    def score(states: Tensor, head_weight: Tensor, head_bias: Tensor) -> Tensor:
        return token_logps(states, head_weight, head_bias, targets)[0]

    inputs = (hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_())
    assert torch.autograd.gradcheck(score, inputs)


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, weight, bias, targets = make_inputs()
    hidden.requires_grad_()
    token_logps(hidden, weight, bias, targets)[0].sum().backward()  # type: ignore[no-untyped-call]
    assert hidden.grad is not None
    assert weight.grad is None
    assert bias.grad is None


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_single_precision_is_close_to_double_precision(scale: float) -> None:
    hidden, weight, bias, targets = make_inputs(torch.float32, scale)
    expected = expected_logps(hidden.double(), weight.double(), bias.double(), targets)
    actual, _ = token_logps(hidden, weight, bias, targets)
    assert actual.dtype == torch.float32
    assert bool(((actual.double() - expected).abs() <= 1e-5 * expected.abs().clamp(min=1)).all())


def test_log_probs_stay_finite_for_logits_beyond_the_range_of_exp() -> None:
    hidden = torch.tensor([[1000.0], [1000.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [0.0], [-1.0]])
    actual, _ = token_logps(hidden, weight, None, torch.tensor([0, 2]))
    actual.sum().backward()  # type: ignore[no-untyped-call]
    assert actual.tolist() == [0.0, -2000.0]
    assert hidden.grad is not None
    assert hidden.grad.flatten().tolist() == [0.0, -2.0]


def test_half_precision_is_summed_in_single_precision() -> None:
    hidden, weight, bias, targets = make_inputs(torch.bfloat16)
    actual, _ = token_logps(hidden, weight, bias, targets)
    expected = torch.nn.functional.linear(hidden, weight, bias).float().log_softmax(-1)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected[torch.arange(POSITIONS), targets], rtol=1e-6, atol=1e-6)


def test_correct_says_whether_the_target_is_the_most_likely_token() -> None:
    hidden, weight, bias, _ = make_inputs()
    best = (hidden @ weight.T + bias).argmax(-1)
    mixed = torch.where(torch.arange(POSITIONS) % 2 == 0, best, (best + 1) % VOCABULARY)
    _, correct = token_logps(hidden, weight, bias, mixed)
    assert correct.tolist() == [True, False, True, False, True, False, True]


def test_an_empty_input_gives_an_empty_result_and_a_zero_gradient() -> None:
    hidden, weight, bias, _ = make_inputs()
    hidden.requires_grad_()
    actual, correct = token_logps(hidden[:0], weight, bias, torch.zeros(0, dtype=torch.long))
    actual.sum().backward()  # type: ignore[no-untyped-call]
    assert actual.shape == correct.shape == (0,)
    assert hidden.grad is not None
    assert not hidden.grad.any()


class LargestTensor(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the size of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.numel())
        return result


def test_no_more_than_a_chunk_of_logits_ever_exists() -> None:
    positions = 400
    hidden = torch.randn(positions, 2, requires_grad=True)
    weight = torch.randn(VOCABULARY, 2, requires_grad=True)
    targets = torch.zeros(positions, dtype=torch.long)
    with LargestTensor() as largest:  # type: ignore[no-untyped-call]
        token_logps(hidden, weight, None, targets)[0].sum().backward()  # type: ignore[no-untyped-call]
    # The hidden states are the largest. Nothing has the size of all logits.
    assert largest.elements == hidden.numel() < positions * VOCABULARY
