"""`dpo storage`: the object store of this installation."""

from typing import Annotated

import typer

from app.cli.local import local
from app.cli.output import Json, emit

storage = typer.Typer(help="The object store of this installation (on the service's machine).", no_args_is_help=True)


@storage.command("prune")
def prune(
    delete: Annotated[bool, typer.Option("--delete", help="Delete the objects. Without it, only count them.")] = False,
    as_json: Json = False,
) -> None:
    """Find objects in the store that no row of the database needs (on the service's machine).

    Dead processes leave half-finished work. Finished jobs leave data that only a resume would have read. Look at the
    numbers before you delete: a wrong or empty database needs no object.
    """
    from app.prune import prune

    needed, unneeded = prune(local(), delete=delete)
    outcome = "removed" if delete else "not needed; 'dpo storage prune --delete' removes them"
    text = f"{needed} objects needed, {unneeded} {outcome}"
    emit({"needed": needed, "not_needed": unneeded, "deleted": delete}, as_json, text)
