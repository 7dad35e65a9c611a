"""A node may have an interval of its own."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Go forward."""
    op.add_column("nodes", sa.Column("interval_s", sa.Integer(), nullable=True))
