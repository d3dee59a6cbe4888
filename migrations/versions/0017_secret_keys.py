"""The key of DPO_SECRET_KEY can be replaced: its fingerprint, and under which key each API key is stored"""

import sqlalchemy as sa
from alembic import op

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("installations", sa.Column("secret_fingerprint", sa.String(), nullable=True))
    op.add_column("api_keys", sa.Column("signed_by", sa.String(), nullable=True))


def downgrade() -> None:
    op.drop_column("api_keys", "signed_by")
    op.drop_column("installations", "secret_fingerprint")
