"""The name of the installation, which its object store holds too; the request that created a job"""

import secrets

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    installations = op.create_table(
        "installations", sa.Column("id", sa.String(), nullable=False), sa.PrimaryKeyConstraint("id")
    )
    op.bulk_insert(installations, [{"id": secrets.token_hex(16)}])
    op.add_column("jobs", sa.Column("request_id", sa.String(), nullable=True))
    op.create_index("ix_jobs_finished_at", "jobs", ["finished_at"])


def downgrade() -> None:
    op.drop_index("ix_jobs_finished_at", "jobs")
    op.drop_column("jobs", "request_id")
    op.drop_table("installations")
