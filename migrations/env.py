"""Alembic's environment. It always runs on the connection that `app.migrate.migrate` passes."""

from alembic import context
from sqlalchemy import Connection

from app import chores as _chores  # noqa: F401
from app import counted_objects as _counted_objects  # noqa: F401 - each import registers its tables
from app import installation as _installation  # noqa: F401
from app.audit import tables as _audit  # noqa: F401
from app.database import Table
from app.derived_artifacts import tables as _tasks  # noqa: F401
from app.files import tables as _files  # noqa: F401
from app.idempotency import tables as _idempotency  # noqa: F401
from app.jobs import tables as _jobs  # noqa: F401
from app.keys import tables as _keys  # noqa: F401
from app.labellings import tables as _labellings  # noqa: F401
from app.models import tables as _models  # noqa: F401
from app.pipelines import tables as _pipelines  # noqa: F401
from app.projects import tables as _projects  # noqa: F401
from app.sweeps import tables as _sweeps  # noqa: F401
from app.uploads import tables as _uploads  # noqa: F401
from app.usage import tables as _usage  # noqa: F401
from app.webhooks import tables as _webhooks  # noqa: F401
from app.workers import tables as _workers  # noqa: F401

connection: Connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=Table.metadata, render_as_batch=True, compare_type=True)
with context.begin_transaction():
    context.run_migrations()
