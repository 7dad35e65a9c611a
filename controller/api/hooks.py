"""What operators call about webhooks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Row
from sqlalchemy.ext.asyncio import AsyncConnection

from agent import clock
from controller.api.documents import HookDelivery, HookGrant, HookRequest, ShownHook, time_of
from controller.api.routing import Call, Route
from controller.store import audit, hooks
from controller.store.database import Database
from controller.store.hooks import HookRecord

__all__ = ["Hooks"]

MAX_DELIVERIES = 1000  # an answer


@dataclass(frozen=True, slots=True)
class Hooks:
    """Handlers of the webhooks' routes."""

    database: Database

    def routes(self) -> list[Route]:
        """Return the table's rows for webhooks."""
        hook = "/v1/hooks/{hook}"
        return [
            Route("GET", "/v1/hooks", "List webhooks", self.list_hooks, "hook.list", answer=list[HookRecord]),
            Route("POST", "/v1/hooks", "Make a webhook", self.make, "hook.create", body=HookRequest, answer=HookGrant, status=201, refusals=(409,)),
            Route("GET", hook, "Show a webhook and its deliveries", self.show, "hook.show", answer=ShownHook),
            Route("POST", hook + "/test", "Send an event to this webhook alone", self.test, "hook.test", answer=dict[str, str], status=201),
            Route("DELETE", hook, "Remove a webhook", self.delete, "hook.delete", answer=dict[str, str]),
        ]  # fmt: skip

    async def list_hooks(self, _call: Call) -> list[HookRecord]:
        """Return webhooks, without their secrets."""
        async with self.database.begin() as connection:
            return await hooks.list_hooks(connection)

    async def make(self, call: Call) -> HookGrant:
        """Make a webhook."""
        wanted: HookRequest = call.body
        async with self.database.begin() as connection:
            made = await hooks.create_hook(
                connection, wanted.url, wanted.kinds, call.by, clock.now_us(), secret=wanted.secret
            )
            await _record(connection, call, "hook.create", hook=made.id, kinds=list(wanted.kinds))
        return HookGrant(made.id, made.secret)

    async def show(self, call: Call) -> ShownHook:
        """Return one webhook; ``event`` leaves out what went there of others."""
        limit = call.number("limit", 20, MAX_DELIVERIES)
        async with self.database.begin() as connection:
            found = await hooks.find_hook(connection, _id(call))
            rows = await hooks.list_deliveries(connection, found.id, limit, call.text("event"))
        return ShownHook(
            id=found.id,
            url=found.url,
            kinds=found.kinds,
            created=time_of(found.created_us),
            created_by=found.created_by,
            enabled=found.enabled,
            pending=found.pending,
            given_up=found.given_up,
            deliveries=[_delivery(row) for row in rows],
        )

    async def test(self, call: Call) -> dict[str, str]:
        """Have an event sent; whether it arrives is seen in the webhook's deliveries."""
        async with self.database.begin() as connection:
            event = await hooks.send_test(connection, _id(call), call.by, clock.now_us())
            await _record(connection, call, "hook.test", hook=_id(call), event=event)
        return {"event": event}

    async def delete(self, call: Call) -> dict[str, str]:
        """Remove a webhook."""
        async with self.database.begin() as connection:
            await hooks.delete_hook(connection, _id(call))
            await _record(connection, call, "hook.delete", hook=_id(call))
        return {"deleted": _id(call)}


def _id(call: Call) -> str:
    return call.request.match_info["hook"]


async def _record(connection: AsyncConnection, call: Call, kind: str, **detail: Any) -> None:  # noqa: ANN401 -- JSON
    await audit.append(connection, audit.AuditEntry(kind=kind, principal=call.by, detail=detail))


def _delivery(row: Row[Any]) -> HookDelivery:
    is_over = row.due_us is None
    return HookDelivery(
        event=row.event,
        kind=row.kind,
        created=time_of(row.created_us),
        state="delivered" if row.delivered_us is not None else "given up" if is_over else "waiting",
        attempts=row.attempts,
        due=time_of(row.due_us),
        delivered=time_of(row.delivered_us),
        error=row.error or "",
    )
