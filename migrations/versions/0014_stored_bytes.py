"""Checkpoints and cached objects count as what a project stores, and old checkpoints are found by their age"""

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "cached_objects",
        sa.Column("key", sa.String(), nullable=False),
        sa.Column("project", sa.String(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("key"),
    )
    op.create_index("ix_cached_objects_project", "cached_objects", ["project"])
    op.add_column("checkpoints", sa.Column("project", sa.String(), nullable=True))
    op.add_column("checkpoints", sa.Column("state_bytes", sa.BigInteger(), nullable=False, server_default="0"))
    op.execute("UPDATE checkpoints SET project = (SELECT project FROM jobs WHERE jobs.id = checkpoints.job_id)")
    op.create_index("ix_checkpoints_project", "checkpoints", ["project"])
    op.create_index("ix_checkpoints_created_at", "checkpoints", ["created_at", "id"])


def downgrade() -> None:
    op.drop_index("ix_checkpoints_created_at", "checkpoints")
    op.drop_index("ix_checkpoints_project", "checkpoints")
    op.drop_column("checkpoints", "state_bytes")
    op.drop_column("checkpoints", "project")
    op.drop_index("ix_cached_objects_project", "cached_objects")
    op.drop_table("cached_objects")
