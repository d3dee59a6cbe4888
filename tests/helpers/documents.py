"""The code blocks of the documents, and how each is checked.

`python -m tests.helpers.documents` prints what is run, what is only parsed, and why.

A comment before a block says more about it, and no reader of the page sees it:

- `<!-- no-run: REASON -->`: the block is parsed and not run.
- `<!-- json: KIND -->`: it is the body or the object that `JSON_KINDS` names.
- `<!-- gate: may be missed -->`: the stand-ins of the test may miss a gate that the reader's model meets.
- `<!-- prints: the block before -->`: it is exactly what the shell block before it prints.
- `<!-- file: NAME -->`: the page tells the reader to save it under this name. The blocks after it find it there.
"""

import re
import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md")), *sorted(ROOT.glob("examples/**/*.md"))]
BASES = ("demo-base", "meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B-Instruct")
"""The base models that the pages name. The services of the tests have a tiny model under each of these names."""
SHELLS = {"sh", "bash", "console"}
MARKER = re.compile(r"<!--\s*([\w-]+):\s*(.*?)\s*-->", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    """The number of the line after its opening fence."""
    language: str
    text: str
    markers: dict[str, str]
    heading: str
    """The heading above it."""

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def outcome(self) -> str:
        """`run`, `parsed`, or the reason why it is not run."""
        if self.language in SHELLS | {"python"}:
            return self.markers.get("no-run", "run")
        if "prints" in self.markers:
            return "compared with what the block before prints"
        return "parsed" if self.language else "a drawing"


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page, in order."""
    heading, comment, tokens = "", "", MarkdownIt().parse(page.read_text())
    for number, token in enumerate(tokens):
        if token.type == "heading_open":
            heading = tokens[number + 1].content
        if token.type == "fence":
            assert token.map is not None
            markers = dict(MARKER.findall(comment))
            yield Block(page, token.map[0] + 2, token.info.strip(), token.content, markers, heading)
        comment = comment + token.content if token.type == "html_block" else ""


def without_blocks(text: str) -> str:
    """`text` without its fenced blocks: the sentences, tables and headings of a page."""
    return re.sub(r"^( *)```.*?^\1```", "", text, flags=re.DOTALL | re.MULTILINE)


def shell_lines(block: Block) -> Iterator[str]:
    """The lines of a shell block. Continued lines are joined, and embedded documents are left out."""
    text = re.sub(r"<<'?(\w+)'?.*?^ *\1$", "", block.text, flags=re.DOTALL | re.MULTILINE)
    yield from re.sub(r"\\\n", " ", text).splitlines()


def simple_commands(line: str) -> Iterator[list[str]]:
    """The simple commands of a shell line, without assignments and redirections."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words: list[str] = []
    for token in [*lexer, ";"]:
        if not set(token) <= set("();<>|&"):
            words.append(token)
            continue
        while words and (re.match(r"\w+=", words[0]) or words[0] == "$"):
            words.pop(0)
        if words:
            yield words
        words = ["redirected"] if set(token) & set("<>") else []


if __name__ == "__main__":
    outcomes = Counter(block.outcome for page in PAGES for block in blocks(page))
    for outcome, count in outcomes.most_common():
        print(f"{count:4}  {outcome}")
