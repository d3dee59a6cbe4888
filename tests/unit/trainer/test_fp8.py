"""FP8: the products of a frozen base in 8 bits, forward and backward, and trainings with them."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from app.estimates.memory import MemorySettings, Shape, estimate
from app.spec.job import JobSpec
from tests.helpers.hardware import choose_as_on_a_gpu
from tests.helpers.ranks import LOADING, ThreadRanks, gradient_on, on_ranks
from tests.helpers.tiny_model import make_tokenizer
from tests.helpers.trainer import (
    BASE_NAME,
    disturb,
    dpo_method,
    load,
    make_pairs,
    make_row,
    make_work_folder,
    of_kind,
    run_in_process,
    training_metrics,
)
from tests.helpers.versions import FP8_ON_A_CPU
from worker.trainer import fp8
from worker.trainer.dataset import Rows
from worker.trainer.errors import UserError
from worker.trainer.events import Events
from worker.trainer.exactness import check
from worker.trainer.fp8 import Fp8Linear, rounded
from worker.trainer.linears import is_ordinary
from worker.trainer.loading import load_policy
from worker.trainer.lora import LoraLinear
from worker.trainer.model import Base
from worker.trainer.shards import Shards

PAIRS = make_pairs(12)
STEPS = {"max_steps": 3, "batch_size": 4, "learning_rate": 3e-4}
FIELDS: dict[str, Any] = {"adapter": {"r": 4}, "seed": 0, "validation_split": 0.25, "method": dpo_method(**STEPS)}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def exact(values: Tensor, scales: Tensor) -> Tensor:
    return values.double() * scales.double()


def test_a_number_is_rounded_to_three_bits_of_mantissa() -> None:
    x = random(50, 64) * torch.logspace(-6, 6, 50)[:, None]  # rows of very different sizes
    values, scales = rounded(x)
    step = 2.0**-9 * scales.double()  # the distance of the smallest numbers
    assert ((exact(values, scales) - x).abs() <= torch.maximum(2.0**-4 * x.abs().double(), step / 2)).all()
    assert (values.float().abs().amax(1) == torch.finfo(fp8.FORMAT).max).all()


def test_a_row_of_zeros_stays_one() -> None:
    values, scales = rounded(torch.zeros(2, 16))
    assert not values.float().any() and scales.isfinite().all()


@FP8_ON_A_CPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_and_its_gradient_are_those_of_the_rounded_factors(dtype: torch.dtype) -> None:
    plain = nn.Linear(64, 48, bias=True)
    layer = Fp8Linear(plain)
    x, gradient = random(3, 7, 64).to(dtype).requires_grad_(), random(3, 7, 48, seed=1).to(dtype)
    output = layer(x)
    output.backward(gradient)
    weight = exact(layer.weight.view(fp8.FORMAT), layer.scales[:, None])
    expected = exact(*rounded(x.detach().flatten(0, 1))) @ weight.T + plain.bias.detach().double()
    scaled = gradient.flatten(0, 1).float() * layer.scales
    expected_gradient = exact(*rounded(scaled)) @ layer.weight.view(fp8.FORMAT).double()
    assert output.dtype == dtype and x.grad is not None and x.grad.dtype == dtype
    error = 1e-5 if dtype == torch.float32 else 2**-7
    for ours, theirs in ((output.detach(), expected), (x.grad, expected_gradient)):
        torch.testing.assert_close(
            ours.flatten(0, 1).double(), theirs, rtol=error, atol=error * float(theirs.abs().max())
        )


@FP8_ON_A_CPU
def test_a_row_does_not_depend_on_its_neighbours() -> None:
    layer, x = Fp8Linear(nn.Linear(64, 48)), random(32, 64)
    x[5] *= 1e4
    torch.testing.assert_close(layer(x)[:4], layer(x[:4]), rtol=0, atol=0)


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    choose_as_on_a_gpu(monkeypatch)


@FP8_ON_A_CPU
@pytest.mark.usefixtures("as_on_a_gpu")
def test_the_layers_of_the_body_have_the_bases_weights_in_8_bits_and_get_adapters(llama: Path) -> None:
    plain, policy = load(llama), load(llama, compute_dtype="fp8")
    converted = {name for name, module in policy.causal.named_modules() if isinstance(module, Fp8Linear)}
    assert {name.rpartition("base_layer")[0] for name in converted} == {
        f"{name}." for name, module in policy.causal.named_modules() if isinstance(module, LoraLinear)
    }
    assert len(converted) == 7 * policy.causal.config.num_hidden_layers
    assert all(is_ordinary(policy.causal.get_submodule(name)) for name in converted)
    assert all(policy.causal.get_submodule(name).weight.element_size() == 1 for name in converted)
    for name in converted:  # loading has drawn no new ones
        values, scales = rounded(plain.causal.get_submodule(name).weight)
        layer = policy.causal.get_submodule(name)
        assert torch.equal(layer.weight, values.view(torch.uint8)) and torch.equal(layer.scales, scales.flatten())
    assert all(parameter.dtype == torch.float32 for parameter in policy.trainable().values())
    head = policy.causal.get_output_embeddings()
    assert type(head) is nn.Linear and head.weight.dtype == torch.bfloat16


@FP8_ON_A_CPU
@pytest.mark.usefixtures("as_on_a_gpu")
def test_log_probs_are_close_to_those_in_bfloat16_and_are_cached_apart(llama: Path) -> None:
    plain, policy = disturb(load(llama)), disturb(load(llama, compute_dtype="fp8"))
    rows = [make_row(number, 12, 9, 5) for number in range(4)]
    logps = []
    for each in (plain, policy):
        (pack,) = each.packs(rows, range(4))
        with torch.no_grad():
            logps.append(each.score(pack).responses)
    assert not torch.equal(*logps)
    torch.testing.assert_close(*logps, rtol=0.05, atol=0.05)
    assert plain.digest() != policy.digest()


@FP8_ON_A_CPU
@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_job_trains_in_fp8_and_says_how_far_its_log_probs_are_off(llama: Path, tmp_path: Path) -> None:
    spec = JobSpec.model_validate({"model": "tiny", "training_file": "x", **FIELDS, "compute_dtype": "fp8"})
    assert spec.resolved().quantization == "none"
    losses = []
    for name in ("bf16", "fp8"):
        fields = {**FIELDS, "compute_dtype": name, "quantization": "none"}
        folder = make_work_folder(tmp_path / name, llama, fields, train=PAIRS)
        events = run_in_process(folder)
        losses.append(training_metrics(events, "loss", "dpo"))
        messages = [event["message"] for event in of_kind(events, "message")]
        assert not any("tree by tree" in message or "not shared" in message for message in messages)
    assert losses[1] == pytest.approx(losses[0], rel=0.1) and losses[0] != losses[1]
    card = next(folder.rglob("README.md")).read_text()
    assert (
        "**Quantisation of the base in training**: fp8. On the unquantised base the adapter's log-probs differ by"
        in card
    )
    assert "rows have the same order by log-prob" in card


@FP8_ON_A_CPU
@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_base_without_layers_for_fp8_is_refused(tmp_path: Path) -> None:
    """GPT-2's layers are not linear layers of torch."""
    make_tokenizer().save_pretrained(tmp_path)
    config = AutoConfig.for_model("gpt2", n_embd=32, n_layer=2, n_head=2, vocab_size=320)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no layers that can compute in FP8") as caught:
        load(tmp_path, compute_dtype="fp8")
    assert caught.value.param == "compute_dtype"


@FP8_ON_A_CPU
@pytest.mark.usefixtures("as_on_a_gpu")
def test_an_adapter_with_dora_is_refused_and_evaluated_in_16_bits(llama: Path, tmp_path: Path) -> None:
    load(llama, adapter={"r": 4, "use_dora": True}).save(tmp_path)
    body = {"model": BASE_NAME, "training_file": "x", "compute_dtype": "fp8"}
    spec, base, stream = JobSpec.model_validate(body).resolved(), Base(BASE_NAME, None, None, llama), io.StringIO()
    with pytest.raises(UserError, match="DoRA"):
        load_policy(spec, base, tmp_path, Events(stream))
    policy = load_policy(spec, base, tmp_path, Events(stream), trainable=False)
    assert not fp8.is_used(policy.causal) and "computes in 16 bits" in stream.getvalue()


@FP8_ON_A_CPU
@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_sharded_base_has_the_gradients_of_a_whole_one(llama: Path) -> None:
    adapter = {"r": 4, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}
    body = {"model": BASE_NAME, "training_file": "x", "adapter": adapter, "seed": 1, "compute_dtype": "fp8"}
    spec, base = JobSpec.model_validate(body).resolved(), Base(BASE_NAME, None, None, llama)
    rows = Rows.of([make_row(number, 20 + number, 9, 5) for number in range(4)])

    def step(ranks: ThreadRanks, shards: Shards | None) -> tuple[str, Any]:
        with LOADING:
            policy = disturb(load_policy(spec, base, None, Events(io.StringIO()), shards))
        check(policy, rows, Events(io.StringIO()))
        return policy.digest(), gradient_on(ranks, policy, "sigmoid", rows, 1024, 3)

    ((digest, (expected, metrics)),) = on_ranks(1, lambda ranks: step(ranks, None))
    results = on_ranks(2, lambda ranks: step(ranks, Shards(ranks)))
    assert [(result, found) for result, (_, found) in results] == [(digest, metrics)] * 2
    actual = {name: gradient for _, (part, _) in results for name, gradient in part.items()}
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], gradient) for name, gradient in expected.items())


@FP8_ON_A_CPU
def test_a_transposed_input_is_read_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU demands it."""
    scaled = torch._scaled_mm

    def strict(left: Tensor, right: Tensor, *rest: Any, **options: Any) -> Tensor:
        assert left.is_contiguous() and right.t().is_contiguous()
        return scaled(left, right, *rest, **options)

    monkeypatch.setattr(torch, "_scaled_mm", strict)
    layer, x = Fp8Linear(nn.Linear(64, 48)), random(64, 32).t().requires_grad_()
    layer(x).backward(random(48, 32).t())


def test_a_cpu_computes_in_float32(llama: Path) -> None:
    stream = io.StringIO()
    policy = load(llama, stream=stream, compute_dtype="fp8")
    assert not any(isinstance(module, Fp8Linear) for module in policy.causal.modules())
    assert "'compute_dtype' is for GPUs" in stream.getvalue()


@pytest.mark.parametrize(
    ("fields", "field", "reason"),
    [
        ({"quantization": "nf4"}, "compute_dtype", "'quantization': 'none'"),
        ({"quantization": "int8"}, "compute_dtype", "'quantization': 'none'"),
        ({"adapter": {"use_dora": True}}, "adapter.use_dora", "DoRA"),
        ({"adapter": "none"}, "compute_dtype", "Full-parameter training"),
    ],
)
def test_what_fp8_cannot_go_with_is_refused(fields: dict[str, Any], field: str, reason: str) -> None:
    body = {"model": "tiny", "training_file": "x", "compute_dtype": "fp8", **fields}
    with pytest.raises(ValidationError) as caught:
        JobSpec.model_validate(body)
    (error,) = caught.value.errors()
    assert error["ctx"]["field"] == field and reason in error["msg"]


def test_the_estimate_has_one_byte_for_each_weight_of_the_layers() -> None:
    shape = Shape.of(
        {
            "shape": {
                "hidden": 4096, "layers": 32, "vocabulary": 128_256, "others": 1_050_673_152,
                "linears": [["q_proj", 4096, 4096, 32], ["gate_proj", 14_336, 4096, 32]],
            }
        }
    )  # fmt: skip
    assert shape is not None
    weights = sum(linear.parameters for linear in shape.linears)
    settings = MemorySettings(16, "all-linear", "fp8", "adamw", None, 8192, 512)
    assert estimate(shape, settings, "cuda", None).model == weights + 2 * shape.others
    assert estimate(shape, settings, "cpu", None).model == 4 * (weights + shape.others)


def test_a_shape_without_linear_layers_has_an_estimate() -> None:
    shape = Shape(64, 2, 300, 128, (), 1000)
    settings = MemorySettings(16, "all-linear", "fp8", "adamw", None, 8192, 512)
    assert estimate(shape, settings, "cuda", None).model == 2 * shape.others
