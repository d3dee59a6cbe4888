"""The pairs of jobs' metadata as rows, so that lists by metadata have an index"""

import sqlalchemy as sa
from alembic import op

revision = "0021"
down_revision = "0020"
branch_labels = None
depends_on = None

UNLABELLED = {"sqlite": "labelled = 0", "postgresql": "NOT labelled"}


def upgrade() -> None:
    op.create_table(
        "job_labels",
        sa.Column("job_id", sa.String(), nullable=False),
        sa.Column("pair", sa.String(), nullable=False),
        sa.Column("project", sa.String(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"]),
        sa.PrimaryKeyConstraint("job_id", "pair"),
    )
    op.create_index("ix_job_labels_pair", "job_labels", ["project", "kind", "pair", "created_at", "job_id"])
    op.add_column("jobs", sa.Column("labelled", sa.Boolean(), nullable=False, server_default=sa.false()))
    where = UNLABELLED[op.get_bind().dialect.name]
    op.execute(f"CREATE INDEX ix_jobs_unlabelled ON jobs (project, kind, created_at, id) WHERE {where}")


def downgrade() -> None:
    op.drop_index("ix_jobs_unlabelled", "jobs")
    op.drop_column("jobs", "labelled")
    op.drop_table("job_labels")
