"""The memory model against the measured peaks of whole runs, and the advice for a job that cannot fit."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from app.estimates.fit import placed, refusal
from app.estimates.memory import Linear, MemorySettings, Shape, estimate
from app.estimates.schemas import Device
from app.spec.job import JobSpec
from app.spec.json_types import JsonObject
from docs.generate.gpus import MODELS

RESULTS = Path(__file__).parents[2] / "bench" / "results"
MEASURED: list[JsonObject] = json.loads((RESULTS / "memory.json").read_text())["specs"]


def shape_of(fields: JsonObject) -> Shape:
    return Shape(**fields | {"linears": tuple(Linear(**linear) for linear in fields["linears"])})


def test_there_are_enough_measurements() -> None:
    assert len(MEASURED) >= 20
    assert (
        len(
            {
                json.dumps([run["sizes"], run["adapter"], run["quantization"], run["hyperparameters"]])
                for run in MEASURED
            }
        )
        >= 18
    )


@pytest.mark.parametrize("number", range(len(MEASURED)))
def test_the_memory_model_is_within_15_percent_of_measured_peaks(number: int) -> None:
    run = MEASURED[number]
    spec = JobSpec.model_validate(run["job"])
    tokens = run["batch_tokens"]
    settings = MemorySettings.of(spec, spec.method.hyperparameters, tokens / run["batch"], round(tokens / run["batch"]))
    estimated = estimate(shape_of(run["shape"]), settings, "cpu", None).total
    assert estimated == pytest.approx(run["measured"], rel=0.15)


LLAMA_8B = Shape(
    hidden=4096, layers=32, vocabulary=128256, context=8192, others=2 * 128256 * 4096 + 65 * 4096,
    linears=(
        Linear("q_proj", 4096, 4096, 32), Linear("k_proj", 1024, 4096, 32), Linear("v_proj", 1024, 4096, 32),
        Linear("o_proj", 4096, 4096, 32), Linear("gate_proj", 14336, 4096, 32), Linear("up_proj", 14336, 4096, 32),
        Linear("down_proj", 4096, 14336, 32),
    ),
    cached=2 * 32 * 8 * 128,  # keys and values of 8 heads with 128 numbers, in 32 layers
)  # fmt: skip


def job(**fields: object) -> JobSpec:
    return JobSpec.model_validate({"model": "m", "training_file": "f", "method": {"type": "dpo"}} | fields).resolved()


def gpu(gigabytes: float, count: int = 1) -> Device:
    return Device(kind="cuda", name="a GPU", memory_bytes=int(gigabytes * 1e9), count=count)


def test_parameter_counts_agree_with_the_papers() -> None:
    assert LLAMA_8B.parameters == pytest.approx(8.03e9, rel=0.01)
    settings = MemorySettings.of(job(), job().method.hyperparameters, 500, 1000)
    memory = estimate(LLAMA_8B, settings, "cuda", int(80e9))
    # QLoRA, App. A and PEFT's print_trainable_parameters: rank 16 on all linear layers of Llama 3 8B.
    assert memory.adapter == pytest.approx(4 * 41_943_040, rel=1e-6)
    assert memory.model == pytest.approx(0.516 * 6.98e9 + 2 * 1.05e9, rel=0.01)


@pytest.mark.parametrize(
    ("fields", "gigabytes", "param", "advice"),
    [
        ({}, 24, None, None),
        ({"quantization": "none"}, 12, "quantization", "'quantization': 'nf4' would fit."),
        ({"adapter": "none"}, 80, "adapter", "A LoRA adapter on an 'nf4' base would fit: leave 'adapter' out."),
        ({}, 4, "model", "No setting would make it fit. It needs a larger device."),
        ({"adapter": "none"}, 160, None, None),
    ],
)
def test_a_job_that_cannot_fit_is_refused_with_the_change_that_would_help(
    fields: JsonObject, gigabytes: float, param: str | None, advice: str | None
) -> None:
    field_and_message = refusal(job(**fields), LLAMA_8B, [gpu(gigabytes)], 512)
    if param is None or advice is None:
        assert field_and_message is None
    else:
        assert field_and_message is not None
        assert field_and_message[0] == param and field_and_message[1].endswith(f" GB. {advice}")


def test_rows_that_are_too_long_are_given_as_the_reason() -> None:
    long_context = replace(LLAMA_8B, context=1_000_000)
    field_and_message = refusal(job(), long_context, [gpu(16)], 200_000)
    assert field_and_message is not None and field_and_message[0] == "method"
    assert re.search(r"A 'max_length' that keeps rows under \d+ tokens would fit\.$", field_and_message[1])
    assert refusal(job(), long_context, [gpu(16)], None) is None, "a job whose longest row is unknown is accepted"


def reinforcement(**hyperparameters: object) -> JobSpec:
    grader = {"type": "string_check", "name": "g", "input": "a", "reference": "b", "operation": "eq"}
    return job(
        method={"type": "reinforcement", "reinforcement": {"grader": grader, "hyperparameters": hyperparameters}}
    )


def test_the_cache_of_keys_and_values_counts_while_answers_are_written() -> None:
    """It takes 128 KiB for each token of Llama 3.1 8B in 16 bits. The answers to a prompt share those of the prompt."""
    spec = reinforcement(batch_size=16, samples=8, max_tokens=512)
    settings = MemorySettings.of(spec, spec.method.hyperparameters, 1000 + 8 * 512, 1000 + 8 * 512)
    memory = estimate(LLAMA_8B, settings, "cuda", int(80e9))
    logits = 64 * 128256 * (4 + 3 * 8)
    assert memory.rollouts == 8 * (1000 + 8 * 512) * 128 * 1024 + logits, "64 answers to 8 prompts are written together"
    others = memory.runtime + memory.model + memory.adapter + memory.optimizer
    assert memory.total == others + max(memory.rollouts, memory.activations + memory.temporary)
    long = replace(settings, batch_tokens=1e9)
    assert estimate(LLAMA_8B, long, "cuda", int(80e9)).rollouts == 131_072 * 128 * 1024 + logits
    other = MemorySettings.of(job(), job().method.hyperparameters, 500, 1000)
    assert estimate(LLAMA_8B, other, "cuda", int(80e9)).rollouts == 0


def test_reward_models_stay_in_memory_beside_the_policy() -> None:
    """They are merged and not quantised. A second model of 8B in 16 bits fills a device of 24 GB."""
    judged = replace(LLAMA_8B, graders=LLAMA_8B.parameters)
    spec = reinforcement(samples=4, max_tokens=64)
    settings = MemorySettings.of(spec, spec.method.hyperparameters, 300, 300)
    difference = estimate(judged, settings, "cuda", None).total - estimate(LLAMA_8B, settings, "cuda", None).total
    assert difference == pytest.approx(2 * 8.03e9, rel=0.01)
    assert refusal(spec, LLAMA_8B, [gpu(16)], 300) is None
    refused = refusal(spec, judged, [gpu(16)], 300)
    assert refused is not None and refused[1].startswith("The job needs about 25.1 GB")


def test_activations_are_recomputed_if_they_would_not_fit() -> None:
    settings = MemorySettings.of(job(), job().method.hyperparameters, 600, 1000)
    assert estimate(LLAMA_8B, settings, "cuda", int(24e9)).recompute
    assert not estimate(LLAMA_8B, settings, "cuda", int(141e9)).recompute


@pytest.mark.parametrize("way", ["uncompiled", "compiled", "uncompiled, recomputed", "compiled, recomputed"])
def test_the_activations_of_a_gpu_are_those_that_autograd_keeps(way: str) -> None:
    """bench/activations.py counted them for layers with the sizes of Llama 3.1 8B."""
    counted = json.loads((RESULTS / "activations.json").read_text())["bytes_per_token_and_layer"][way]
    hyperparameters = {"compile": not way.startswith("un"), "activation_checkpointing": "recomputed" in way}
    spec = job(method={"type": "dpo", "dpo": {"hyperparameters": hyperparameters}})
    settings = MemorySettings.of(spec, spec.method.hyperparameters, 8192, 512)
    estimated = estimate(LLAMA_8B, settings, "cuda", None).activations
    assert estimated / 8192 / LLAMA_8B.layers == pytest.approx(counted, rel=0.02)


LLAMA_70B = MODELS["Llama 3.1 70B"]


@pytest.mark.parametrize(
    ("shape", "fields", "devices", "expected"),
    [
        (LLAMA_8B, {}, [gpu(24, 8)], 1),
        (LLAMA_70B, {}, [gpu(80, 8)], 1),
        (LLAMA_70B, {}, [gpu(24, 8)], 4),
        (LLAMA_70B, {"quantization": "none"}, [gpu(80, 8)], 3),
        (LLAMA_70B, {"quantization": "none"}, [gpu(80, 8), gpu(180)], 1),
        (LLAMA_8B, {"adapter": "none"}, [gpu(80, 8)], 2),
        (LLAMA_8B, {"adapter": "none"}, [gpu(80)], None),
        (LLAMA_8B, {"adapter": "none", "parallel": {"shard": False}}, [gpu(80, 8)], None),
        (LLAMA_8B, {"adapter": "none", "resources": {"gpus": 2}}, [gpu(80, 8)], 2),
        (LLAMA_70B, {"resources": {"gpus": 4}, "parallel": {"shard": False}}, [gpu(24, 8)], None),
        (LLAMA_70B, {"resources": {"gpus": {"min": 2, "max": 8}}}, [gpu(24, 8)], None),
        (LLAMA_8B, {}, [], 1),
        (LLAMA_8B, {"resources": {"gpus": 4}}, [gpu(80, 2)], 4),  # it waits for a worker with so many
        (LLAMA_70B, {}, [gpu(45, 8)], 1),  # within the tolerance of the estimate
        (LLAMA_70B, {"resources": {"gpus": 2}, "parallel": {"shard": False}}, [gpu(24, 8), gpu(400)], None),
    ],
)
def test_a_job_takes_the_fewest_devices_that_it_fits_on(
    shape: Shape, fields: JsonObject, devices: list[Device], expected: int | None
) -> None:
    spec = placed(job(**fields), shape, devices, 512)
    assert (None if refusal(spec, shape, devices, 512) is not None else spec.resources.least) == expected


def test_a_job_that_fits_on_no_number_of_devices_is_refused_for_the_number_that_it_names() -> None:
    refused = refusal(job(resources={"gpus": 2}, quantization="none"), LLAMA_70B, [gpu(48, 4)], 512)
    assert refused is not None and "on each of 2 devices, and the largest worker (a GPU) has 48.0 GB" in refused[1]


def test_more_devices_are_advised_if_they_would_help() -> None:
    spec = job(resources={"gpus": {"min": 1, "max": 8}}, quantization="none")
    refused = refusal(spec, LLAMA_70B, [gpu(80, 8)], 512)
    advice = "Divided among 3 devices it would fit: 'resources': {'gpus': 3}."
    assert refused is not None and refused[0] == "resources.gpus" and refused[1].endswith(advice)
