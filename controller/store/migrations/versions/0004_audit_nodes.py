"""The audit log's tree keeps its inner nodes, so that a proof reads a few of them instead of all records."""

import hashlib

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_ROWS = 1000  # read at a time


def upgrade() -> None:
    """Go forward: make the table, and the nodes of the records that are there (RFC 6962, section 2.1)."""
    table = op.create_table(
        "audit_nodes",
        sa.Column("level", sa.Integer(), nullable=False, autoincrement=False),
        sa.Column("position", sa.BigInteger(), nullable=False, autoincrement=False),
        sa.Column("hash", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("level", "position", name=op.f("pk_audit_nodes")),
    )
    connection = op.get_bind()
    records = sa.table("audit", sa.column("sequence", sa.BigInteger()), sa.column("record", sa.LargeBinary()))
    peaks: list[bytes] = []
    size = 0
    while True:
        query = sa.select(records.c.record).where(records.c.sequence >= size).order_by(records.c.sequence).limit(_ROWS)
        found = connection.execute(query).scalars().all()
        made = []
        for record in found:
            node, level = hashlib.sha256(b"\0" + record).digest(), 0
            while size >> level & 1:
                node = hashlib.sha256(b"\1" + peaks.pop() + node).digest()
                level += 1
                made.append({"level": level, "position": size >> level, "hash": node})
            peaks.append(node)
            size += 1
        if made:
            connection.execute(table.insert(), made)
        if len(found) < _ROWS:
            return
