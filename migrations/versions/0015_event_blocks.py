"""The events of ended jobs go to compressed blocks"""

import json
import zlib

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None

FIELDS = ("sequence", "id", "created_at", "level", "type", "message", "data")
BLOCKS = sa.table(
    "event_blocks", sa.column("job_id"), sa.column("first_sequence"), sa.column("content", sa.LargeBinary)
)
EVENTS = sa.table("job_events", sa.column("job_id"), *map(sa.column, FIELDS[:-1]), sa.column("data", sa.JSON))
UNPACKED = {"sqlite": "events_packed = 0", "postgresql": "NOT events_packed"}


def upgrade() -> None:
    op.create_table(
        "event_blocks",
        sa.Column("job_id", sa.String(), nullable=False),
        sa.Column("first_sequence", sa.BigInteger(), nullable=False),
        sa.Column("last_sequence", sa.BigInteger(), nullable=False),
        sa.Column("ids", sa.Text(), nullable=False),
        sa.Column("content", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"]),
        sa.PrimaryKeyConstraint("job_id", "first_sequence"),
    )
    if op.get_bind().dialect.name == "sqlite":  # numbers of packed events must not be given to new ones
        with op.batch_alter_table("job_events", recreate="always", table_kwargs={"sqlite_autoincrement": True}):
            pass
    op.add_column("jobs", sa.Column("events_packed", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.execute(f"CREATE INDEX ix_jobs_unpacked ON jobs (finished_at) WHERE {UNPACKED[op.get_bind().dialect.name]}")


def downgrade() -> None:
    connection = op.get_bind()
    for job_id, first in connection.execute(sa.select(BLOCKS.c.job_id, BLOCKS.c.first_sequence)).all():
        is_block = (BLOCKS.c.job_id == job_id, BLOCKS.c.first_sequence == first)
        packed = connection.execute(sa.select(BLOCKS.c.content).where(*is_block)).scalar_one()
        events = json.loads(zlib.decompress(packed))
        rows = [dict(zip(FIELDS, values, strict=True)) | {"job_id": job_id} for values in events]
        if rows:
            connection.execute(sa.insert(EVENTS), rows)
    op.drop_index("ix_jobs_unpacked", "jobs")
    op.drop_column("jobs", "events_packed")
    op.drop_table("event_blocks")
