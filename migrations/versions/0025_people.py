"""The items that labellings give to people, and their verdicts"""

import sqlalchemy as sa
from alembic import op

revision = "0025"
down_revision = "0024"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("awaits", sa.String(), nullable=True))
    op.create_table(
        "label_items",
        sa.Column("labelling_id", sa.String(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("content", sa.JSON(), nullable=False),
        sa.Column("verdicts", sa.Integer(), nullable=False),
        sa.Column("flagged", sa.Boolean(), nullable=False),
        sa.Column("reserved_by", sa.String(), nullable=True),
        sa.Column("reserved_until", sa.Double(), nullable=True),
        sa.ForeignKeyConstraint(["labelling_id"], ["jobs.id"]),
        sa.PrimaryKeyConstraint("labelling_id", "number"),
    )
    op.create_table(
        "label_verdicts",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("labelling_id", sa.String(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("annotator", sa.String(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("ranking", sa.JSON(), nullable=True),
        sa.Column("flag", sa.Text(), nullable=True),
        sa.Column("withdrawn_at", sa.Double(), nullable=True),
        sa.ForeignKeyConstraint(["labelling_id"], ["jobs.id"]),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index(
        "ix_label_verdicts_annotator", "label_verdicts", ["labelling_id", "annotator", "number", "withdrawn_at"]
    )


def downgrade() -> None:
    op.drop_table("label_verdicts")
    op.drop_table("label_items")
    op.drop_column("jobs", "awaits")
