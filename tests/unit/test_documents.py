"""The code blocks of the documents are valid: shell, Python, JSON by its schema, YAML by that of its tool.

`tests/acceptance/test_documents.py` runs those that can run.
"""

import ast
import io
import json
import shutil
import subprocess
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from jsonschema import Draft202012Validator
from pydantic import BaseModel

from app.spec.datasets.check import survey
from app.spec.datasets.mapping import Mapping
from app.spec.evaluation import EvaluationSpec, Side
from app.spec.hyperparameters import DPOHyperparameters
from app.spec.job import JobSpec
from app.spec.json_types import JsonObject
from app.spec.labelling import Labeller, LabellingSpec
from app.spec.pipeline import PipelineSpec
from app.webhooks.schemas import EventType
from docs.generate import api
from tests.helpers.documents import PAGES, SHELLS, Block, blocks, shell_lines, simple_commands
from worker.classifier import LinearClassifier

BLOCKS = [block for page in PAGES for block in blocks(page)]
WORKFLOW_KEYS = {
    "": {"name", "on", "jobs", "permissions", "env", "concurrency", "defaults", "run-name"},
    "job": {"runs-on", "steps", "timeout-minutes", "env", "needs", "if", "permissions", "strategy", "container", "services"},
    "step": {"uses", "with", "run", "if", "env", "name", "id", "shell", "working-directory", "continue-on-error", "timeout-minutes"},
}  # fmt: skip
"""The keys that a GitHub workflow may have: docs.github.com, "Workflow syntax for GitHub Actions"."""
FOREIGN: dict[str, set[str]] = {
    "cp": set(),
    "mkdir": {"-p"},
    "pipx install": set(),
    "pip install": set(),
    "scontrol show": set(),
    "head": {"-n"},
    "export": set(),
    "helm upgrade": {
        "--install",
        "--namespace",
        "--create-namespace",
        "--set",
    },  # helm.sh/docs/helm/helm_upgrade, 2026-11
    "helm repo": set(),
    "docker build": {"--target", "--build-arg"},  # docs.docker.com/reference/cli/docker/buildx/build, 2026-11
    "ray start": {"--head", "--port", "--num-gpus", "--num-cpus", "--address"},  # `ray start --help` of Ray 2.60
    "srun ray": {"--address", "--min-nodes", "--", "--lane"},  # `ray symmetric-run --help` of Ray 2.60
    "docker compose": {"--build"},  # docs.docker.com/reference/cli/docker/compose/up, 2026-11
    "pg_dump": {"--no-owner", "--file"},  # postgresql.org/docs/17/app-pgdump.html
    "aws s3": set(),
    "jq": {"-c"},
    "python": {"-m"},
    ".venv/bin/python": {"-m"},
}
"""The commands of other tools in blocks that are not run, with the options that they have."""


def of(language: str | set[str]) -> list[Block]:
    languages = {language} if isinstance(language, str) else language
    return [block for block in BLOCKS if block.language in languages]


def each(selected: list[Block]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("block", selected, ids=[block.place for block in selected])


def test_every_block_names_a_language_that_is_checked() -> None:
    unknown = {block.language for block in BLOCKS} - SHELLS - {"python", "json", "yaml", "nginx", "caddy", "text", ""}
    assert unknown == set() and len(BLOCKS) > 100
    assert {key for block in BLOCKS for key in block.markers} <= {"no-run", "json", "yaml", "file", "prints", "gate"}


@each(of(SHELLS))
def test_a_shell_block_is_valid(block: Block) -> None:
    checked = subprocess.run(["bash", "-n"], input=block.text, text=True, capture_output=True, check=False)
    assert checked.returncode == 0 and checked.stderr == "", checked.stderr


@each([block for block in of(SHELLS) if "no-run" in block.markers])
def test_a_block_that_is_not_run_has_known_commands_of_other_tools(block: Block) -> None:
    """`tests/unit/test_commands.py` parses those of this project, of make and of vLLM."""
    for line in shell_lines(block):
        for words in simple_commands(line.partition(" #")[0]):
            if words[0] in ("dpo", "make", "vllm", "redirected"):
                continue
            command = words[0] if words[0] in FOREIGN else " ".join(words[:2])
            assert command in FOREIGN, words
            options = {word for word in words if word.startswith("-")}
            ours = words[0].endswith("python")  # the options of a bench are its own
            assert ours or options <= FOREIGN[command], words


@each(of("python"))
def test_a_python_block_is_valid(block: Block) -> None:
    text = textwrap.dedent(block.text)
    try:
        ast.parse(text)
    except SyntaxError:
        assert "no-run" in block.markers, "only a block that is not run may be a part of something"
        ast.parse(f"{{{text}}}")


# -- JSON ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def openapi() -> JsonObject:
    return api.document()


def is_part_of(value: object, name: str, openapi: JsonObject) -> None:
    """Check an object of the API that a page has shortened: its fields exist, and have the right types."""

    def optional(schema: Any) -> Any:
        if isinstance(schema, dict):
            kept = {key: optional(part) for key, part in schema.items() if key != "required"}
            return {"additionalProperties": False} | kept if "properties" in schema else kept
        return [optional(part) for part in schema] if isinstance(schema, list) else schema

    schema = optional({"$ref": f"#/components/schemas/{name}", "components": openapi["components"]})
    assert [error.message for error in Draft202012Validator(schema).iter_errors(value)] == []


def is_valid(model: type[BaseModel]) -> Callable[[Any], None]:
    def check(value: Any) -> None:
        model.model_validate(value)

    return check


def is_a_part_of_a_job(value: Any) -> None:
    JobSpec.model_validate({"model": "base", "training_file": "pairs", "method": {"type": "dpo"}} | value)


def is_a_job_without_its_file(value: Any) -> None:
    JobSpec.model_validate(value | {"training_file": "pairs"})


def is_an_event_of_a_webhook(value: Any) -> None:
    assert set(value) == {"id", "object", "type", "created_at", "data"} and value["type"] in get_args(EventType)


JSON_KINDS: dict[str, Callable[[Any], None]] = {
    "job": is_valid(JobSpec),
    "job without its file": is_a_job_without_its_file,
    "part of a job": is_a_part_of_a_job,
    "hyperparameters": is_valid(DPOHyperparameters),
    "evaluation": is_valid(EvaluationSpec),
    "labelling": is_valid(LabellingSpec),
    "labeller": is_valid(Labeller),
    "pipeline": is_valid(PipelineSpec),
    "side": is_valid(Side),
    "mapping": is_valid(Mapping),
    "webhook event": is_an_event_of_a_webhook,
    "policy": lambda value: None,  # tests/integration/test_storage.py has a server enforce it
}
OBJECTS = {
    "job object": "JobObject", "evaluation object": "EvaluationObject", "labelling object": "LabellingObject",
}  # fmt: skip


@each(of("json"))
def test_a_json_block_is_what_its_page_says(block: Block, openapi: JsonObject, tmp_path: Path) -> None:
    kind = block.markers.get("json")
    if kind == "rows":
        report = survey(io.BytesIO(block.text.encode()))
        assert report.error is None and report.kept == report.rows > 0
    elif kind == "classifier":
        (tmp_path / "classifier.json").write_text(block.text)
        LinearClassifier.load(tmp_path / "classifier.json")
    elif kind in OBJECTS:
        is_part_of(json.loads(block.text), OBJECTS[kind], openapi)
    elif kind is None:
        assert block.page.name == "api.md", "the block needs a comment before it that says what it is"
        is_part_of(json.loads(block.text), block.heading, openapi)
    else:
        text = f"{{{block.text}}}" if kind == "part of a job" else block.text
        JSON_KINDS[kind](json.loads(text))


# -- files of other tools -----------------------------------------------------------------------------------------


@each(of("yaml"))
def test_a_yaml_block_is_valid_for_its_tool(block: Block, tmp_path: Path) -> None:
    value = yaml.safe_load(block.text)
    if block.markers["yaml"] == "workflow":
        value["on"] = value.pop(True, None)  # YAML 1.1 reads `on` as true
        assert set(value) <= WORKFLOW_KEYS[""]
        for job in value["jobs"].values():
            assert set(job) <= WORKFLOW_KEYS["job"]
            for step in job["steps"]:
                assert set(step) <= WORKFLOW_KEYS["step"] and ("uses" in step) != ("run" in step)
        return
    if block.markers["yaml"] == "traefik":
        return  # no parser of Traefik is at hand; the page says so
    assert block.markers["yaml"] == "prometheus"
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not here; `make test` as root on Debian installs it")
    (tmp_path / "prometheus.yml").write_text(block.text)
    checked = subprocess.run(
        [promtool, "check", "config", "--syntax-only", "prometheus.yml"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert checked.returncode == 0, checked.stdout + checked.stderr
