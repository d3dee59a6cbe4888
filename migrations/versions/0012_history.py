"""Indexes for queries that went through whole tables, and the inputs of jobs as rows"""

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None

INDEXES: list[tuple[str, str, list[str]]] = [
    ("ix_jobs_kind", "jobs", ["project", "kind", "created_at", "id"]),
    ("ix_jobs_base", "jobs", ["base_model", "status", "finished_at"]),
    ("ix_jobs_history", "jobs", ["history", "finished_at"]),
    ("ix_uploads_status", "uploads", ["status", "expires_at"]),
    ("ix_tasks_finished_at", "tasks", ["kind", "finished_at"]),
    ("ix_webhook_deliveries_created_at", "webhook_deliveries", ["created_at"]),
    ("ix_webhook_deliveries_endpoint", "webhook_deliveries", ["endpoint_id", "created_at", "id"]),
    ("ix_models_project_created_at", "models", ["project", "created_at", "name"]),
]
PARTIAL_INDEXES: list[tuple[str, str, str, str]] = [
    ("ix_jobs_leased", "jobs", "lease_owner", "lease_owner IS NOT NULL"),
    ("ix_jobs_foundation", "jobs", "foundation", "foundation IS NOT NULL"),
    ("ix_tasks_leased", "tasks", "lease_owner", "lease_owner IS NOT NULL"),
    ("ix_webhook_deliveries_leased", "webhook_deliveries", "lease_owner", "lease_owner IS NOT NULL"),
    ("ix_files_expires_at", "files", "expires_at", "deleted_at IS NULL AND expires_at IS NOT NULL"),
    ("ix_files_deleted_at", "files", "deleted_at", "deleted_at IS NOT NULL"),
]
FOUNDATION = {"sqlite": "json_extract(details, '$.foundation')", "postgresql": "(details ->> 'foundation')"}
UNLISTED = {"sqlite": "inputs_listed = 0", "postgresql": "NOT inputs_listed"}


def upgrade() -> None:
    dialect = op.get_bind().dialect.name
    op.create_table(
        "job_inputs",
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("job_id", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"]),
        sa.PrimaryKeyConstraint("name", "job_id"),
    )
    op.create_index("ix_job_inputs_job_id", "job_inputs", ["job_id"])
    op.create_table(
        "chores",
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("due_at", sa.Double(), nullable=False),
        sa.Column("cursor", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("name"),
    )
    op.add_column("jobs", sa.Column("inputs_listed", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("jobs", sa.Column("history", sa.String(), nullable=False, server_default="events"))
    for name, table, columns in INDEXES:
        op.create_index(name, table, columns)
    for name, table, column, where in PARTIAL_INDEXES:
        op.execute(f"CREATE INDEX {name} ON {table} ({column}) WHERE {where}")
    op.execute(f"CREATE INDEX ix_jobs_unlisted ON jobs (status) WHERE {UNLISTED[dialect]}")
    op.execute(f"CREATE INDEX ix_models_foundation ON models ({FOUNDATION[dialect]})")


def downgrade() -> None:
    op.drop_index("ix_models_foundation", "models")
    op.drop_index("ix_jobs_unlisted", "jobs")
    for name, table, _, _ in PARTIAL_INDEXES:
        op.drop_index(name, table)
    for name, table, _ in INDEXES:
        op.drop_index(name, table)
    op.drop_column("jobs", "history")
    op.drop_column("jobs", "inputs_listed")
    op.drop_table("chores")
    op.drop_table("job_inputs")
