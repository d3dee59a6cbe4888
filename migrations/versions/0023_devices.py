"""The devices that a job asks for and takes, and the worker that keeps devices free for it"""

import sqlalchemy as sa
from alembic import op

revision = "0023"
down_revision = "0022"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("least_devices", sa.Integer(), nullable=False, server_default="1"))
    op.add_column("jobs", sa.Column("most_devices", sa.Integer(), nullable=False, server_default="1"))
    op.add_column("jobs", sa.Column("devices", sa.Integer(), nullable=True))
    op.add_column("jobs", sa.Column("reserved_by", sa.String(), nullable=True))
    op.add_column("jobs", sa.Column("reserved_until", sa.Double(), nullable=True))


def downgrade() -> None:
    for name in ("reserved_until", "reserved_by", "devices", "most_devices", "least_devices"):
        op.drop_column("jobs", name)
