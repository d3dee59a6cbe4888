"""`dpo storage`: the object store of this installation."""

from typing import Annotated

import typer

from app.cli.local import local
from app.cli.output import Json, emit

storage = typer.Typer(help="The object store of this installation (on the service's machine).", no_args_is_help=True)


@storage.command("prune")
def prune(
    delete: Annotated[bool, typer.Option("--delete", help="Remove them; without it they are only counted.")] = False,
    as_json: Json = False,
) -> None:
    """Find objects in the store that no row of the database needs (on the service's machine).

    They are what dead processes left half done, and of finished jobs what only a resume would have read. Look at the
    numbers before you delete: beside a wrong or an empty database no object is needed.
    """
    from app.prune import prune

    needed, spare = prune(local(), delete=delete)
    outcome = "removed" if delete else "not needed; 'dpo storage prune --delete' removes them"
    text = f"{needed} objects needed, {spare} {outcome}"
    emit({"needed": needed, "not_needed": spare, "deleted": delete}, as_json, text)
