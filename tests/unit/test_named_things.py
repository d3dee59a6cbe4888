"""Variables, series, metrics, routes and files that the documents name exist."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from app.keys.access import AccessTable
from app.main import create_app
from app.settings import Settings
from app.spec.activities import Activity
from app.spec.metrics import BEST_OF, ENDPOINT, EVALUATION, METRICS, STEPS
from docs.generate.settings import GROUPS, variable
from tests.helpers.documents import PAGES, ROOT, without_blocks

CURRENT = [page for page in PAGES if page.name != "CHANGELOG.md" and "decisions" not in page.parts]
"""The pages that say what is true now. The others also name what is gone."""
OTHER_VARIABLES = {"DPO_BASE_URL", "DPO_API_KEY", "DPO_JUDGE_API_KEY"}
"""Variables of the command-line client."""
OF_TESTS = {"DPO_SHARED", "DPO_STATE_MACHINE_STEPS"}
OF_COMPOSE = {"DPO_SITE"}
OF_READERS = {"DPO_SERVICE"}
"""A variable of the reader's own CI, in the page about it."""
OF_TOGETHER = {"dpo_beta", "dpo_normalize_logratios_by_length"}
OF_BENCHES = {"bench/results/gpu.json", "bench/.sentiment"}
"""A bench leaves these where it runs."""
PLACEHOLDER = re.compile("NAME|FEATURE|NNNN")


def spans(page: Path) -> Iterator[str]:
    """The code spans of a page, without its blocks."""
    yield from re.findall(r"`([^`\n]+)`", without_blocks(page.read_text()))


def named(pattern: str) -> list[tuple[str, str]]:
    """(page, what the first group of `pattern` finds) in the code spans of all pages."""
    return [
        (page.relative_to(ROOT).as_posix(), found) for page in CURRENT for span in spans(page)
        for found in re.findall(pattern, span)
    ]  # fmt: skip


def test_every_named_variable_exists() -> None:
    known = {variable(name) for names in GROUPS.values() for name in names} | OTHER_VARIABLES | OF_TESTS | OF_COMPOSE
    known |= OF_READERS
    found = named(r"\b(DPO_[A-Z][A-Z_]*[A-Z])\b(?!…)")
    assert len(found) > 100 and [(page, name) for page, name in found if name not in known] == []


def test_every_named_series_exists() -> None:
    known = set(re.findall(r"^\| `(dpo_\w+)`", (ROOT / "docs/reference/series.md").read_text(), flags=re.MULTILINE))
    found = named(r"(?:^|[^\w])(dpo_[a-z_]*[a-z])(?![a-z_]*…|\w)")
    assert len(found) > 15 and [(page, name) for page, name in found if name not in known | OF_TOGETHER] == []


def test_every_named_metric_of_a_training_exists() -> None:
    known = {*METRICS, *STEPS, *EVALUATION, *ENDPOINT, *BEST_OF}
    found = named(r"^((?:eval/)?(?:rewards|logps|logratios)/[a-z_]+|eval/[a-z_/]+)$")
    assert len(found) > 30 and [(page, name) for page, name in found if name not in known] == []


def test_every_activity_of_a_job_is_named() -> None:
    (row,) = re.findall(r"^\| `progress\.activity` \|.*$", (ROOT / "docs/jobs.md").read_text(), flags=re.MULTILINE)
    assert set(get_args(Activity)) <= set(re.findall(r"`(\w+)`", row))


@pytest.fixture(scope="module")
def routes(tmp_path_factory: pytest.TempPathFactory) -> AccessTable:
    table: AccessTable = create_app(Settings(home=tmp_path_factory.mktemp("home"))).state.routes
    return table


def test_every_named_route_exists(routes: AccessTable) -> None:
    found = named(r"^((?:GET|POST|DELETE|HEAD) /[^\s…?\[]*)(?:[?\[].*)?$")
    problems = []
    for page, route in found:
        method, path = route.split()
        if method not in routes.methods(re.sub(r"\{.*?\}", "x", path)):
            problems.append((page, route))
    assert len(found) > 50 and problems == []


def test_every_named_file_of_the_repository_exists() -> None:
    found = named(r"^((?:app|worker|tests|bench|migrations|docs|demo|examples)/[\w./-]*)$")
    files = [(page, name) for page, name in found if not PLACEHOLDER.search(name)]
    assert (
        len(files) > 100
        and [(page, name) for page, name in files if not (ROOT / name).exists() and name not in OF_BENCHES] == []
    )
