"""The whole service: projects, scopes, uploads, idempotency, tasks, webhooks, workers; pauses, deadlines and gates"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "projects",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("max_storage_bytes", sa.BigInteger(), nullable=True),
        sa.Column("max_running_jobs", sa.Integer(), nullable=True),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "sent_requests",
        sa.Column("sequence", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("key_id", sa.String(), nullable=False),
        sa.Column("operation", sa.String(), nullable=False),
        sa.Column("idempotency_key", sa.String(), nullable=True),
        sa.Column("fingerprint", sa.String(), nullable=False),
        sa.Column("resource_id", sa.String(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("sequence"),
        sa.UniqueConstraint("key_id", "operation", "idempotency_key"),
    )
    with op.batch_alter_table("sent_requests") as batch_op:
        batch_op.create_index("ix_sent_requests_created_at", ["created_at"], unique=False)
        batch_op.create_index("ix_sent_requests_fingerprint", ["fingerprint", "created_at"], unique=False)

    op.create_table(
        "tasks",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("subject", sa.String(), nullable=False),
        sa.Column("owner", sa.String(), nullable=False),
        sa.Column("project", sa.String(), nullable=False),
        sa.Column("base_model", sa.String(), nullable=True),
        sa.Column("arguments", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("finished_at", sa.Double(), nullable=True),
        sa.Column("status", sa.String(), nullable=False),
        sa.Column("result", sa.JSON(), nullable=True),
        sa.Column("error", sa.JSON(), nullable=True),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("lease_owner", sa.String(), nullable=True),
        sa.Column("lease_expires_at", sa.Double(), nullable=True),
        sa.Column("eligible_at", sa.Double(), nullable=False),
        sa.Column("lost_attempts", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("kind", "subject"),
    )
    with op.batch_alter_table("tasks") as batch_op:
        batch_op.create_index("ix_tasks_owner", ["owner"], unique=False)
        batch_op.create_index("ix_tasks_queue", ["status", "created_at"], unique=False)

    op.create_table(
        "uploads",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("project", sa.String(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("expires_at", sa.Double(), nullable=False),
        sa.Column("filename", sa.Text(), nullable=False),
        sa.Column("purpose", sa.String(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("status", sa.String(), nullable=False),
        sa.Column("mapping", sa.JSON(), nullable=True),
        sa.Column("expires_after", sa.Integer(), nullable=True),
        sa.Column("file_id", sa.String(), nullable=True),
        sa.PrimaryKeyConstraint("id"),
    )
    with op.batch_alter_table("uploads") as batch_op:
        batch_op.create_index("ix_uploads_project", ["project"], unique=False)

    op.create_table(
        "webhook_endpoints",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("project", sa.String(), nullable=False),
        sa.Column("url", sa.String(), nullable=False),
        sa.Column("events", sa.JSON(), nullable=False),
        sa.Column("sealed_secret", sa.String(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("disabled_at", sa.Double(), nullable=True),
        sa.Column("disabled_reason", sa.String(), nullable=True),
        sa.PrimaryKeyConstraint("id"),
    )
    with op.batch_alter_table("webhook_endpoints") as batch_op:
        batch_op.create_index("ix_webhook_endpoints_project", ["project"], unique=False)

    op.create_table(
        "workers",
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("lane", sa.String(), nullable=False),
        sa.Column("seen_at", sa.Double(), nullable=False),
        sa.Column("serves", sa.JSON(), nullable=False),
        sa.Column("details", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("name"),
    )
    op.create_table(
        "upload_parts",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("upload_id", sa.String(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["upload_id"],
            ["uploads.id"],
        ),
        sa.PrimaryKeyConstraint("id"),
    )
    with op.batch_alter_table("upload_parts") as batch_op:
        batch_op.create_index("ix_upload_parts_upload_id", ["upload_id"], unique=False)

    op.create_table(
        "webhook_deliveries",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("endpoint_id", sa.String(), nullable=False),
        sa.Column("event_id", sa.String(), nullable=False),
        sa.Column("type", sa.String(), nullable=False),
        sa.Column("body", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("next_attempt_at", sa.Double(), nullable=True),
        sa.Column("delivered_at", sa.Double(), nullable=True),
        sa.Column("log", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(["endpoint_id"], ["webhook_endpoints.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id"),
    )
    with op.batch_alter_table("webhook_deliveries") as batch_op:
        batch_op.create_index("ix_webhook_deliveries_due", ["next_attempt_at"], unique=False)
        batch_op.create_index("ix_webhook_deliveries_endpoint_id", ["endpoint_id"], unique=False)

    with op.batch_alter_table("api_keys") as batch_op:
        batch_op.add_column(sa.Column("scopes", sa.JSON(), nullable=False, server_default='["read", "write"]'))
        batch_op.add_column(sa.Column("last_used_at", sa.Double(), nullable=True))
        batch_op.add_column(sa.Column("revoked_at", sa.Double(), nullable=True))

    with op.batch_alter_table("files") as batch_op:
        batch_op.add_column(sa.Column("mapping", sa.JSON(), nullable=True))
        batch_op.add_column(sa.Column("expires_at", sa.Double(), nullable=True))
        batch_op.drop_index("ix_files_project")
        batch_op.create_index("ix_files_project_created_at", ["project", "created_at", "id"], unique=False)

    with op.batch_alter_table("jobs") as batch_op:
        batch_op.add_column(sa.Column("timeout_seconds", sa.Integer(), nullable=True))
        batch_op.add_column(sa.Column("paused", sa.Boolean(), nullable=False, server_default=sa.false()))
        batch_op.add_column(sa.Column("gates", sa.JSON(), nullable=True))
        batch_op.add_column(sa.Column("started_at", sa.Double(), nullable=True))
        batch_op.add_column(sa.Column("ran_seconds", sa.Double(), nullable=False, server_default="0"))
        batch_op.add_column(sa.Column("estimated_seconds", sa.Double(), nullable=True))
        batch_op.add_column(sa.Column("pace", sa.JSON(), nullable=True))
        batch_op.drop_index("ix_jobs_project")
        batch_op.create_index("ix_jobs_project_created_at", ["project", "created_at", "id"], unique=False)

    with op.batch_alter_table("models") as batch_op:
        batch_op.add_column(sa.Column("bytes", sa.BigInteger(), nullable=False, server_default="0"))

    op.execute("INSERT INTO projects (id, created_at) VALUES ('default', 0)")
    op.execute(
        "INSERT INTO projects (id, created_at) SELECT DISTINCT project, 0.0 FROM api_keys WHERE project <> 'default'"
    )


def downgrade() -> None:
    with op.batch_alter_table("models") as batch_op:
        batch_op.drop_column("bytes")

    with op.batch_alter_table("jobs") as batch_op:
        batch_op.drop_index("ix_jobs_project_created_at")
        batch_op.create_index("ix_jobs_project", ["project"], unique=False)
        batch_op.drop_column("pace")
        batch_op.drop_column("estimated_seconds")
        batch_op.drop_column("ran_seconds")
        batch_op.drop_column("started_at")
        batch_op.drop_column("gates")
        batch_op.drop_column("paused")
        batch_op.drop_column("timeout_seconds")

    with op.batch_alter_table("files") as batch_op:
        batch_op.drop_index("ix_files_project_created_at")
        batch_op.create_index("ix_files_project", ["project"], unique=False)
        batch_op.drop_column("expires_at")
        batch_op.drop_column("mapping")

    with op.batch_alter_table("api_keys") as batch_op:
        batch_op.drop_column("revoked_at")
        batch_op.drop_column("last_used_at")
        batch_op.drop_column("scopes")

    with op.batch_alter_table("webhook_deliveries") as batch_op:
        batch_op.drop_index("ix_webhook_deliveries_endpoint_id")
        batch_op.drop_index("ix_webhook_deliveries_due")

    op.drop_table("webhook_deliveries")
    with op.batch_alter_table("upload_parts") as batch_op:
        batch_op.drop_index("ix_upload_parts_upload_id")

    op.drop_table("upload_parts")
    op.drop_table("workers")
    with op.batch_alter_table("webhook_endpoints") as batch_op:
        batch_op.drop_index("ix_webhook_endpoints_project")

    op.drop_table("webhook_endpoints")
    with op.batch_alter_table("uploads") as batch_op:
        batch_op.drop_index("ix_uploads_project")

    op.drop_table("uploads")
    with op.batch_alter_table("tasks") as batch_op:
        batch_op.drop_index("ix_tasks_queue")
        batch_op.drop_index("ix_tasks_owner")

    op.drop_table("tasks")
    with op.batch_alter_table("sent_requests") as batch_op:
        batch_op.drop_index("ix_sent_requests_fingerprint")
        batch_op.drop_index("ix_sent_requests_created_at")

    op.drop_table("sent_requests")
    op.drop_table("projects")
