"""The memory model, held against the peaks that whole runs measured; and what is advised where a job cannot fit."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from app.estimates.fit import refusal
from app.estimates.memory import Linear, MemorySettings, Shape, estimate
from app.estimates.schemas import Device
from app.spec.job import JobSpec

MEASURED: list[dict[str, Any]] = json.loads(
    (Path(__file__).parents[2] / "bench" / "results" / "memory.json").read_text()
)["specs"]


def shape_of(found: dict[str, Any]) -> Shape:
    return Shape(**found | {"linears": tuple(Linear(**linear) for linear in found["linears"])})


def test_there_are_enough_measurements() -> None:
    assert len(MEASURED) >= 20
    assert (
        len({json.dumps([m["sizes"], m["adapter"], m["quantization"], m["hyperparameters"]]) for m in MEASURED}) >= 18
    )


@pytest.mark.parametrize("number", range(len(MEASURED)))
def test_the_memory_model_is_within_15_percent_of_measured_peaks(number: int) -> None:
    found = MEASURED[number]
    job = JobSpec.model_validate(found["job"])
    tokens = found["batch_tokens"]
    settings = MemorySettings.of(
        job, job.method.hyperparameters, tokens / found["batch"], round(tokens / found["batch"])
    )
    expected = estimate(shape_of(found["shape"]), settings, "cpu", None).total
    assert expected == pytest.approx(found["measured"], rel=0.15)


LLAMA_8B = Shape(
    hidden=4096, layers=32, vocabulary=128256, context=8192, others=2 * 128256 * 4096 + 65 * 4096,
    linears=(
        Linear("q_proj", 4096, 4096, 32), Linear("k_proj", 1024, 4096, 32), Linear("v_proj", 1024, 4096, 32),
        Linear("o_proj", 4096, 4096, 32), Linear("gate_proj", 14336, 4096, 32), Linear("up_proj", 14336, 4096, 32),
        Linear("down_proj", 4096, 14336, 32),
    ),
)  # fmt: skip


def job(**fields: Any) -> JobSpec:
    return JobSpec.model_validate({"model": "m", "training_file": "f", "method": {"type": "dpo"}} | fields).resolved()


def gpu(gigabytes: float) -> Device:
    return Device(kind="cuda", name="a GPU", memory_bytes=int(gigabytes * 1e9))


def test_parameters_are_counted_as_the_papers_do() -> None:
    assert LLAMA_8B.parameters == pytest.approx(8.03e9, rel=0.01)
    settings = MemorySettings.of(job(), job().method.hyperparameters, 500, 1000)
    memory = estimate(LLAMA_8B, settings, "cuda", int(80e9))
    # QLoRA, App. A and PEFT's print_trainable_parameters: rank 16 on all linear layers of Llama 3 8B.
    assert memory.adapter == pytest.approx(4 * 41_943_040, rel=1e-6)
    assert memory.model == pytest.approx(0.516 * 6.98e9 + 2 * 1.05e9, rel=0.01)


@pytest.mark.parametrize(
    ("fields", "gigabytes", "param"),
    [
        ({}, 24, None),
        ({"quantization": "none"}, 12, "quantization"),
        ({"adapter": "none"}, 80, "adapter"),
        ({}, 4, "model"),
        ({"adapter": "none"}, 160, None),
    ],
)
def test_a_job_that_cannot_fit_is_told_what_would(fields: dict[str, Any], gigabytes: float, param: str | None) -> None:
    found = refusal(job(**fields), LLAMA_8B, gpu(gigabytes), 512)
    assert (found and found[0]) == param
    if found is not None and param == "quantization":
        assert "'nf4' would fit" in found[1]


def test_long_rows_are_what_is_too_much() -> None:
    small = replace(LLAMA_8B, context=1_000_000)
    found = refusal(job(), small, gpu(16), 200_000)
    assert found is not None and "max_length" in found[1]
    assert refusal(job(), small, gpu(16), None) is None, "unknown rows are given the benefit of the doubt"


def test_activations_are_recomputed_where_they_would_not_fit() -> None:
    settings = MemorySettings.of(job(), job().method.hyperparameters, 600, 1000)
    assert estimate(LLAMA_8B, settings, "cuda", int(24e9)).recompute
    assert not estimate(LLAMA_8B, settings, "cuda", int(141e9)).recompute
