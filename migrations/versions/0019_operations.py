"""An operator stops the claims of one worker or of all, or all writes"""

import sqlalchemy as sa
from alembic import op

revision = "0019"
down_revision = "0018"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("workers", sa.Column("cordoned", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("installations", sa.Column("claims_paused", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("installations", sa.Column("read_only", sa.String(), nullable=True))


def downgrade() -> None:
    op.drop_column("installations", "read_only")
    op.drop_column("installations", "claims_paused")
    op.drop_column("workers", "cordoned")
