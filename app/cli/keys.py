"""`dpo keys`: API keys of this installation."""

from typing import Annotated

import typer

from app.cli.local import local
from app.cli.output import Json, emit, emit_table
from app.keys.schemas import KeySpec, Scope

keys = typer.Typer(help="API keys of this installation (on the service's machine).", no_args_is_help=True)


@keys.command("create")
def keys_create(
    name: Annotated[str, typer.Option(help="The purpose of the key.")],
    project: Annotated[str, typer.Option(help="The project whose data the key reaches.")] = "default",
    scope: Annotated[list[Scope] | None, typer.Option(help="label, read, write (the default) or admin.")] = None,
    expires_in_days: Annotated[float | None, typer.Option(min=0, help="Days until it expires; default: never.")] = None,
    as_json: Json = False,
) -> None:
    """Make an API key and print it. The secret is not stored and cannot be shown again."""
    seconds = None if expires_in_days is None else max(1, round(expires_in_days * 86400))
    scopes = scope or [Scope.READ, Scope.WRITE]
    key = local().keys.create(KeySpec(name=name, project=project, scopes=scopes, expires_in=seconds))
    emit(key.model_dump(), as_json, key.key)


@keys.command("list")
def keys_list(
    project: Annotated[str | None, typer.Option(help="Only the keys of this project.")] = None, as_json: Json = False
) -> None:
    """All keys, oldest first. The secrets themselves are not stored."""
    rows = [key.model_dump(mode="json") for key in local().keys.list(project)]
    emit_table(rows, ["id", "name", "project", "scopes", "expires_at", "last_used_at", "revoked_at"], as_json)


@keys.command("revoke")
def keys_revoke(key_id: str, as_json: Json = False) -> None:
    """Refuse a key from now on."""
    key = local().keys.revoke(key_id)
    emit(key.model_dump(mode="json"), as_json, f"{key.id} ({key.name}): revoked")
