"""The docs have what `python -m docs.generate` writes, and it leaves nothing of the code out."""

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from app.cli.main import cli
from app.installation import INSTALLATION_KEY
from app.prune import NEEDED
from app.settings import Settings
from app.spec.datasets.check import survey
from app.spec.datasets.formats import FORMATS
from app.spec.json_types import JsonObject
from app.storage import PROBE_KEY
from docs.generate import DOCS, PAGES, PARTS, up_to_date, written_pages
from docs.generate.formats import SAMPLES
from docs.generate.numbers import NUMBERS
from docs.generate.settings import GROUPS
from tests.helpers.documents import ROOT
from worker.trainer.advice import WARNINGS

ADVICE = "Run 'python -m docs.generate'."


@pytest.mark.parametrize("name", PAGES)
def test_a_generated_page_is_up_to_date(name: str) -> None:
    assert (DOCS / name).read_text() == PAGES[name](), ADVICE


@pytest.mark.parametrize("page", written_pages(), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_generated_parts_and_numbers_of_a_page_are_up_to_date(page: Path) -> None:
    assert page.read_text() == up_to_date(page), ADVICE


def test_every_part_and_every_page_with_numbers_exists() -> None:
    used = {name for page in written_pages() for name in re.findall(r"<!-- from: (.+?) -->", page.read_text())}
    assert used == set(PARTS)
    assert all((ROOT / page).exists() for page in NUMBERS)


def test_every_setting_is_in_one_table() -> None:
    named = [name for names in GROUPS.values() for name in names]
    assert sorted(named) == sorted(Settings.model_fields)
    assert all(Settings.model_fields[name].description for name in named)


def test_every_variable_that_the_program_reads_is_in_the_reference() -> None:
    page = (DOCS / "reference/configuration.md").read_text()
    sources = [path.read_text() for folder in ("app", "worker") for path in (ROOT / folder).rglob("*.py")]
    read = {
        name
        for source in sources
        for name in re.findall(r"(?:environ(?:\.get\(|\[)|getenv\(|envvar=)\s*\"([A-Z][A-Z_]+)\"", source)
    }
    assert len(read) > 3 and sorted(name for name in read if f"`{name}" not in page) == []


def commands(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    """(path, command) of every command of the program."""
    if not hasattr(command, "commands"):
        yield path, command
    for name, verb in getattr(command, "commands", {}).items():
        yield from commands(verb, f"{path} {name}")


def test_the_reference_of_the_command_line_has_every_command_and_option() -> None:
    page = (DOCS / "reference/command-line.md").read_text()
    sections = {part.partition("\n")[0]: part for part in re.split(r"^###? ", page, flags=re.MULTILINE)}
    for path, command in commands(typer.main.get_command(cli), "dpo"):
        names = [[parameter.metavar] if parameter.metavar else parameter.opts for parameter in command.params]
        missing = [name for options in names for name in options if name not in sections[path]]
        assert missing == [], path


@pytest.mark.parametrize(("name", "row"), SAMPLES.items(), ids=SAMPLES)
def test_the_sample_of_a_format_is_recognised_as_it(name: str, row: JsonObject) -> None:
    report = survey(io.BytesIO(json.dumps(row).encode() + b"\n"))
    assert (report.error, report.format, report.kept) == (None, name, 1)


def test_every_format_has_a_sample() -> None:
    assert set(SAMPLES) == {known.name for known in FORMATS} | {"judged", "argilla"}


def test_the_page_of_storage_names_every_kind_of_object() -> None:
    page = (DOCS / "reference/storage.md").read_text().split("## In the object store")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `([a-z]+)", page, flags=re.MULTILINE)) == {INSTALLATION_KEY, PROBE_KEY, *NEEDED}


def test_every_warning_of_a_training_is_in_the_table() -> None:
    """Advice and warnings name their code as a text in the code that gives them."""
    sources = [path.read_text() for path in (ROOT / "worker" / "trainer").rglob("*.py")]
    given = {code for source in sources for code in re.findall(r'(?:Advice\(\s*|"code": )"(\w+)"', source)}
    assert given - {"invalid_file"} == set(WARNINGS)
