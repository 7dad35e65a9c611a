"""What Keylime's verifier and tenant find at the node, over real sockets."""

import http.client

import pytest
from aiohttp.test_utils import TestClient, TestServer

from agent.control.keylime import MAX_NOTIFICATION_BYTES, keylime_application
from agent.errors import AuditError, ConfigError, EdgeWardenError, TpmError, VerificationError
from agent.flows.keylime import KeylimePeer
from agent.records import JsonValue

INTEGRITY = {"nonce": "aB3", "mask": "0x400", "partial": "1", "ima_ml_entry": "0"}


class Control:
    """Stands for the flow: remembers what it was asked, and fails as it is told."""

    def __init__(self):
        self.asked: list[tuple[object, ...]] = []
        self.failure: EdgeWardenError | None = None

    def _take(self, *asked: object) -> None:
        self.asked.append(asked)
        if self.failure:
            raise self.failure

    async def identity(self, nonce: str, peer: KeylimePeer) -> dict[str, JsonValue]:
        self._take("identity", nonce, peer.address)
        return {"quote": "r"}

    async def integrity(
        self, nonce: str, pcrs: frozenset[int], start: int, peer: KeylimePeer, *, with_key: bool
    ) -> dict[str, JsonValue]:
        self._take("integrity", nonce, sorted(pcrs), start, with_key, peer.address)
        return {"quote": "r"}

    async def revocation(self, body: bytes, peer: KeylimePeer) -> None:
        self._take("revocation", body, peer.address)


@pytest.fixture
async def served():
    control = Control()
    async with TestClient(TestServer(keylime_application(control))) as client:
        yield client, control


async def test_the_calls_of_keylime_are_answered_in_its_form(served):
    """Each call reaches the flow with its parsed values, and its answer has code, status and results."""
    client, control = served
    for path, params, results in (
        ("/version", {}, {"supported_versions": ["2.5"]}),
        ("/v2.5/quotes/identity", {"nonce": "aB3"}, {"quote": "r"}),
        ("/v2.5/quotes/integrity", INTEGRITY, {"quote": "r"}),
        (
            "/v2.5/quotes/integrity",
            INTEGRITY | {"mask": "0x800401", "partial": "0", "ima_ml_entry": "7"},
            {"quote": "r"},
        ),
    ):
        async with client.get(path, params=params) as answer:
            assert answer.status == 200
            assert await answer.json() == {"code": 200, "status": "Success", "results": results}
    async with client.post("/v2.5/notifications/revocation", data=b"{}") as answer:
        assert answer.status == 200
    assert control.asked == [
        ("identity", "aB3", "127.0.0.1"),
        ("integrity", "aB3", [10], 0, False, "127.0.0.1"),
        ("integrity", "aB3", [0, 10, 23], 7, True, "127.0.0.1"),
        ("revocation", b"{}", "127.0.0.1"),
    ]


@pytest.mark.parametrize(
    "query",
    [
        "nonce=",
        "nonce=a-b",
        "nonce=" + "a" * 65,
        "nonce=a&nonce=b",
        "nonce=a&extra=1",
        "mask=0x1",
        "",
        "nonce=%00",
    ],
)
async def test_an_identity_call_out_of_its_form_is_refused(query, served):
    """A nonce that is missing, repeated, too long or of other characters is 400 with words, and nothing is quoted."""
    client, control = served
    async with client.get(f"/v2.5/quotes/identity?{query}") as answer:
        assert answer.status == 400
        body = await answer.json()
    assert body["code"] == 400
    assert "nonce" in body["status"]
    assert control.asked == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("nonce", ""),
        ("mask", "400"),
        ("mask", "0x"),
        ("mask", "0x1000000"),
        ("mask", "-0x1"),
        ("mask", None),
        ("partial", "2"),
        ("partial", None),
        ("ima_ml_entry", "-1"),
        ("ima_ml_entry", "\u0663"),
        ("ima_ml_entry", "1" * 10),
        ("ima_ml_entry", None),
    ],
)
async def test_an_integrity_call_out_of_its_form_is_refused(name, value, served):
    """Whatever one parameter lacks, the answer is 400 and names it, and nothing is quoted."""
    client, control = served
    params = {key: found for key, found in (INTEGRITY | {name: value}).items() if found is not None}
    async with client.get("/v2.5/quotes/integrity", params=params) as answer:
        assert answer.status == 400
        assert name in (await answer.json())["status"]
    assert control.asked == []


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/v2.5/keys/pubkey", 404),
        ("POST", "/v2.5/keys/ukey", 404),
        ("GET", "/v2.5/quotes/identity/x", 404),
        ("POST", "/version", 405),
        ("GET", "/v2.5/notifications/revocation", 405),
    ],
)
async def test_nothing_else_is_served(method, path, status, served):
    """Another path is 404 and another method 405, in the same form."""
    client, _ = served
    async with client.request(method, path) as answer:
        assert answer.status == status
        assert (await answer.json())["code"] == status


@pytest.mark.parametrize("path", ["/v1.0/quotes/identity?nonce=a", "/v3.0/quotes/integrity", "/v2.5x/quotes/identity"])
async def test_another_version_asks_for_the_versions_again(path, served):
    """Another version is 400 with the words by which Keylime knows what to do."""
    client, control = served
    async with client.get(path) as answer:
        assert answer.status == 400
        assert "API version not supported" in (await answer.json())["status"]
    assert control.asked == []


@pytest.mark.parametrize(
    "failure", [TpmError("TPM: hangs"), VerificationError("measurement-log", "x"), ConfigError("c")]
)
async def test_a_failure_of_the_node_s_is_one_that_keylime_retries(failure, served):
    """What the node fails at is 500, never a status to which Keylime gives it up."""
    client, control = served
    control.failure = failure
    async with client.get("/v2.5/quotes/integrity", params=INTEGRITY) as answer:
        assert answer.status == http.client.INTERNAL_SERVER_ERROR
        assert str(failure) in (await answer.json())["status"]


@pytest.mark.parametrize(
    ("failure", "status"), [(VerificationError("keylime-notification", "x"), 400), (AuditError("full"), 500)]
)
async def test_a_notification_that_is_none_is_the_sender_s_error(failure, status, served):
    """A malformed notification is 400; one that can't be recorded is not acknowledged; one that is too large is 413."""
    client, control = served
    control.failure = failure
    async with client.post("/v2.5/notifications/revocation", data=b"x") as answer:
        assert answer.status == status
    async with client.post("/v2.5/notifications/revocation", data=b"x" * (MAX_NOTIFICATION_BYTES + 1)) as answer:
        assert answer.status == 413
