"""Jobs say which worker ran them last"""

import sqlalchemy as sa
from alembic import op

revision = "0018"
down_revision = "0017"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("worker", sa.String(), nullable=True))


def downgrade() -> None:
    op.drop_column("jobs", "worker")
