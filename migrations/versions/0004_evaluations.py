"""Evaluations stand in the same queue as trainings"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("kind", sa.String(), nullable=False, server_default="training"))


def downgrade() -> None:
    op.execute("DELETE FROM job_events WHERE job_id IN (SELECT id FROM jobs WHERE kind <> 'training')")
    op.execute("DELETE FROM jobs WHERE kind <> 'training'")
    op.drop_column("jobs", "kind")
