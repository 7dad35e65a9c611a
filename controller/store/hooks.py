"""The hooks that take events: who they are, what they are owed, and a test of one.

Rules:

1. A hook is an https address; http is for loopback addresses alone.
2. A hook's secret is 32 bytes of the system's generator, or one that its receiver has made (Standard Webhooks: ``whsec_`` and 24 to 64 bytes in
   base64). It is told when the hook is made, if it was made here, and never again.
3. A test is an event like any other, signed and tried again, for one hook alone.
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
import secrets
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import msgspec
from sqlalchemy import CursorResult, Row, Select, delete, func, insert, select, true
from sqlalchemy.ext.asyncio import AsyncConnection

from agent.errors import PeerError
from controller.store import outbox
from controller.store.outbox import ANY_KIND, is_kind, kinds_of
from controller.store.schema import deliveries, events, hooks

__all__ = [
    "HOOK_TEST",
    "HookRecord",
    "NewHook",
    "check_url",
    "create_hook",
    "delete_hook",
    "find_hook",
    "list_deliveries",
    "list_hooks",
    "read_secret",
    "send_test",
]

HOOK_TEST = "hook.test"
MAX_HOOKS = 64
MAX_KINDS = 32  # kinds a hook names
MAX_URL_CHARS = 2048
SECRET_BYTES = 32
SECRET_BYTES_MIN, SECRET_BYTES_MAX = 24, 64  # of a secret that the receiver has made
_PREFIX = "whsec_"
_ID_BYTES = 16


@dataclass(frozen=True, slots=True)
class NewHook:
    """A hook that was just made, with its secret (``whsec_...``), which is empty where the receiver had made it."""

    id: str
    secret: str = field(repr=False)


class HookRecord(msgspec.Struct, frozen=True):
    """A hook without its secret, and how its deliveries stand.

    Attributes:
        pending: deliveries that are still tried.
        given_up: deliveries that ended without success, of events that are kept.
        error: what the newest unsuccessful one of them met last.
    """

    id: str
    url: str
    kinds: list[str]
    created_us: int
    created_by: str
    enabled: bool
    pending: int
    given_up: int
    error: str | None


def check_url(url: str) -> None:
    """Validate the address of a receiver: https, or http to a loopback address.

    Raises:
        PeerError: it is none; status 400.
    """
    try:
        parts = urlsplit(url)
        host, _port = parts.hostname, parts.port
    except ValueError:
        host, parts = None, urlsplit("")
    if not host or len(url) > MAX_URL_CHARS or not url.isascii() or not url.isprintable() or " " in url:
        raise PeerError(400, "hook_url", f"url: not an address of at most {MAX_URL_CHARS} characters")
    if parts.username is not None or parts.password is not None or parts.fragment:
        raise PeerError(400, "hook_url", "url: no user, password or fragment may stand in it")
    if parts.scheme != "https" and not (parts.scheme == "http" and _is_loopback(host)):
        raise PeerError(400, "hook_url", "url: it begins with https://; http:// is for loopback addresses alone")


def read_secret(text: str) -> bytes:
    """Return the bytes of a secret in the form of Standard Webhooks.

    Raises:
        PeerError: it is none; status 400. The text is not told.
    """
    words = f"secret: {_PREFIX} and {SECRET_BYTES_MIN} to {SECRET_BYTES_MAX} bytes in base64"
    try:
        secret = base64.b64decode(text.removeprefix(_PREFIX), validate=True)
    except (binascii.Error, ValueError):
        raise PeerError(400, "hook_secret", words) from None
    if not text.startswith(_PREFIX) or not SECRET_BYTES_MIN <= len(secret) <= SECRET_BYTES_MAX:
        raise PeerError(400, "hook_secret", words)
    return secret


async def create_hook(
    connection: AsyncConnection, url: str, kinds: Collection[str], by: str, now_us: int, *, secret: str | None = None
) -> NewHook:
    """Make a hook for some kinds of events, or for all (``*``).

    Args:
        connection: a transaction.
        url: where events go.
        kinds: of the events.
        by: who makes it.
        now_us: the time.
        secret: what the receiver has made; without it one is made here.

    Raises:
        PeerError: the address, a kind or the secret is none (400), or there are too many hooks (409).
    """
    check_url(url)
    if not 1 <= len(kinds) <= MAX_KINDS or not all(kind == ANY_KIND or is_kind(kind) for kind in kinds):
        raise PeerError(400, "hook_kinds", f"kinds: 1 to {MAX_KINDS} kinds of events, or {ANY_KIND}")
    if (await connection.scalar(select(func.count()).select_from(hooks)) or 0) >= MAX_HOOKS:
        raise PeerError(409, "too_many_hooks", f"there are {MAX_HOOKS} hooks; delete one first")
    hook = secrets.token_hex(_ID_BYTES)
    key = secrets.token_bytes(SECRET_BYTES) if secret is None else read_secret(secret)
    await connection.execute(
        insert(hooks).values(
            id=hook,
            url=url,
            secret=key,
            kinds=msgspec.json.encode(sorted(set(kinds))).decode(),
            created_us=now_us,
            created_by=by,
            enabled=True,
        )
    )
    return NewHook(hook, _PREFIX + base64.b64encode(key).decode() if secret is None else "")


async def list_hooks(connection: AsyncConnection) -> list[HookRecord]:
    """Return all hooks, the oldest first."""
    rows = await connection.execute(_records().order_by(hooks.c.created_us, hooks.c.id))
    return [_record(row) for row in rows]


async def find_hook(connection: AsyncConnection, hook: str) -> HookRecord:
    """Return one hook.

    Raises:
        PeerError: there is none of this id; status 404.
    """
    row = (await connection.execute(_records().where(hooks.c.id == hook))).one_or_none()
    if row is None:
        raise _no_hook()
    return _record(row)


async def list_deliveries(connection: AsyncConnection, hook: str, limit: int, event: str = "") -> list[Row[Any]]:
    """Return what went or has to go to a hook, the newest event first; or one event alone."""
    query = (
        select(deliveries, events.c.kind, events.c.created_us)
        .join(events, events.c.id == deliveries.c.event)
        .where(deliveries.c.target == hook, deliveries.c.event == event if event else true())
        .order_by(events.c.created_us.desc(), events.c.id)
        .limit(limit)
    )
    return list(await connection.execute(query))


async def send_test(connection: AsyncConnection, hook: str, by: str, now_us: int) -> str:
    """Write an event that is for this hook alone; returns its id.

    Raises:
        PeerError: there is none of this id (404), or it is disabled (409).
    """
    if not (await find_hook(connection, hook)).enabled:
        raise PeerError(409, "hook_disabled", "its receiver wanted no more events (410): remove it, and add it again")
    return await outbox.emit(connection, HOOK_TEST, "", {"hook": hook, "by": by}, now_us, nats=False, hook=hook)


def _records() -> Select[Any]:
    undelivered = deliveries.c.delivered_us.is_(None)
    mine = deliveries.c.target == hooks.c.id
    pending = select(func.count()).where(mine, deliveries.c.due_us.is_not(None)).scalar_subquery()
    given_up = select(func.count()).where(mine, undelivered, deliveries.c.due_us.is_(None)).scalar_subquery()
    error = (
        select(deliveries.c.error)
        .join(events, events.c.id == deliveries.c.event)
        .where(mine, undelivered, deliveries.c.error.is_not(None))
        .order_by(events.c.created_us.desc())
        .limit(1)
        .scalar_subquery()
    )
    return select(hooks, pending.label("pending"), given_up.label("given_up"), error.label("error"))


def _record(row: Row[Any]) -> HookRecord:
    return HookRecord(
        id=row.id,
        url=row.url,
        kinds=kinds_of(row.kinds),
        created_us=row.created_us,
        created_by=row.created_by,
        enabled=row.enabled,
        pending=row.pending,
        given_up=row.given_up,
        error=row.error,
    )


async def delete_hook(connection: AsyncConnection, hook: str) -> None:
    """Remove a hook and everything that was to go there.

    Raises:
        PeerError: there is none of this id; status 404.
    """
    gone: CursorResult[Any] = await connection.execute(delete(hooks).where(hooks.c.id == hook))
    if gone.rowcount == 0:
        raise _no_hook()
    await connection.execute(delete(deliveries).where(deliveries.c.target == hook))


def _no_hook() -> PeerError:
    return PeerError(404, "no_hook", "there is no such hook")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, which may come to mean another host
        return False
