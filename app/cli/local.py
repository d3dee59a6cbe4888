"""This machine's installation, which some commands use without HTTP.

The database's libraries are imported only by those commands: they would double the start of all others.
"""

import getpass
import os
import sys
from typing import TYPE_CHECKING

from app.private_files import keep_private
from app.settings import Settings

if TYPE_CHECKING:
    from app.services import Services


def local(*, any_key: bool = False) -> "Services":
    """This machine's installation. Its database is migrated to this version's schema first.

    The command goes to the audit log. With `any_key`, `DPO_SECRET_KEY` need not be the installation's.
    """
    from app.migrate import migrate
    from app.secret_rotation import require_known_key
    from app.services import Services

    settings = Settings()
    keep_private(settings.home)
    services = Services.of(settings)
    migrate(services.database)
    if not any_key:
        require_known_key(services.database, services.secret_box)
    command = " ".join(["dpo", *sys.argv[1:]])
    services.audit.record(actor=f"cli:{_user()}", action=" ".join(command.split()[:3]), subject=command)
    return services


def _user() -> str:
    """The name of the user who runs the command; the number of one without a name, as in some containers."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def migrate_database(settings: Settings, revision: str = "head") -> None:
    """Migrate the database of `settings` to the schema of `revision`."""
    from app.migrate import migrate
    from app.services import Services

    keep_private(settings.home)
    migrate(Services.of(settings).database, revision)
