"""What a node's log was judged to be is kept, so that a poll that brings nothing new compares nothing."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Go forward."""
    op.add_column("states", sa.Column("judgement", sa.Text(), nullable=True))
