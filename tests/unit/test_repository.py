"""Rules for the whole repository: imports of the tests, links of the documents, the list of variables."""

import ast
import re
from pathlib import Path

from tests.helpers.documents import PAGES, ROOT, without_blocks

LINK = re.compile(r"(?<!`)\[[^\]\n]*\]\(([^)\s]+)\)")


def test_no_module_imports_a_test_module() -> None:
    """Helpers that several test modules share belong in tests/helpers."""
    offenders = []
    for path in ROOT.glob("tests/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                imported = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
            offenders += [
                f"{path.relative_to(ROOT)}: {name}"
                for name in imported
                if name.startswith("tests.") and re.match(r"test_|conftest", name.rpartition(".")[2])
                and not name.startswith("tests.helpers.")
            ]  # fmt: skip
    assert offenders == []


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", without_blocks(page.read_text()), flags=re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)).strip().lower().replace(" ", "-")
        for heading in headings
    }


def test_no_link_in_the_documents_is_broken() -> None:
    broken = []
    for page in PAGES:
        for target in LINK.findall(without_blocks(page.read_text())):
            if re.match(r"[a-z]+:", target):
                continue
            file, _, anchor = target.partition("#")
            linked = (page.parent / file).resolve() if file else page
            if not linked.exists() or (anchor and linked.suffix == ".md" and anchor not in anchors(linked)):
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert broken == []


def test_every_page_is_in_the_index() -> None:
    index = ROOT / "docs" / "index.md"
    linked = {(index.parent / target.partition("#")[0]).resolve() for target in LINK.findall(index.read_text())}
    pages = set(ROOT.glob("docs/**/*.md")) - {index} - set(ROOT.glob("docs/decisions/[0-9]*.md"))
    assert sorted(str(page.relative_to(ROOT)) for page in pages - linked) == []
    decisions = ROOT / "docs" / "decisions"
    listed = set(LINK.findall((decisions / "README.md").read_text()))
    assert {page.name for page in decisions.glob("[0-9]*.md")} <= listed


def test_every_program_is_started_without_the_callers_folder_on_its_path() -> None:
    """`app/programs.py` makes the commands. The fork server, which knows nothing of it, says `-P` itself."""
    starting = [
        path.relative_to(ROOT).as_posix()
        for folder in ("app", "worker")
        for path in (ROOT / folder).rglob("*.py")
        if '"-m"' in path.read_text().replace('"-P", "-m"', "")
    ]
    assert starting == []
