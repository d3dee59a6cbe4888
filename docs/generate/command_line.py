"""The page of the command line, from the commands themselves."""

from collections.abc import Iterator
from typing import Any

import typer.main

from app.cli.main import cli
from docs.generate.markdown import table

INTRODUCTION = """# The command line

Generated from the program. The option `--help` of each command prints the same.

The client's commands talk to the service of `DPO_BASE_URL` with the key of `DPO_API_KEY`. Without them, they talk to
`http://127.0.0.1:8000/v1` with the key in `DPO_HOME/admin.key`. Commands that say "on the service's machine" use its
database and object store directly.

| exit status | meaning |
|---|---|
| 0 | done; a job that is followed has succeeded |
| 1 | failed, or an estimate says that the job would be refused |
| 2 | wrong usage, a refused request, or no service |
| 3 | the job that is followed was cancelled |
| 4 | it has succeeded, and a gate is not met |

A command that prints a result takes `--json`. An argument in brackets may be left out.
"""


def page() -> str:
    """Every command with its arguments and options, as Markdown."""
    root: Any = typer.main.get_command(cli)
    parts = [INTRODUCTION]
    for name, command in root.commands.items():
        if not hasattr(command, "commands"):
            parts += _command(command, ["dpo", name], "##")
            continue
        parts.append(f"## dpo {name}\n\n{command.help}\n")
        for verb, verb_command in command.commands.items():
            parts += _command(verb_command, ["dpo", name, verb], "###")
    return "\n".join(parts)


def _command(command: Any, path: list[str], mark: str) -> Iterator[str]:
    """A command as Markdown, in pieces."""
    context = command.make_context(path[-1], [], resilient_parsing=True)
    usage = [*path, *command.collect_usage_pieces(context)]
    yield f"{mark} {' '.join(path)}\n"
    yield f"```text\n{' '.join(usage)}\n```\n"
    yield f"{command.help}\n"
    records = [parameter.get_help_record(context) for parameter in command.get_params(context)]
    rows = [(f"`{name}`", text) for name, text in filter(None, records) if name != "--help"]
    if rows:
        yield table(("argument or option", "meaning"), rows)
