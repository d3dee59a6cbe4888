"""The kind of a job: evaluations join the queue of trainings"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("kind", sa.String(), nullable=False, server_default="training"))


def downgrade() -> None:
    endpoints = sa.table("webhook_endpoints", sa.column("id", sa.String()), sa.column("events", sa.JSON()))
    connection = op.get_bind()
    for endpoint, events in connection.execute(sa.select(endpoints.c.id, endpoints.c.events)).all():
        remaining = [event for event in events if not event.startswith("evaluation.")]
        if remaining != events:
            change = sa.update(endpoints).where(endpoints.c.id == endpoint)
            connection.execute(change.values(events=remaining or ["fine_tuning.job.failed"]))
    op.execute("DELETE FROM job_events WHERE job_id IN (SELECT id FROM jobs WHERE kind <> 'training')")
    op.execute("DELETE FROM jobs WHERE kind <> 'training'")
    op.drop_column("jobs", "kind")
