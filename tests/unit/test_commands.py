"""Every command that the program prints or that a document shows is parsed by its own parser.

vLLM needs a GPU. So `tests/data/vllm-serve-options.json` has the options that the parser of vLLM 0.33.0 knows, with the
number of their values and the values that they take.
"""

import argparse
import ast
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from app.cli.jobs import VLLM_RANKS, next_steps
from app.cli.main import cli
from tests.helpers.documents import PAGES, SHELLS, blocks, shell_lines, simple_commands, without_blocks

ROOT = Path(__file__).parents[2]
SOURCES = [*ROOT.glob("app/**/*.py"), *ROOT.glob("worker/**/*.py"), *ROOT.glob("demo/**/*.py")]
TEMPLATES = list(ROOT.glob("app/**/*.html"))
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
DPO: Any = typer.main.get_command(cli)
VLLM_OPTIONS = json.loads((ROOT / "tests" / "data" / "vllm-serve-options.json").read_text())


class Refused(Exception):
    """The parser refuses a command."""


def parse_dpo(words: list[str], *, whole: bool = True) -> None:
    """Parse the arguments of `dpo`. If they are not `whole`, arguments may be missing, as in the name of a command."""
    command, words = DPO, list(words)
    while words and hasattr(command, "commands"):
        name = words.pop(0)
        if name not in command.commands and name != "--help":
            raise Refused(f"no command '{name}'")
        command = command.commands.get(name)
    if command is None or "--help" in words or (not whole and not words):
        return
    if hasattr(command, "commands"):
        raise Refused("the command is missing")
    parser = command.make_parser(command.context_class(command))
    try:
        values, rest, _ = parser.parse_args(words)
    except Exception as error:
        if not whole and re.search(r"[Mm]issing|requires an argument", str(error)):
            return
        raise Refused(str(error)) from error
    if rest:
        raise Refused(f"not understood: {rest}")
    missing = [param.name for param in command.params if param.required and values.get(param.name) is None]
    if whole and missing:
        raise Refused(f"missing: {missing}")


def parse_vllm(words: list[str]) -> None:
    """Parse the arguments of `vllm`."""

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> Any:
            raise Refused(message)

    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("command", choices=["serve"])
    parser.add_argument("model")
    for option, takes in VLLM_OPTIONS.items():
        if takes["nargs"] == 0:
            parser.add_argument(option, action="store_true")
        else:
            parser.add_argument(option, nargs=takes["nargs"], choices=takes["choices"])
    parser.parse_args(words)


def parse_make(words: list[str]) -> None:
    """Check that the Makefile has the targets."""
    for word in words:
        if "=" not in word and not word.startswith("-") and word not in TARGETS:
            raise Refused(f"no target '{word}'")


PARSERS = {"dpo": parse_dpo, "vllm": parse_vllm, "make": parse_make}


def ours(words: list[str]) -> list[str]:
    """The part of a simple command that one of our parsers understands, such as what follows `docker compose exec`."""
    for number, word in enumerate(words):
        follows = words[number + 1] if number + 1 < len(words) else ""
        if word in PARSERS and (number == 0 or (word == "dpo" and follows in DPO.commands)):
            return words[number:]
    return []


def test_every_command_in_a_shell_block_of_a_document_is_understood() -> None:
    problems, seen = [], set()
    for block in (block for page in PAGES for block in blocks(page) if block.language in SHELLS):
        for line in shell_lines(block):
            try:
                commands = list(simple_commands(line))
            except ValueError:  # a quoted text goes on in the next line, so it is no command of ours
                assert "dpo " not in line and "vllm " not in line, f"{block.place}: {line}"
                continue
            for words in map(ours, commands):
                if words:
                    seen.add(words[0])
                    try:
                        PARSERS[words[0]](words[1:])
                    except Refused as refused:
                        problems.append(f"{block.place}: {line.strip()}: {refused}")
    assert problems == [] and seen == set(PARSERS)


MENTION = re.compile(r"(?:`|<code>|')dpo ([^`<\n]*?)(?:`|</code>|')|(?:: +|; +)dpo ([^;\n]*)")
"""A command in a sentence: in quotes, or after a colon or a semicolon."""


def mentions(text: str) -> Iterator[list[str]]:
    for quoted, listed in MENTION.findall(text):
        words = re.sub(r"…|\[.*?\]", "", quoted or listed)
        yield shlex.split(words.replace("'", "") if words.count("'") % 2 else words)


def texts(source: Path) -> Iterator[str]:
    """The strings of a module, with `X` for what is filled in; for another file, its whole text."""
    if source.suffix != ".py":
        yield without_blocks(source.read_text())
        return
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "X" for part in node.values)


def test_every_command_that_a_sentence_names_exists() -> None:
    """In documents, in messages and comments of the program, and on the dashboard."""
    problems, count = [], 0
    current = [document for document in PAGES if document.name != "CHANGELOG.md"]  # it names removed commands
    for source in [*current, *SOURCES, *TEMPLATES]:
        for text in texts(source):
            for words in mentions(text):
                count += 1
                try:
                    parse_dpo(words, whole=False)
                except Refused as refused:
                    problems.append(f"{source.relative_to(ROOT)}: dpo {' '.join(words)}: {refused}")
    assert problems == [] and count > 100


NAMES = ["ft:tiny:default::a1b2c3d4", "ft:org/base model:default:it's:a1b2c3d4"]
PLAIN: dict[str, object] = {"r": 16, "use_dora": False}
ADAPTERS: list[object] = ["none", PLAIN | {"use_dora": True}, PLAIN | {"modules_to_save": ["lm_head"]}]
ADAPTERS += [PLAIN | {"r": rank} for rank in (1, 17, 100, 512, 513, 1024)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("loss", ["sigmoid", "reward_model"])
@pytest.mark.parametrize("adapter", ADAPTERS, ids=str)
def test_the_commands_after_a_job_are_understood(name: str, loss: str, adapter: object) -> None:
    method = {"type": "dpo", "dpo": {"hyperparameters": {"loss": loss}}}
    job = {"model": name.split(":")[1], "fine_tuned_model": name, "method": method, "adapter": adapter}
    lines = next_steps(job).splitlines()
    commands = {label: text.strip() for label, _, text in (line.partition(":  ") for line in lines) if text}
    download = shlex.split(commands["download it"])
    assert download[:4] == ["dpo", "models", "download", name]
    parse_dpo(download[1:])
    if commands["serve it"].startswith("vllm"):
        parse_vllm(shlex.split(commands["serve it"])[1:])
    else:
        assert commands["serve it"].startswith("merge it first")
    python = lines.index(next(line for line in lines if line.startswith("load it in Python")))
    ast.parse("\n".join(line.partition(":  ")[2].strip() or line.strip() for line in lines[python : python + 2]))


def test_the_ranks_are_those_that_vllm_takes() -> None:
    assert {str(rank) for rank in VLLM_RANKS} == set(VLLM_OPTIONS["--max-lora-rank"]["choices"]) - {"1", "8"}
    assert min(VLLM_RANKS) == 16, "its default: no option is needed below"
