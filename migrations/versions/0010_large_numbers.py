"""Numbers of events and of sent requests beyond 32 bits: a busy service reaches their end within years"""

from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

NUMBERED = ("job_events", "sent_requests")
"""Tables whose rows are numbered by a column `sequence`. SQLite's numbers have 64 bits already."""


def upgrade() -> None:
    _change("BIGINT")


def downgrade() -> None:
    _change("INTEGER")


def _change(type_name: str) -> None:
    if op.get_bind().dialect.name == "postgresql":
        for table in NUMBERED:
            op.execute(f"ALTER TABLE {table} ALTER COLUMN sequence TYPE {type_name}")
            op.execute(f"ALTER SEQUENCE {table}_sequence_seq AS {type_name}")
