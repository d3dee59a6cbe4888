"""The content of the folders of models and checkpoints, so that nothing can be missing unnoticed"""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for table in ("models", "checkpoints"):
        op.add_column(table, sa.Column("objects", sa.Integer(), nullable=True))
        op.add_column(table, sa.Column("sha256", sa.String(), nullable=True))
    op.add_column("checkpoints", sa.Column("bytes", sa.BigInteger(), nullable=True))
    op.add_column("checkpoints", sa.Column("content_of", sa.String(), nullable=True))


def downgrade() -> None:
    op.drop_column("checkpoints", "content_of")
    op.drop_column("checkpoints", "bytes")
    for table in ("checkpoints", "models"):
        op.drop_column(table, "sha256")
        op.drop_column(table, "objects")
