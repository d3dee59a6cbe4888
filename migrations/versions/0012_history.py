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
KEPT = {"sqlite": "events_kept = 1", "postgresql": "events_kept"}
COVERED: list[tuple[str, str, list[str]]] = [
    ("ix_jobs_project_created_at", "jobs", ["project", "created_at", "id"]),
    ("ix_models_project", "models", ["project"]),
    ("ix_webhook_deliveries_endpoint_id", "webhook_deliveries", ["endpoint_id"]),
]
"""Indexes of earlier versions. Each question that they answered is answered by a new one too."""


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
    op.add_column("jobs", sa.Column("events_kept", sa.Boolean(), nullable=False, server_default=sa.true()))
    for name, table, columns in INDEXES:
        op.create_index(name, table, columns)
    for name, table, column, where in PARTIAL_INDEXES:
        op.execute(f"CREATE INDEX {name} ON {table} ({column}) WHERE {where}")
    op.execute(f"CREATE INDEX ix_jobs_unlisted ON jobs (status) WHERE {UNLISTED[dialect]}")
    op.execute(f"CREATE INDEX ix_jobs_events_kept ON jobs (finished_at) WHERE {KEPT[dialect]}")
    for name, table, _ in COVERED:
        op.drop_index(name, table)
    op.execute(f"CREATE INDEX ix_models_foundation ON models ({FOUNDATION[dialect]})")


def downgrade() -> None:
    for name, table, columns in COVERED:
        op.create_index(name, table, columns)
    op.drop_index("ix_models_foundation", "models")
    op.drop_index("ix_jobs_events_kept", "jobs")
    op.drop_index("ix_jobs_unlisted", "jobs")
    for name, table, _, _ in PARTIAL_INDEXES:
        op.drop_index(name, table)
    for name, table, _ in INDEXES:
        op.drop_index(name, table)
    op.drop_column("jobs", "events_kept")
    op.drop_column("jobs", "inputs_listed")
    op.drop_table("chores")
    op.drop_table("job_inputs")
