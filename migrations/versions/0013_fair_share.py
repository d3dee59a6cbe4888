"""The turns of projects in the queue, limits of waiting jobs and of priorities, and use by month"""

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None

OLD_ORDER: list[str | sa.TextClause] = ["status", "priority", "created_at"]
NEW_ORDER: list[str | sa.TextClause] = ["status", "project", sa.text("priority DESC"), "created_at", "id"]


def upgrade() -> None:
    op.add_column("projects", sa.Column("max_queued_jobs", sa.Integer(), nullable=True, server_default="2000"))
    op.add_column("projects", sa.Column("max_priority", sa.Integer(), nullable=True, server_default="10"))
    op.add_column("projects", sa.Column("weight", sa.Double(), nullable=False, server_default="1"))
    for name in ("recent_seconds", "recent_at", "checked_at"):
        op.add_column("projects", sa.Column(name, sa.Double(), nullable=False, server_default="0"))
    op.add_column("jobs", sa.Column("counted_seconds", sa.Double(), nullable=False, server_default="0"))
    op.create_table(
        "usage",
        sa.Column("project", sa.String(), nullable=False),
        sa.Column("month", sa.String(), nullable=False),
        sa.Column("gpu_seconds", sa.Double(), nullable=False),
        sa.Column("trained_tokens", sa.BigInteger(), nullable=False),
        sa.Column("storage_bytes", sa.BigInteger(), nullable=False),
        sa.Column("storage_byte_hours", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("project", "month"),
    )
    op.create_index("ix_jobs_line", "jobs", NEW_ORDER)
    op.drop_index("ix_jobs_queue", "jobs")


def downgrade() -> None:
    op.create_index("ix_jobs_queue", "jobs", OLD_ORDER)
    op.drop_index("ix_jobs_line", "jobs")
    op.drop_table("usage")
    op.drop_column("jobs", "counted_seconds")
    for name in ("checked_at", "recent_at", "recent_seconds", "weight", "max_priority", "max_queued_jobs"):
        op.drop_column("projects", name)
