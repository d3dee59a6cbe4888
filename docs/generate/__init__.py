"""Writes into the docs what the code knows: `python -m docs.generate`. A test fails where a page differs.

- `PAGES` are whole pages.
- `PARTS` are tables in written pages, between `<!-- from: NAME -->` and `<!-- /from -->`.
- `NUMBERS` are numbers in the sentences and tables of written pages.
"""

import re
from collections.abc import Callable
from pathlib import Path

from docs.generate import api, command_line, errors, figures, formats, gpus, registries, series, settings
from docs.generate.numbers import NUMBERS
from tests.helpers import documents
from tests.helpers.documents import ROOT

DOCS = ROOT / "docs"
PAGES: dict[str, Callable[[], str]] = {
    "reference/api.md": api.page,
    "reference/command-line.md": command_line.page,
    "reference/errors.md": errors.page,
    "reference/gpus.md": gpus.page,
    "reference/losses.md": registries.losses,
    "reference/metrics.md": registries.metrics,
    "reference/series.md": series.page,
}
"""The pages that are generated as a whole, by their place under docs/."""
PARTS: dict[str, Callable[[], str]] = {
    **settings.PARTS,
    **registries.PARTS,
    **figures.PARTS,
    **formats.PARTS,
}
PART = re.compile(r"(<!-- from: ([\w ,./-]+) -->\n).*?(<!-- /from -->)", re.DOTALL)


def written_pages() -> list[Path]:
    """The pages that people write, which have generated parts and numbers."""
    generated = {DOCS / name for name in PAGES}
    return [page for page in documents.PAGES if page not in generated]


def up_to_date(page: Path) -> str:
    """The text of a written page, with its parts and numbers as they should be.

    Raises `ValueError` for a number whose sentence is gone.
    """
    text = PART.sub(lambda part: f"{part[1]}{PARTS[part[2]]()}{part[3]}", page.read_text())
    for pattern, number in NUMBERS.get(page.relative_to(ROOT).as_posix(), {}).items():
        found = re.search(pattern, text)
        if found is None:
            raise ValueError(f"{page}: there is no text like {pattern!r}. Correct docs/generate/numbers.py.")
        text = f"{text[: found.start(1)]}{number()}{text[found.end(1) :]}"
    return text
