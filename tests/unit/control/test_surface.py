"""The operator's Unix socket and the controllers' listener, over real sockets."""

import asyncio
import base64
import http.client
import io
import os
import socket
import subprocess
import tempfile
from pathlib import Path

import pytest
from aiohttp import UnixConnector, web
from aiohttp.test_utils import TestClient, TestServer
from hypothesis import given
from hypothesis import strategies as st

from agent.control import surface
from agent.errors import AuditError, ConfigError, EdgeWardenError, PeerError, PolicyError, TpmError, VerificationError
from agent.flows.enrolment import EnrolOrder
from agent.records import JsonValue, Principal

NONCE = "0" * 63 + "a"


class Control:
    """Stands for the node behind the surfaces: remembers what it was asked, and fails as it is told."""

    def __init__(self):
        self.asked: list[tuple[str, ...]] = []
        self.failure: EdgeWardenError | None = None
        self.bundle = b""

    async def authorize_admin(self, principal: Principal, verb: str) -> None:
        self.asked.append(("authorize", principal.id, *principal.roles, verb))
        if self.failure:
            raise self.failure

    async def evidence(self, nonce: bytes, from_index: int, peer_spki_sha256: str | None) -> bytes:
        self.asked.append(("evidence", nonce.hex(), str(from_index), str(peer_spki_sha256)))
        if self.failure:
            raise self.failure
        return b'{"attest":"x"}'

    async def ak_public(self) -> bytes:
        return b"\x00key"

    def status(self) -> dict[str, JsonValue]:
        return {"node": "n", "policy": {"revision": "r1"}}

    async def activate_policy(self, bundle: bytes, principal: Principal) -> dict[str, JsonValue]:
        self.asked.append(("activate", principal.id))
        self.bundle = bundle
        return {"revision": "r2"}

    def enrolment(self) -> dict[str, JsonValue]:
        return {"enrolled": False}

    async def enrol(self, order: EnrolOrder, principal: Principal) -> dict[str, JsonValue]:
        self.asked.append(("enrol", order.token, str(order.mode), str(order.address), principal.id))
        return {"enrolled": True}

    async def leave(self, principal: Principal) -> dict[str, JsonValue]:
        self.asked.append(("leave", principal.id))
        return {"enrolled": False}

    async def take_result(self, jwt: str) -> None:
        self.asked.append(("result", jwt))
        if self.failure:
            raise self.failure

    async def rescan_models(self, principal: Principal) -> dict[str, JsonValue]:
        self.asked.append(("rescan", principal.id))
        return {"models": []}


@pytest.fixture
def control():
    return Control()


@pytest.fixture
def address():
    """A path that every user may reach; pytest's own directories are their owner's."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        yield Path(directory) / "admin.sock"


@pytest.fixture
async def admin(control, address):
    """A client of the admin application on a Unix socket."""
    runner = web.AppRunner(surface.admin_application(control))
    await runner.setup()
    await web.UnixSite(runner, str(address)).start()
    address.chmod(0o666)
    async with TestClient(TestServer(web.Application()), connector=UnixConnector(str(address))) as client:
        yield client
    await runner.cleanup()


async def test_the_peer_is_who_the_kernel_says(admin, control):
    """The caller is named by its uid; the agent's own user, as root, is an admin."""
    assert (await admin.get("/admin/v1/status")).status == 200
    assert control.asked == [("authorize", f"uid:{os.getuid()}", "admin", "status")]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become someone else")
@pytest.mark.usefixtures("admin")
async def test_another_user_is_no_admin(control, address):
    """A process of another uid has no role, whatever it says of itself."""
    command = ["curl", "-sS", "--unix-socket", address, "-H", "X-Uid: 0", "http://localhost/admin/v1/status"]
    await asyncio.to_thread(
        subprocess.run, command, check=True, capture_output=True, timeout=20, user=65534, group=65534, extra_groups=[]
    )
    assert control.asked == [("authorize", "uid:65534", "status")]


async def test_every_admin_call_is_authorized_first(admin, control):
    """Status, policy and rescan ask for their verb before anything happens; denied, nothing does."""
    control.failure = PeerError(403, "policy", "denied")
    for method, path in (
        ("GET", "/admin/v1/status"),
        ("GET", "/admin/v1/policy"),
        ("PUT", "/admin/v1/policy"),
        ("POST", "/admin/v1/models/rescan"),
    ):
        answer = await admin.request(method, path, data=b"x" if method == "PUT" else None)
        assert (answer.status, await answer.json()) == (403, {"error": "denied"})
    assert [asked[-1] for asked in control.asked] == ["status", "status", "policy.activate", "model.rescan"]
    assert {asked[0] for asked in control.asked} == {"authorize"}


async def test_admin_calls_reach_the_node(admin, control):
    """A bundle arrives byte for byte, a rescan answers with the models."""
    bundle = os.urandom(100_000)
    assert await (await admin.put("/admin/v1/policy", data=bundle)).json() == {"revision": "r2"}
    assert control.bundle == bundle
    assert await (await admin.get("/admin/v1/policy")).json() == {"revision": "r1"}
    assert await (await admin.post("/admin/v1/models/rescan")).json() == {"models": []}


async def test_a_bundle_over_the_limit_is_413(admin, control):
    """More than a bundle may have is refused as an error of the surface, and reaches nobody."""
    answer = await admin.put("/admin/v1/policy", data=io.BytesIO(b"x" * (surface.MAX_BUNDLE_BYTES + 1)))
    assert answer.status == 413
    assert "error" in await answer.json()
    assert control.bundle == b""


@pytest.mark.parametrize(
    ("failure", "status"),
    [
        (PeerError(429, "rate", "slow down"), 429),
        (VerificationError("bundle", "bad"), 422),
        (PolicyError("refused"), 422),
        (ConfigError("wrong"), 422),
        (TpmError("no TPM"), 503),
        (AuditError("full"), 503),
        (EdgeWardenError("other"), 500),
    ],
)
async def test_an_error_has_the_status_of_its_blame(admin, control, failure, status):
    """Whose fault it is decides the status; the body is the error's words alone."""
    control.failure = failure
    answer = await admin.get(f"/attestation/v1/evidence?nonce={NONCE}")
    assert (answer.status, await answer.json()) == (status, {"error": str(failure)})


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/admin/v2/x", 404), ("DELETE", "/admin/v1/policy", 405)]
)
async def test_other_paths_and_methods_are_errors_of_the_same_form(admin, method, path, status):
    """404 and 405 are JSON, too."""
    answer = await admin.request(method, path)
    assert answer.status == status
    assert "error" in await answer.json()


async def test_evidence_is_for_a_nonce(admin, control):
    """The nonce and the index go through; on the Unix socket there is no listener's key to claim."""
    answer = await admin.get(f"/attestation/v1/evidence?nonce={NONCE}&from=12")
    assert await answer.json() == {"attest": "x"}
    assert control.asked == [("evidence", NONCE, "12", "None")]
    ak = await (await admin.get("/attestation/v1/ak")).json()
    assert base64.b64decode(ak["ak_public"]) == b"\x00key"


@pytest.mark.parametrize(
    "query",
    [
        "",
        "nonce=",
        "nonce=" + "a" * 63,
        "nonce=" + "a" * 65,
        "nonce=" + "A" * 64,
        "nonce=" + "g" * 64,
        "nonce=" + "%D9%A1" * 64,
        f"nonce={NONCE}&from=-1",
        f"nonce={NONCE}&from=%D9%A1",
        f"nonce={NONCE}&from=1000000000",
        f"nonce={NONCE}&from=",
        f"nonce={NONCE}&from=1e3",
    ],
)
async def test_a_nonce_that_is_none_is_400(admin, control, query):
    """Only 64 lower-case hexadecimal digits are a nonce, only a short number is an index."""
    answer = await admin.get(f"/attestation/v1/evidence?{query}")
    assert answer.status == 400
    assert "error" in await answer.json()
    assert control.asked == []


async def test_controllers_get_evidence_that_names_their_listener(control):
    """On the control listener the claims carry its own key; there is no administration."""
    async with TestClient(TestServer(surface.evidence_application(control, "ab" * 32))) as client:
        assert (await client.get(f"/attestation/v1/evidence?nonce={NONCE}")).status == 200
        assert control.asked == [("evidence", NONCE, "0", "ab" * 32)]
        assert (await client.get("/admin/v1/status")).status == 404


async def test_the_admin_application_is_for_unix_sockets_only(control):
    """Served over TCP by mistake it knows nobody."""
    async with TestClient(TestServer(surface.admin_application(control))) as client:
        answer = await client.get("/admin/v1/status")
        assert answer.status == 401
    assert control.asked == []


@given(st.binary(max_size=300))
def test_bytes_on_the_admin_socket_do_no_harm(sent):
    """Whatever comes, the next caller is served."""

    async def run():
        control = Control()
        runner = web.AppRunner(surface.admin_application(control), access_log=None)
        await runner.setup()
        ours, theirs = socket.socketpair()
        server = runner.server
        assert server is not None
        loop = asyncio.get_running_loop()
        await loop.connect_accepted_socket(server, theirs)
        ours.setblocking(False)
        await loop.sock_sendall(ours, sent)
        ours.close()
        await asyncio.sleep(0)
        await runner.cleanup()
        assert control.bundle == b""

    asyncio.run(run())


def test_the_limit_of_a_bundle_is_the_policys():
    """The surface takes what the policy room takes, not less."""
    from agent.policy.bundle import MAX_BUNDLE_BYTES  # noqa: PLC0415 -- for this comparison only

    assert surface.MAX_BUNDLE_BYTES >= MAX_BUNDLE_BYTES
    assert http.client.UNPROCESSABLE_ENTITY == 422
