"""Reservations of storage, so that parallel uploads cannot exceed a project's limit together"""

import sqlalchemy as sa
from alembic import op

revision = "0022"
down_revision = "0021"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "storage_reservations",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("project", sa.String(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("expires_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("ix_storage_reservations_project", "storage_reservations", ["project"])
    op.create_index("ix_storage_reservations_expires_at", "storage_reservations", ["expires_at"])
    op.add_column("upload_parts", sa.Column("stored", sa.Boolean(), nullable=False, server_default=sa.true()))


def downgrade() -> None:
    op.drop_column("upload_parts", "stored")
    op.drop_table("storage_reservations")
