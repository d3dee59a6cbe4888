"""The specs in examples/ are valid, and have the settings of the paper and of the blog."""

import io
import json
from pathlib import Path

import pytest

from app.spec.datasets.check import examples
from app.spec.job import JobSpec
from app.spec.json_types import JsonObject
from app.spec.sweep import SweepSpec

FOLDER = Path(__file__).parents[2] / "examples"
SPECS = {path.name: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))}


def jobs_of(body: JsonObject) -> list[JobSpec]:
    bodies = [job_body for _, job_body in SweepSpec.model_validate(body).bodies()] if "grid" in body else [body]
    return [JobSpec.model_validate(job_body).resolved() for job_body in bodies]


@pytest.mark.parametrize("name", SPECS)
def test_every_example_is_a_valid_spec_and_is_listed_in_the_readme(name: str) -> None:
    assert jobs_of(SPECS[name])
    assert f"({name})" in (FOLDER / "README.md").read_text()


@pytest.mark.parametrize(("name", "betas"), [("hh", [0.1]), ("tldr", [0.5]), ("imdb", [0.05, 0.1, 1.0, 5.0])])
def test_the_specs_of_the_paper_have_the_settings_of_its_appendix_b(name: str, betas: list[float]) -> None:
    jobs = jobs_of(SPECS[f"paper-{name}.json"])
    assert [job.method.dpo.hyperparameters.beta for job in jobs if job.method.dpo is not None] == betas
    for job in jobs:
        assert job.method.dpo is not None and job.adapter == "none"
        hyperparameters = job.method.dpo.hyperparameters
        assert (hyperparameters.batch_size, hyperparameters.learning_rate, hyperparameters.warmup_steps) == (
            64,
            1e-6,
            150,
        )
        assert (hyperparameters.optimizer, hyperparameters.lr_scheduler, hyperparameters.loss) == (
            "rmsprop",
            "constant",
            "sigmoid",
        )


def test_the_spec_of_the_blog_has_the_settings_of_its_scripts() -> None:
    (job,) = jobs_of(SPECS["blog-llama-2.json"])
    assert job.sft is not None and job.method.dpo is not None
    sft, dpo = job.sft.hyperparameters, job.method.dpo.hyperparameters
    assert (sft.max_steps, sft.learning_rate, dpo.max_steps, dpo.learning_rate) == (500, 1e-4, 1000, 5e-4)
    assert {sft.warmup_steps, dpo.warmup_steps} == {100} and {sft.weight_decay, dpo.weight_decay} == {0.05}
    assert (job.quantization, job.double_quantization, job.compute_dtype) == ("nf4", False, "bf16")


def test_openais_comparisons_are_read_as_published() -> None:
    (job,) = jobs_of(SPECS["paper-tldr.json"])
    rows = [
        {
            "info": {"subreddit": "aww", "title": "Cat", "post": "It sleeps."},
            "summaries": [{"text": "Cat sleeps."}, {"text": "A dog."}], "choice": choice,
        }
        for choice in (0, 1)
    ]  # fmt: skip
    file = io.BytesIO("".join(json.dumps(row) + "\n" for row in rows).encode())
    comparisons = list(examples(file, job.mapping))
    assert {comparison.prompt for comparison in comparisons} == {
        "SUBREDDIT: r/aww\n\nTITLE: Cat\n\nPOST: It sleeps.\n\nTL;DR:"
    }
    assert [comparison.responses for comparison in comparisons] == [
        (" Cat sleeps.", " A dog."),
        (" A dog.", " Cat sleeps."),
    ]
