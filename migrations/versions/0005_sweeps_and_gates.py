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
        sa.Column("created_at", sa.Double(), nullable=False),
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
            remaining = [event for event in events if event != "fine_tuning.job.judged"]
            change = sa.update(endpoints).where(endpoints.c.id == endpoint)
            connection.execute(change.values(events=remaining or ["fine_tuning.job.failed"]))
    # The older version would start waiting evaluations before their model exists, and cannot read the other ones.
    jobs = sa.table("jobs", *(sa.column(name, sa.String()) for name in ("id", "kind", "parent_id")),
                    sa.column("spec", sa.JSON()))  # fmt: skip
    events = sa.table("job_events", sa.column("job_id", sa.String()))
    rows = connection.execute(sa.select(jobs.c.id, jobs.c.parent_id, jobs.c.spec).where(jobs.c.kind == "evaluation"))
    for job_id, parent, spec in rows.all():
        judge = (spec.get("judge") or {}).get("type")
        if parent or (spec["type"] != "preference" and judge not in ("reward_model", "classifier")):
            connection.execute(sa.delete(events).where(events.c.job_id == job_id))
            connection.execute(sa.delete(jobs).where(jobs.c.id == job_id))
    op.drop_table("sweeps")
    op.drop_index("ix_jobs_sweep", "jobs")
    op.drop_index("ix_jobs_parent", "jobs")
    for column in ("evaluations", "sweep_id", "parent_id"):
        op.drop_column("jobs", column)
