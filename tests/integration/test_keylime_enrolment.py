"""Enrolment and polls at the level of the flow: a registrar that misbehaves, a TPM that is real."""

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import struct

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from tpm2_pytss import ESAPI, TPM2B_PUBLIC, TPMT_PUBLIC

from agent.attest.keylime import MAX_ANSWER_BYTES, KernelList
from agent.attest.log import MeasurementLog, TpmResetError
from agent.attest.tpm_thread import TpmThread
from agent.errors import AuditError, VerificationError
from agent.flows.keylime import KeylimeFlow, KeylimePeer
from agent.records import JsonValue
from tests.support.swtpm import SwTpm

pytestmark = pytest.mark.integration
SECRET = b"\x07" * 32
PEER = KeylimePeer("verifier", "192.0.2.9")


@pytest.fixture(scope="module")
def vendor_tpm(tmp_path_factory):
    with SwTpm(tmp_path_factory.mktemp("tpm"), manufactured=True) as tpm:
        yield tpm


class Hooks:
    """Keeps what is recorded; can be full."""

    def __init__(self):
        self.records = []
        self.full = False

    def record(self, event):
        if self.full:
            raise AuditError("the disk is full")
        self.records.append(event)
        future = asyncio.get_running_loop().create_future()
        future.set_result(None)
        return future

    def outcomes(self, kind):
        return [record.outcome for record in self.records if record.kind == kind]


class Registrar:
    """Stands where Keylime's registrar does: answers as it is told first, then as it should, with a real credential."""

    def __init__(self, swtpm, *first):
        self._swtpm = swtpm
        self._first = list(first)
        self.active = False
        self.sent = {}

    def application(self):
        application = web.Application()
        application.router.add_post("/v2.5/agents/node-1", self._register)
        application.router.add_put("/v2.5/agents/node-1/activate", self._activate)
        return application

    async def _register(self, request):
        self.sent = await request.json()
        if self._first:
            return self._first.pop(0)
        return web.json_response({"results": {"blob": await asyncio.to_thread(self._challenge)}})

    def _challenge(self):
        ek, _ = TPM2B_PUBLIC.unmarshal(base64.b64decode(self.sent["ek_tpm"]))
        name = b"\x00\x0b" + hashlib.sha256(base64.b64decode(self.sent["aik_tpm"])[2:]).digest()
        with ESAPI(self._swtpm.tcti) as esys:
            handle = esys.load_external(ek)
            blob, secret = esys.make_credential(handle, SECRET, name)
            esys.flush_context(handle)
        return _blob(blob.marshal() + secret.marshal())

    async def _activate(self, request):
        expected = hmac.new(base64.b64encode(SECRET), b"node-1", hashlib.sha384).hexdigest()
        self.active = (await request.json())["auth_tag"] == expected
        return web.json_response({"results": {}}, status=200 if self.active else 400)


def _blob(parts):
    return base64.b64encode(struct.pack(">II", 0xBADCC0DE, 1) + parts).decode()


def _says(blob):
    return web.json_response({"results": {"blob": blob}})


@contextlib.asynccontextmanager
async def _flow(swtpm, folder, registrar_url):
    thread = TpmThread(swtpm.tcti, first_retry_s=0.02)
    hooks = Hooks()
    said: list[dict[str, JsonValue]] = []
    try:
        log = await MeasurementLog.open(thread, folder / "log", 10, allowed={10})
        flow = KeylimeFlow(
            uuid="node-1",
            registrar=registrar_url,
            contact=("192.0.2.1", 9002),
            certificate=b"CERTIFICATE",
            public_key=b"KEY",
            tpm=thread,
            log=log,
            kernel=KernelList(),
            boot_time_s=1_700_000_000,
            hooks=hooks,
            report=said.append,
            first_retry_s=0.01,
        )
        yield flow, hooks, said
    finally:
        await thread.close()


@pytest.fixture
def swtpm(tmp_path):
    with SwTpm(tmp_path) as tpm:
        yield tpm


async def _until(holds):
    """Wait for something that must happen; the time limit of the test ends it otherwise."""
    while not holds():  # noqa: ASYNC110 -- what is waited for tells nobody
        await asyncio.sleep(0.01)


async def _checked_until(flow, holds):
    while not holds():
        await flow.check()
        await asyncio.sleep(0.05)


async def test_a_registrar_that_misbehaves_is_asked_again(vendor_tpm, tmp_path):
    """Refusals, nonsense, redirections and credentials for another TPM each fail the attempt alone; the next good answer enrols."""
    vendor_tpm.power_cycle()
    registrar = Registrar(
        vendor_tpm,
        web.Response(status=500, text="not now"),
        web.json_response({"status": "Agent re-registration is forbidden"}, status=403),
        web.Response(text="no JSON"),
        web.Response(body=b" " * (MAX_ANSWER_BYTES + 10)),
        web.HTTPTemporaryRedirect("http://127.0.0.1:1/"),
        _says(_blob(b"")),
        _says(_blob(b"\x00\x00\x00\x00")),
        _says(_blob(struct.pack(">H", 68) + bytes(68) + struct.pack(">H", 256) + b"\x01" * 256)),
    )
    async with TestServer(registrar.application()) as server:
        url = f"http://127.0.0.1:{server.port}"
        async with _flow(vendor_tpm, tmp_path, url) as (flow, hooks, said):
            await flow.enrol()
    assert registrar.active
    assert hooks.outcomes("keylime.register") == ["failed"] * 8 + ["ok"]
    assert hooks.records[-1].detail == {"endorsed": True}
    errors = [record.error for record in hooks.records]
    assert "answered 500" in errors[0]
    assert "forbidden" in errors[1]
    assert "activate" in errors[7]
    assert said[0] == {"registered": False, "measured": True, "why": "not registered yet"}
    assert said[-1] == {"registered": True, "measured": True, "why": "registered as node-1"}
    assert (registrar.sent["ip"], registrar.sent["port"], registrar.sent["mtls_cert"]) == (
        "192.0.2.1",
        9002,
        "CERTIFICATE",
    )


async def test_the_same_failure_is_recorded_once(swtpm, tmp_path):
    """Attempts that fail alike are one record; a TPM without a certificate enrols, and the record says so; a full log does not end it."""
    registrar = Registrar(swtpm, *(web.Response(status=503, text="down") for _ in range(3)))
    async with (
        TestServer(registrar.application()) as server,
        _flow(swtpm, tmp_path, f"http://127.0.0.1:{server.port}") as (flow, hooks, _),
    ):
        await flow.enrol()
        assert hooks.outcomes("keylime.register") == ["failed", "ok"]
        assert hooks.records[-1].detail == {"endorsed": False}
        assert registrar.sent["ekcert"] is None
        ek, _ = TPMT_PUBLIC.unmarshal(base64.b64decode(registrar.sent["ek_tpm"])[2:])
        assert int(ek.type) == 1  # RSA


async def test_a_record_that_fails_is_a_failed_enrolment(swtpm, tmp_path):
    """While the audit log takes nothing the node does not call itself enrolled; afterwards it does."""
    registrar = Registrar(swtpm)
    async with (
        TestServer(registrar.application()) as server,
        _flow(swtpm, tmp_path, f"http://127.0.0.1:{server.port}") as (flow, hooks, said),
    ):
        hooks.full = True
        task = asyncio.create_task(flow.enrol())
        await _until(lambda: any("disk is full" in str(one["why"]) for one in said))
        hooks.full = False
        await task
        assert hooks.outcomes("keylime.register") == ["ok"]
        assert said[-1]["registered"] is True


async def test_polls_are_answered_and_recorded_when_they_change(swtpm, tmp_path):
    """Identity binds the key alone, integrity adds the list; one record for many good polls, one when they begin to fail."""
    async with _flow(swtpm, tmp_path, "http://127.0.0.1:1") as (flow, hooks, said):
        answer = await flow.identity("n", PEER)
        assert answer["pubkey"] == "KEY"
        assert "ima_measurement_list" not in answer
        for _ in range(3):
            answer = await flow.integrity("n", frozenset({10}), 0, PEER, with_key=False)
        assert "pubkey" not in answer
        assert str(answer["ima_measurement_list"]).endswith(" boot_aggregate\n")
        assert (answer["ima_measurement_list_entry"], answer["boottime"]) == (0, 1_700_000_000)
        await flow.check()
        (record,) = hooks.records
        assert (record.kind, record.outcome, record.principal, record.source_ip) == (
            "keylime.quote",
            "ok",
            "verifier",
            "192.0.2.9",
        )
        await flow.tpm.call(lambda tpm: tpm.extend(10, b"another"))
        for _ in range(2):
            await flow.check()
            with pytest.raises(VerificationError, match="PCR 10"):
                await flow.integrity("n", frozenset({10}), 0, PEER, with_key=False)
        assert hooks.outcomes("keylime.quote") == ["ok", "failed"]
        assert hooks.outcomes("keylime.check")[0] == "failed"
        assert said[-1]["measured"] is False


async def test_a_hang_of_the_tpm_passes(swtpm, tmp_path):
    """A check that fails while the TPM is away says so, and says again that all is well; a TPM that was reset ends the agent."""
    async with _flow(swtpm, tmp_path, "http://127.0.0.1:1") as (flow, hooks, said):
        flow.tpm._call_timeout_s = 0.3
        swtpm.stop()
        await flow.check()
        assert said[-1]["measured"] is False
        swtpm.resume()
        await _checked_until(flow, lambda: said[-1]["measured"])
        assert hooks.outcomes("keylime.check")[-1] == "ok"
        swtpm.reboot()
        with pytest.raises(TpmResetError):
            await _checked_until(flow, lambda: False)


async def test_a_revocation_is_recorded_and_no_more(swtpm, tmp_path):
    """What the verifier says of a node stands in the audit log, cut to a limit; what is no notification is refused."""
    async with _flow(swtpm, tmp_path, "http://127.0.0.1:1") as (flow, hooks, _):
        message = json.dumps({"type": "revocation", "agent_id": "x" * 1000, "event_id": "ima.validation"})
        await flow.revocation(json.dumps({"msg": message}).encode(), PEER)
        (record,) = hooks.records
        assert (record.kind, record.principal_kind) == ("keylime.revocation", "mtls")
        assert record.detail["event_id"] == "ima.validation"
        assert len(record.detail["agent_id"]) == 300
        with pytest.raises(VerificationError):
            await flow.revocation(b"x", PEER)
        hooks.full = True
        with pytest.raises(AuditError):
            await flow.revocation(json.dumps({"msg": message}).encode(), PEER)
