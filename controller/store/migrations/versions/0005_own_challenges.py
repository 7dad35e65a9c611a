"""A challenge that a node has asked for under its own certificate is told from those that anybody may have asked for."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Go forward."""
    op.add_column("challenges", sa.Column("own", sa.Boolean(), nullable=False, server_default=sa.false()))
