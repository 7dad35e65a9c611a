"""What operators call."""

from __future__ import annotations

import hashlib
import re
import secrets
from dataclasses import dataclass
from typing import Any, TypeAlias

import msgspec
from aiohttp import web

from agent import clock
from agent.attest.enrolment import JoinToken
from agent.attest.reference import ReferenceValues
from agent.errors import PeerError
from controller.api.documents import (
    Admin,
    AdminCertificate,
    AdminRequest,
    Interval,
    NodeInterval,
    Page,
    Result,
    ShownNode,
    TokenGrant,
    TokenRequest,
    shown_node,
    shown_result,
    time_of,
    times,
)
from controller.api.hooks import Hooks
from controller.api.routing import TEXT, Call, Route, number
from controller.flows.appraising import Appraiser
from controller.flows.approving import Approval, Change, Withdrawal, approve, withdraw
from controller.flows.polling import Poller, UnreachableError
from controller.settings import Settings
from controller.store import admins, audit, fleet, joining, references, results, schedule
from controller.store.database import Database
from controller.store.joining import Token
from controller.trust.authority import Authority, request_key

__all__ = ["Operators"]

MAX_PAGE = 1000
MAX_NAME_CHARS = 64
LIMIT = number(MAX_PAGE)
MAX_SEQUENCE = 2**53 - 1
Rows: TypeAlias = list[dict[str, Any]]
_TOKEN_SECRET_BYTES = 32


@dataclass(frozen=True, slots=True)
class Operators:
    """Handlers of the operators' routes."""

    database: Database
    authority: Authority
    appraiser: Appraiser
    poller: Poller
    settings: Settings

    def routes(self) -> list[Route]:
        """Return the table's rows for operators."""
        group = "/v1/groups/{group}"
        node = "/v1/nodes/{node}"
        return [
            Route("GET", "/v1/nodes", "List nodes, by name", self.list_nodes, "node.list", answer=Page, query={"limit": LIMIT, "group": TEXT, "after": TEXT}),
            Route("GET", node, "Show a node", self.show_node, "node.show", answer=ShownNode),
            Route("GET", node + "/results", "A node's history", self.history, "node.show", answer=list[Result], query={"limit": LIMIT}),
            Route("GET", node + "/result", "The last Attestation Result, as a JWT", self.result, "node.show", answer=dict[str, str]),
            Route("POST", node + "/poll", "Appraise a node now", self.poll, "node.poll", answer=Result, refusals=(409, 502)),
            Route("PUT", node + "/interval", "Say how often a node is polled", self.node_interval, "node.interval", body=NodeInterval, answer=NodeInterval),
            Route("DELETE", node, "Release a node, so that it can enrol again", self.release, "node.release", answer=dict[str, str]),
            Route("GET", "/v1/tokens", "List join tokens", self.list_tokens, "token.list", answer=Rows, query={"limit": LIMIT}),
            Route("POST", "/v1/tokens", "Make a join token", self.make_token, "token.create", body=TokenRequest, answer=TokenGrant, status=201, refusals=(404,)),
            Route("DELETE", "/v1/tokens/{token}", "Revoke a join token that was not used", self.revoke_token, "token.revoke", answer=dict[str, str], refusals=(409,)),
            Route("GET", "/v1/groups", "List groups", self.list_groups, "reference.list", answer=Rows),
            Route("PUT", group + "/interval", "Say how often a group's nodes are polled", self.group_interval, "node.interval", body=Interval, answer=Interval),
            Route("GET", group + "/references", "List versions of Reference Values", self.versions, "reference.list", answer=Rows, query={"limit": LIMIT}),
            Route("GET", group + "/references/{version}", "Show Reference Values", self.reference, "reference.list", answer=ReferenceValues),
            Route("POST", group + "/references", "Approve", self.approve, "reference.approve", body=Approval, answer=Change, limit_bytes=4 << 20, status=201, refusals=(422,)),
            Route("POST", group + "/withdrawals", "Withdraw an approval", self.withdraw, "reference.withdraw", body=Withdrawal, answer=Change, status=201, refusals=(422,)),
            Route("GET", "/v1/admins", "List admins", self.list_admins, "admin.list", answer=list[Admin]),
            Route("POST", "/v1/admins", "Make an admin", self.make_admin, "admin.create", body=AdminRequest, answer=AdminCertificate, status=201, refusals=(409, 422)),
            Route("DELETE", "/v1/admins/{name}", "Revoke an admin", self.revoke_admin, "admin.revoke", answer=dict[str, str]),
            *Hooks(self.database).routes(),
            Route("GET", "/v1/audit", "Read the audit log", self.read_audit, "audit.read", answer=Rows, query={"from": number(MAX_SEQUENCE), "limit": LIMIT}),
            Route("GET", "/v1/audit/head", "Size and root of the audit log", self.audit_head, "audit.read", answer=audit.AuditHead),
            Route("GET", "/v1/audit/proofs/{sequence}", "A record with its inclusion proof", self.prove, "audit.read", answer=dict[str, Any]),
        ]  # fmt: skip

    # --- nodes

    async def list_nodes(self, call: Call) -> Page:
        """Return a page of nodes."""
        limit = call.number("limit", 100, MAX_PAGE)
        async with self.database.begin() as connection:
            rows = await fleet.table(connection, call.text("group") or None, call.text("after"), limit)
        return Page(tuple(shown_node(row) for row in rows), rows[-1]["id"] if len(rows) == limit and rows else "")

    async def show_node(self, call: Call) -> ShownNode:
        """Return one node."""
        async with self.database.begin() as connection:
            row = await fleet.row(connection, call.request.match_info["node"])
        return shown_node(row)

    async def history(self, call: Call) -> list[Result]:
        """Return a node's results, the newest first."""
        async with self.database.begin() as connection:
            rows = await results.history(
                connection, call.request.match_info["node"], call.number("limit", 100, MAX_PAGE)
            )
        return [
            Result(
                row["status"], time_of(row["first_us"]), msgspec.json.decode(row["checks"], type=Any), row["version"]
            )
            for row in rows
        ]

    async def result(self, call: Call) -> dict[str, str]:
        """Return the last result, signed again."""
        async with self.database.begin() as connection:
            row = await fleet.row(connection, call.request.match_info["node"])
            if row["status"] is None:
                raise PeerError(404, "no_result", "it has not been appraised yet")
        reference = await self.appraiser.reference(self.database.begin, row["group_name"], row["version"])
        return {"result": self.appraiser.sign_kept(row, reference)}

    async def poll(self, call: Call) -> Result:
        """Poll a node and return what was found."""
        async with self.database.begin() as connection:
            node = await fleet.find(connection, call.request.match_info["node"])
        if node.mode == "push":
            raise PeerError(409, "pushes", "this node pushes its Evidence: it can't be polled")
        try:
            finding = await self.poller.poll(node)
        except UnreachableError as error:
            raise PeerError(502, "unreachable", str(error)) from error
        return shown_result(finding.appraised)

    async def node_interval(self, call: Call) -> NodeInterval:
        """Change how often one node is polled."""
        name, wanted = call.request.match_info["node"], call.body
        async with self.database.begin() as connection:
            await schedule.set_interval(connection, name, wanted.interval_s, clock.now_us())
            detail = {"interval_s": wanted.interval_s}
            entry = audit.AuditEntry(kind="node.interval", principal=call.by, node=name, detail=detail)
            await audit.append(connection, entry)
        return NodeInterval(wanted.interval_s)

    async def group_interval(self, call: Call) -> Interval:
        """Change how often a group's nodes are polled."""
        group, wanted = call.request.match_info["group"], call.body
        async with self.database.begin() as connection:
            await schedule.set_group_interval(connection, group, wanted.interval_s, clock.now_us())
            detail = {"group": group, "interval_s": wanted.interval_s}
            await audit.append(connection, audit.AuditEntry(kind="node.interval", principal=call.by, detail=detail))
        return Interval(wanted.interval_s)

    async def release(self, call: Call) -> dict[str, str]:
        """Forget a node."""
        name = call.request.match_info["node"]
        async with self.database.begin() as connection:
            await fleet.release(connection, name)
            await audit.append(connection, audit.AuditEntry(kind="node.release", principal=call.by, node=name))
        return {"released": name}

    # --- join tokens

    async def list_tokens(self, call: Call) -> list[dict[str, Any]]:
        """Return join tokens, without their secrets."""
        async with self.database.begin() as connection:
            return [times(row) for row in await joining.list_tokens(connection, call.number("limit", 100, MAX_PAGE))]

    async def make_token(self, call: Call) -> TokenGrant:
        """Make a join token."""
        wanted: TokenRequest = call.body
        now_us = clock.now_us()
        secret = secrets.token_bytes(_TOKEN_SECRET_BYTES)
        token = Token(
            id=secrets.token_hex(8),
            secret_sha256=hashlib.sha256(secret).hexdigest(),
            group_name=wanted.group,
            node=wanted.node,
            labels=wanted.labels,
            created_us=now_us,
            created_by=call.by,
            expires_us=now_us + wanted.valid_s * 1_000_000,
        )
        text = JoinToken(
            url=self.settings.url, spki_sha256=self.authority.server_spki_sha256(), id=token.id, secret=secret
        ).text()
        async with self.database.begin() as connection:
            await joining.add_token(connection, token)
            entry = audit.AuditEntry(
                kind="token.create",
                principal=call.by,
                node=wanted.node or "",
                detail={"token": token.id, "group": wanted.group, "labels": dict(wanted.labels)},
            )
            await audit.append(connection, entry)
        return TokenGrant(token.id, text, token.group_name, time_of(token.expires_us))

    async def revoke_token(self, call: Call) -> dict[str, str]:
        """End a join token."""
        name = call.request.match_info["token"]
        async with self.database.begin() as connection:
            await joining.revoke_token(connection, name, clock.now_us())
            entry = audit.AuditEntry(kind="token.revoke", principal=call.by, detail={"token": name})
            await audit.append(connection, entry)
        return {"revoked": name}

    # --- Reference Values

    async def list_groups(self, _call: Call) -> list[dict[str, Any]]:
        """Return the groups."""
        async with self.database.begin() as connection:
            return await references.list_groups(connection)

    async def versions(self, call: Call) -> list[dict[str, Any]]:
        """Return a group's versions."""
        limit = call.number("limit", 100, MAX_PAGE)
        async with self.database.begin() as connection:
            rows = await references.list_versions(connection, call.request.match_info["group"], limit)
        return [times(row) for row in rows]

    async def reference(self, call: Call) -> web.Response:
        """Return one version."""
        group, version = call.request.match_info["group"], call.request.match_info["version"]
        async with self.database.begin() as connection:
            number = (await references.current(connection, group))[0] if version == "current" else _version(version)
            values = await references.get(connection, group, number)
        return web.Response(body=values.encode(), content_type="application/json")

    async def approve(self, call: Call) -> Change:
        """Approve."""
        group = _group(call.request.match_info["group"])
        return await approve(self.database, group, call.body, call.by, self.settings.poll.interval_s)

    async def withdraw(self, call: Call) -> Change:
        """Withdraw."""
        return await withdraw(self.database, _group(call.request.match_info["group"]), call.body, call.by)

    # --- admins

    async def list_admins(self, _call: Call) -> list[Admin]:
        """Return the admins."""
        async with self.database.begin() as connection:
            rows = await admins.list_admins(connection)
        return [
            Admin(row["name"], row["role"], time_of(row["expires_us"]), row["revoked_us"] is not None) for row in rows
        ]

    async def make_admin(self, call: Call) -> AdminCertificate:
        """Make an admin by a certificate request: the key never leaves its owner."""
        wanted: AdminRequest = call.body
        key = request_key(wanted.csr)
        issued = self.authority.issue(f"admin/{wanted.name}", wanted.name, key, wanted.valid_s)
        async with self.database.begin() as connection:
            await admins.add(
                connection,
                wanted.name,
                wanted.role,
                issued.spki_sha256,
                expires_us=issued.until_us,
                by=call.by,
                now_us=clock.now_us(),
            )
            entry = audit.AuditEntry(
                kind="admin.create", principal=call.by, detail={"name": wanted.name, "role": wanted.role}
            )
            await audit.append(connection, entry)
        return AdminCertificate(wanted.name, wanted.role, issued.pem, self.authority.ca_pem, time_of(issued.until_us))

    async def revoke_admin(self, call: Call) -> dict[str, str]:
        """Revoke an admin."""
        name = call.request.match_info["name"]
        async with self.database.begin() as connection:
            await admins.revoke(connection, name, clock.now_us())
            await audit.append(
                connection, audit.AuditEntry(kind="admin.revoke", principal=call.by, detail={"name": name})
            )
        return {"revoked": name}

    # --- audit log

    async def read_audit(self, call: Call) -> list[dict[str, Any]]:
        """Return records."""
        async with self.database.begin() as connection:
            return await audit.read(
                connection, call.number("from", 0, MAX_SEQUENCE), call.number("limit", 100, audit.MAX_READ)
            )

    async def audit_head(self, _call: Call) -> audit.AuditHead:
        """Return the head."""
        async with self.database.begin() as connection:
            return await audit.head(connection)

    async def prove(self, call: Call) -> dict[str, Any]:
        """Return a record and its proof."""
        sequence = call.request.match_info["sequence"]
        if not (sequence.isascii() and sequence.isdigit() and len(sequence) < 16):  # noqa: PLR2004 -- digits
            raise PeerError(400, "query", "the number of a record")
        async with self.database.begin() as connection:
            record, proof, now = await audit.prove(connection, int(sequence))
        return {
            "record": record.decode(),
            "index": int(sequence),
            "size": now.size,
            "root": now.root,
            "proof": [part.hex() for part in proof],
        }


def _group(name: str) -> str:
    if len(name) > MAX_NAME_CHARS or re.fullmatch(r"[A-Za-z0-9._-]+", name) is None:
        raise PeerError(400, "group", f"a group's name: up to {MAX_NAME_CHARS} letters, digits, '.', '_' and '-'")
    return name


def _version(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10):  # noqa: PLR2004 -- digits
        raise PeerError(400, "version", "a number, or 'current'")
    return int(text)
