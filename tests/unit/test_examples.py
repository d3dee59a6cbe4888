"""The specs in examples/ are valid, and say what the paper and the blog say."""

import io
import json
from pathlib import Path
from typing import Any

import pytest

from app.spec.datasets.check import examples
from app.spec.job import JobSpec
from app.spec.sweep import SweepSpec

FOLDER = Path(__file__).parents[2] / "examples"
SPECS = {path.name: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))}


def jobs_of(body: dict[str, Any]) -> list[JobSpec]:
    bodies = [one for _, one in SweepSpec.model_validate(body).bodies()] if "grid" in body else [body]
    return [JobSpec.model_validate(one).resolved() for one in bodies]


@pytest.mark.parametrize("name", SPECS)
def test_an_example_is_a_spec_that_the_service_takes(name: str) -> None:
    assert jobs_of(SPECS[name])
    assert f"({name})" in (FOLDER / "README.md").read_text()


@pytest.mark.parametrize(("name", "betas"), [("hh", [0.1]), ("tldr", [0.5]), ("imdb", [0.05, 0.1, 1.0, 5.0])])
def test_the_papers_settings_are_those_of_its_appendix_b(name: str, betas: list[float]) -> None:
    jobs = jobs_of(SPECS[f"paper-{name}.json"])
    assert [job.method.dpo.hyperparameters.beta for job in jobs if job.method.dpo is not None] == betas
    for job in jobs:
        assert job.method.dpo is not None and job.adapter == "none"
        settings = job.method.dpo.hyperparameters
        assert (settings.batch_size, settings.learning_rate, settings.warmup_steps) == (64, 1e-6, 150)
        assert (settings.optimizer, settings.lr_scheduler, settings.loss) == ("rmsprop", "constant", "sigmoid")


def test_the_blogs_settings_are_those_of_its_scripts() -> None:
    (job,) = jobs_of(SPECS["blog-llama-2.json"])
    assert job.sft is not None and job.method.dpo is not None
    sft, dpo = job.sft.hyperparameters, job.method.dpo.hyperparameters
    assert (sft.max_steps, sft.learning_rate, dpo.max_steps, dpo.learning_rate) == (500, 1e-4, 1000, 5e-4)
    assert {sft.warmup_steps, dpo.warmup_steps} == {100} and {sft.weight_decay, dpo.weight_decay} == {0.05}
    assert (job.quantization, job.double_quantization, job.compute_dtype) == ("nf4", False, "bf16")


def test_openais_comparisons_are_read_as_they_are_published() -> None:
    (job,) = jobs_of(SPECS["paper-tldr.json"])
    rows = [
        {
            "info": {"subreddit": "aww", "title": "Cat", "post": "It sleeps."},
            "summaries": [{"text": "Cat sleeps."}, {"text": "A dog."}], "choice": choice,
        }
        for choice in (0, 1)
    ]  # fmt: skip
    file = io.BytesIO("".join(json.dumps(row) + "\n" for row in rows).encode())
    found = list(examples(file, job.mapping))
    assert {one.prompt for one in found} == {"SUBREDDIT: r/aww\n\nTITLE: Cat\n\nPOST: It sleeps.\n\nTL;DR:"}
    assert [one.responses for one in found] == [(" Cat sleeps.", " A dog."), (" A dog.", " Cat sleeps.")]
