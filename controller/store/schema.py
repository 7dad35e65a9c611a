"""The tables. Times are microseconds since the Unix epoch; documents are JSON as text or bytes; digests are lower-case hex.

What changes with every poll stands in narrow rows of its own (``polls``, ``states``), so that a steady fleet writes little.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    false,
)

__all__ = [
    "admins",
    "audit",
    "audit_head",
    "audit_nodes",
    "challenges",
    "deliveries",
    "enrolments",
    "events",
    "groups",
    "hooks",
    "logs",
    "metadata",
    "nodes",
    "polls",
    "reference_values",
    "replicas",
    "results",
    "states",
    "tokens",
]

metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "ix": "ix_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
    }
)
_AUTO = BigInteger().with_variant(Integer, "sqlite")  # SQLite numbers rows by itself for INTEGER alone


def _node() -> Column[str]:
    return Column("node", String(64), ForeignKey("nodes.id", ondelete="CASCADE"), primary_key=True)


groups = Table(
    "groups",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("interval_s", Integer, nullable=False),
    Column("version", Integer, nullable=False),  # of the Reference Values in force; 0: none were approved yet
)

reference_values = Table(
    "reference_values",
    metadata,
    Column("group_name", String(64), ForeignKey("groups.name"), primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("document", LargeBinary, nullable=False),
    Column("created_us", BigInteger, nullable=False),
    Column("created_by", String(255), nullable=False),
    Column("change", Text, nullable=False),  # what this version did, in words
)

nodes = Table(
    "nodes",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("group_name", String(64), ForeignKey("groups.name"), nullable=False, index=True),
    Column("labels", Text, nullable=False),
    Column("mode", String(4), nullable=False),
    Column("address", String(255)),
    Column("ek_sha256", String(64), nullable=False, unique=True),
    Column("ak_public", LargeBinary, nullable=False),
    Column("spki_sha256", String(64), nullable=False),
    Column("boot_pcrs", Text, nullable=False),  # at enrolment, by index
    Column("enrolled_us", BigInteger, nullable=False),
    Column("certificate_until_us", BigInteger, nullable=False),
    Column("interval_s", Integer),  # of this node alone; null: the group's
)

polls = Table(
    "polls",
    metadata,
    _node(),
    Column("due_us", BigInteger, nullable=False, index=True),
    Column("failures", Integer, nullable=False),
    Column("contact_us", BigInteger),  # last time the node answered, where that is later than its last appraisal
    Column("error", Text),  # why it does not, since then
)

states = Table(
    "states",
    metadata,
    _node(),
    Column("status", String(16), nullable=False),
    Column("appraised_us", BigInteger, nullable=False),
    Column("since_us", BigInteger, nullable=False),  # of this status with these checks
    Column("nonce", String(64), nullable=False),
    Column("version", Integer, nullable=False),  # of the Reference Values
    Column("checks", Text, nullable=False),  # those that are not ok
    Column("claims", Text, nullable=False),
    # How far the log was verified; absent after enrolment was reset.
    Column("log_index", Integer),
    Column("pcr", String(64)),
    Column("clock", BigInteger),
    Column("reset_count", BigInteger),
    Column("restart_count", BigInteger),
    Column("judgement", Text),  # of that log, with the Reference Values that it was made with
)

logs = Table("logs", metadata, _node(), Column("state", LargeBinary, nullable=False))

results = Table(
    "results",
    metadata,
    Column("id", _AUTO, primary_key=True, autoincrement=True),
    Column("node", String(64), nullable=False, index=True),
    Column("status", String(16), nullable=False),
    Column("checks", Text, nullable=False),
    Column("version", Integer, nullable=False),
    Column("first_us", BigInteger, nullable=False),
)

tokens = Table(
    "tokens",
    metadata,
    Column("id", String(16), primary_key=True),
    Column("secret_sha256", String(64), nullable=False),
    Column("group_name", String(64), ForeignKey("groups.name"), nullable=False),
    Column("node", String(64)),  # the only node that may use it, where it is bound to one
    Column("labels", Text, nullable=False),
    Column("created_us", BigInteger, nullable=False),
    Column("created_by", String(255), nullable=False),
    Column("expires_us", BigInteger, nullable=False),
    Column("used_us", BigInteger),
    Column("used_by", String(64)),
)

enrolments = Table(
    "enrolments",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("token", String(16), nullable=False),
    Column("node", String(64), nullable=False),
    Column("mode", String(4), nullable=False),
    Column("address", String(255)),
    Column("ek_sha256", String(64), nullable=False),
    Column("ak_public", LargeBinary, nullable=False),
    Column("secret_sha256", String(64), nullable=False),
    Column("nonce", String(64), nullable=False),
    Column("expires_us", BigInteger, nullable=False, index=True),
)

challenges = Table(
    "challenges",
    metadata,
    Column("nonce", String(64), primary_key=True),
    Column("node", String(64), nullable=False, index=True),
    Column("expires_us", BigInteger, nullable=False, index=True),
    Column("own", Boolean, nullable=False, server_default=false()),  # asked for under the node's own certificate
)

admins = Table(
    "admins",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("role", String(16), nullable=False),
    Column("spki_sha256", String(64), nullable=False, unique=True),
    Column("expires_us", BigInteger, nullable=False),
    Column("created_us", BigInteger, nullable=False),
    Column("created_by", String(255), nullable=False),
    Column("revoked_us", BigInteger),
)

audit = Table(
    "audit",
    metadata,
    Column("sequence", BigInteger, primary_key=True, autoincrement=False),
    Column("record", LargeBinary, nullable=False),
)

audit_head = Table(
    "audit_head",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("size", BigInteger, nullable=False),
    Column("peaks", LargeBinary, nullable=False),
)

audit_nodes = Table(
    "audit_nodes",
    metadata,
    Column(
        "level", Integer, primary_key=True, autoincrement=False
    ),  # of a complete subtree over 2**level records; from 1
    Column(
        "position", BigInteger, primary_key=True, autoincrement=False
    ),  # its first record's number divided by 2**level
    Column("hash", LargeBinary, nullable=False),
)

events = Table(
    "events",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("kind", String(32), nullable=False),
    Column("node", String(64), nullable=False),
    Column("created_us", BigInteger, nullable=False, index=True),
    Column("body", LargeBinary, nullable=False),
)

deliveries = Table(
    "deliveries",
    metadata,
    Column("event", String(32), ForeignKey("events.id", ondelete="CASCADE"), primary_key=True),
    Column("target", String(32), primary_key=True),  # a hook's id, or "nats"
    Column("due_us", BigInteger),  # null: nothing more to do
    Column("attempts", Integer, nullable=False),
    Column("delivered_us", BigInteger),
    Column("error", Text),
    Index("ix_deliveries_due", "target", "due_us"),
)

hooks = Table(
    "hooks",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("url", String(2048), nullable=False),
    Column("secret", LargeBinary, nullable=False),
    Column("kinds", Text, nullable=False),
    Column("created_us", BigInteger, nullable=False),
    Column("created_by", String(255), nullable=False),
    Column("enabled", Boolean, nullable=False),
)

replicas = Table(
    "replicas",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("name", String(255), nullable=False),
    Column("started_us", BigInteger, nullable=False),
    Column("seen_us", BigInteger, nullable=False, index=True),
)
