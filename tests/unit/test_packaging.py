"""The container files, checked without a container engine, and the paths that documents name."""

import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator
from typer.main import get_command

from app.cli.main import cli

ROOT = Path(__file__).parents[2]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]


def dockerfile() -> list[tuple[str, list[str]]]:
    """(instruction, words) of the Dockerfile."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split()[0], line.split()[1:]) for line in lines]


def test_the_dockerfile_copies_existing_paths_and_all_packages() -> None:
    copied = {source for instruction, words in dockerfile() if instruction == "COPY" for source in words[:-1]}
    assert all((ROOT / source).exists() for source in copied)
    wheel = re.search(r"packages = \[(.*?)\]", (ROOT / "pyproject.toml").read_text())
    assert wheel is not None and set(re.findall(r'"(\w+)"', wheel[1])) <= copied


def test_the_lowest_python_is_the_same_everywhere() -> None:
    """`extractall(filter=)` came with Python 3.11.4."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lowest = project["requires-python"].removeprefix(">=")
    assert lowest == "3.11.4"
    assert f"sys.version_info < ({lowest.replace('.', ', ')})" in (ROOT / "Makefile").read_text()
    for document in ("README.md", "docs/tutorial.md", "docs/troubleshooting.md"):
        text = " ".join((ROOT / document).read_text().split())
        assert f"Python {lowest} or newer" in text, document


def test_the_targets_of_compose_are_stages_of_the_dockerfile_and_run_as_a_user() -> None:
    stages = [words[2] for instruction, words in dockerfile() if instruction == "FROM"]
    assert stages == ["base", "api-dependencies", "api", "worker-dependencies", "worker"]
    users = [words[0] for instruction, words in dockerfile() if instruction == "USER"]
    assert users == ["dpo", "dpo"]
    targets = {service["build"]["target"] for service in SERVICES.values() if "build" in service}
    assert targets == {"api", "worker"}
    for stage in ("base", "api-dependencies", "api"):
        runs = [" ".join(words) for instruction, words in steps_of(stage) if instruction == "RUN"]
        assert runs and not any("worker" in run or "torch" in run for run in runs)


def steps_of(stage: str) -> list[tuple[str, list[str]]]:
    """The instructions of one stage of the Dockerfile."""
    steps = dockerfile()
    first = next(k for k, (instruction, words) in enumerate(steps) if instruction == "FROM" and words[-1] == stage)
    following = (k for k in range(first + 1, len(steps)) if steps[k][0] == "FROM")
    return steps[first + 1 : next(following, len(steps))]


def test_dependencies_are_installed_before_the_sources_are_copied() -> None:
    """A change of the sources then leaves their layers as they are."""
    for stage in ("base", "api-dependencies", "worker-dependencies"):
        copied = {word for instruction, words in steps_of(stage) if instruction == "COPY" for word in words[:-1]}
        assert copied <= {"pyproject.toml", "constraints.txt"}
    for stage, heavy in (("api-dependencies", "requirements.txt"), ("worker-dependencies", "torch==")):
        assert any(heavy in word for instruction, words in steps_of(stage) if instruction == "RUN" for word in words)


def is_a_command(words: list[str]) -> bool:
    """Whether `dpo …` parses to a command of this project, with these options."""
    command: Any = get_command(cli)
    assert words[0] == "dpo"
    name, *arguments = words[1:]
    subcommand = command.commands[name]
    subcommand.make_context(name, list(arguments))
    return True


def test_every_command_of_a_container_exists() -> None:
    commands = [service["command"] for service in SERVICES.values() if service.get("command", [""])[0] == "dpo"]
    commands += [
        shlex.split(" ".join(words).replace("[", "").replace("]", "").replace(",", " "))
        for instruction, words in dockerfile()
        if instruction == "CMD" and "dpo" in words[0]
    ]
    assert len(commands) >= 5
    assert all(is_a_command(command) for command in commands)


def test_compose_is_valid() -> None:
    """By the schema of the Compose specification (`tests/data/compose-spec.json` names its version)."""
    schema = json.loads((ROOT / "tests" / "data" / "compose-spec.json").read_text())
    assert [error.message for error in Draft7Validator(schema).iter_errors(COMPOSE)] == []


def test_compose_is_complete() -> None:
    parts = {"proxy", "migrate", "api", "gpu-worker", "cpu-trainer", "cpu-worker", "postgres", "redis", "s3", "bucket"}
    assert set(SERVICES) == parts
    assert {name: service["profiles"] for name, service in SERVICES.items() if "profiles" in service} == {
        "gpu-worker": ["gpu"],
        "cpu-trainer": ["cpu"],
    }
    for name, service in SERVICES.items():
        assert "image" in service, name
        for dependency in service.get("depends_on", {}):
            assert dependency in SERVICES
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert source in COMPOSE["volumes"] or source.startswith(("$", ".", "/"))
    healthy = {
        dependency
        for service in SERVICES.values()
        for dependency, condition in service.get("depends_on", {}).items()
        if condition["condition"] == "service_healthy"
    }
    assert all("healthcheck" in SERVICES[name] for name in healthy)
    (device,) = SERVICES["gpu-worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]


def test_all_workers_share_the_models_of_the_hub_and_are_watched() -> None:
    for name in ("gpu-worker", "cpu-trainer", "cpu-worker"):
        service = SERVICES[name]
        lane = service["command"][-1]
        assert f"/var/lib/dpo/{lane}-worker.alive" in service["healthcheck"]["test"][1]
        assert service["environment"].keys() >= {"DPO_HUB_MODELS", "HF_TOKEN", "DPO_MODELS_DIR"}
        assert f"hub:{service['environment']['HF_HOME']}" in service["volumes"]
    tags = {service["image"] for service in SERVICES.values() if "build" in service}
    assert tags == {f"dpo-service-{name}:${{DPO_VERSION:-{VERSION}}}" for name in ("api", "worker")}


def test_only_the_proxy_can_be_reached_and_only_the_api_has_the_operators_key() -> None:
    assert [name for name, service in SERVICES.items() if "ports" in service] == ["proxy"]
    assert all(port.startswith("${") and ":-127.0.0.1:" in port for port in SERVICES["proxy"]["ports"])
    with_key = [name for name, service in SERVICES.items() if "DPO_ADMIN_KEY" in service.get("environment", {})]
    assert with_key == ["api"]
    store = SERVICES["s3"]["command"]
    assert "-ip.bind=127.0.0.1" in store and "-s3.ip.bind=0.0.0.0" in store


def test_every_image_of_others_has_a_version_and_a_digest() -> None:
    images = [service["image"] for service in SERVICES.values() if "build" not in service]
    stages = {words[-1] for instruction, words in dockerfile() if instruction == "FROM"}
    images += [words[0] for instruction, words in dockerfile() if instruction == "FROM" and words[0] not in stages]
    assert len(images) >= 6
    for image in images:
        assert re.fullmatch(r"[a-z/]+:\d[\d.]+[a-z-]*@sha256:[0-9a-f]{64}", image), image


@pytest.mark.parametrize("name", ["migrate", "api", "gpu-worker", "cpu-trainer", "cpu-worker"])
def test_every_process_gets_the_same_stores_and_secrets(name: str) -> None:
    environment = SERVICES[name]["environment"]
    for variable in ("DPO_DATABASE_URL", "DPO_BROKER_URL", "DPO_STORAGE_URL", "AWS_ENDPOINT_URL", "DPO_SECRET_KEY"):
        assert variable in environment


def test_compose_holds_no_secret_and_the_example_names_them_all() -> None:
    text = (ROOT / "docker-compose.yml").read_text()
    required = set(re.findall(r"\$\{(\w+):\?", text))
    example = dict(
        line.split("=", 1)
        for line in (ROOT / ".env.example").read_text().splitlines()
        if "=" in line and line[0] != "#"
    )
    assert {"DPO_ADMIN_KEY", "DPO_SECRET_KEY", "POSTGRES_PASSWORD", "REDIS_PASSWORD", "S3_SECRET_KEY"} == required
    assert all(example[name] == "" for name in required)
    assert set(re.findall(r"\$\{(\w+)", text)) | {"COMPOSE_PROFILES"} == set(example)


def test_the_tests_that_security_md_names_exist() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "SECURITY.md").read_text())
    assert len(named) > 15
    for path, name in named:
        assert f"def {name}(" in (ROOT / path).read_text(), f"{path}::{name}"
