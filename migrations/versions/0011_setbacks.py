"""Attempts that a fault of the object store, a disk or the database has ended: they are not lost attempts"""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

QUEUES = ("jobs", "tasks", "webhook_deliveries")


def upgrade() -> None:
    for table in QUEUES:
        op.add_column(table, sa.Column("setbacks", sa.Integer(), nullable=False, server_default="0"))


def downgrade() -> None:
    for table in QUEUES:
        op.drop_column(table, "setbacks")
