"""`dpo secrets`: replace the key of `DPO_SECRET_KEY`."""

import typer

from app.cli.local import local
from app.cli.output import Json, emit

secrets = typer.Typer(help="Replace the key of DPO_SECRET_KEY (on the service's machine).", no_args_is_help=True)


@secrets.command("reseal")
def secrets_reseal(as_json: Json = False) -> None:
    """Seal all secrets under the first key of DPO_SECRET_KEY, once every process has both keys.

    API keys are not secrets that can be read: each moves to the first key when it is used. Leave the old key out of
    DPO_SECRET_KEY when no API key needs it any more.
    """
    from dataclasses import asdict

    from app.secret_rotation import reseal

    services = local()
    outcome = reseal(services.database, services.secret_box)
    text = (
        f"{outcome.webhooks} webhooks and {outcome.evaluations} evaluations, labellings and pipelines sealed anew; "
        f"{outcome.api_keys_left} API keys have not been used since and still need the old key"
    )
    emit(asdict(outcome), as_json, text)


@secrets.command("adopt")
def secrets_adopt(as_json: Json = False) -> None:
    """Take DPO_SECRET_KEY as the key of this installation, after the former one was lost.

    The API keys and webhooks of the former one fail from then on: make new ones.
    """
    from app.secret_rotation import adopt

    services = local(any_key=True)
    adopt(services.database, services.secret_box)
    emit({"adopted": True}, as_json, "The key is that of this installation now.")
