"""Evaluations that wait for a training, and sweeps"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("parent_id", sa.String(), nullable=True))
    op.add_column("jobs", sa.Column("sweep_id", sa.String(), nullable=True))
    op.add_column("jobs", sa.Column("evaluations", sa.JSON(), nullable=True))
    op.create_index("ix_jobs_parent", "jobs", ["parent_id"])
    op.create_index("ix_jobs_sweep", "jobs", ["sweep_id"])
    op.create_table(
        "sweeps",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("project", sa.String(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("name", sa.String(), nullable=True),
        sa.Column("grid", sa.JSON(), nullable=False),
        sa.Column("settings", sa.JSON(), nullable=False),
        sa.Column("sweep_metadata", sa.JSON(), nullable=True),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("ix_sweeps_project_created_at", "sweeps", ["project", "created_at", "id"])


def downgrade() -> None:
    endpoints = sa.table("webhook_endpoints", sa.column("id", sa.String()), sa.column("events", sa.JSON()))
    connection = op.get_bind()
    for endpoint, events in connection.execute(sa.select(endpoints.c.id, endpoints.c.events)).all():
        if "fine_tuning.job.judged" in events:
            known = [event for event in events if event != "fine_tuning.job.judged"]
            change = sa.update(endpoints).where(endpoints.c.id == endpoint)
            connection.execute(change.values(events=known or ["fine_tuning.job.failed"]))
    # The version before would start them before their model is there.
    op.execute("DELETE FROM job_events WHERE job_id IN (SELECT id FROM jobs WHERE parent_id IS NOT NULL)")
    op.execute("DELETE FROM jobs WHERE parent_id IS NOT NULL")
    op.drop_table("sweeps")
    op.drop_index("ix_jobs_sweep", "jobs")
    op.drop_index("ix_jobs_parent", "jobs")
    for column in ("evaluations", "sweep_id", "parent_id"):
        op.drop_column("jobs", column)
