"""A gateway's life, in process: what the agent hands over, what clients ask, what is reported and recorded."""

import asyncio
import contextlib
import json
import ssl
import string

import aiohttp
import msgspec
import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent import messages
from agent.identity.token import TokenVerifier
from agent.isolation.memfd import seal_bytes
from tests.support.gateway import START, Agent, until
from tests.support.identity import jwks
from tests.support.models import new_key, tiny_graph
from tests.support.node import node_home

__all__ = ["node_home"]

TINY = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 64], "data": [0.5] * 64}]}
INFER = "/v2/models/tiny/infer"


class Client:
    """Asks a gateway over TLS."""

    def __init__(self, agent, who="alice"):
        self._address = ("127.0.0.1", agent.port)
        self._base = f"https://127.0.0.1:{agent.port}"
        pki = agent.home / "pki"
        self._tls = ssl.create_default_context(cafile=str(pki / "ca.pem"))
        if who:
            self._tls.load_cert_chain(pki / f"{who}.pem", pki / f"{who}.key")

    async def ask(self, method, path, body=None, **headers):
        async with (
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=self._tls)) as session,
            session.request(method, self._base + path, json=body, headers=headers) as answer,
        ):
            data = await answer.read()
            return answer, json.loads(data) if data else None

    async def connect(self):
        return await asyncio.open_connection(*self._address, ssl=self._tls, server_hostname="127.0.0.1")

    async def infer(self, path=INFER, body=None):
        return await self.ask("POST", path, body or TINY)


def changed(**limits):
    return msgspec.structs.replace(START, **limits)


async def test_an_answer_waits_for_its_record(node_home):
    """Strict: while the agent is silent there is no answer; with its word there is."""
    async with Agent(node_home) as agent:
        await agent.serve(("tiny", "1"))
        agent.silent = True
        asking = asyncio.create_task(Client(agent).infer())
        await until(lambda: agent.events)
        await asyncio.sleep(0.05)
        assert not asking.done()
        agent.tell_bytes(messages.acknowledge_frame(1))
        answer, body = await asking
        assert answer.status == 200
        assert np.shape(body["outputs"][0]["data"]) == (10,)
        assert agent.events[0]["kind"] == "infer"


async def test_a_record_that_fails_refuses_the_answer(node_home):
    """The agent's refusal of a record is a 503 with a time to come back, and the answer is not sent."""
    async with Agent(node_home) as agent:
        await agent.serve(("tiny", "1"))
        agent.failure = "disk full"
        answer, body = await Client(agent).infer()
        assert (answer.status, body, answer.headers["Retry-After"]) == (
            503,
            {"error": "the audit log can't take a record"},
            "5",
        )
        answer, body = await Client(agent).ask("GET", "/v2/models/tiny")
        assert answer.status == 503
        agent.failure = ""
        assert (await Client(agent).infer())[0].status == 200


async def test_counters_are_reported(node_home):
    """What was answered and refused is counted, and reported within the interval."""
    async with Agent(node_home) as agent:
        await agent.serve(("tiny", "1"))
        await Client(agent).infer()
        await Client(agent).infer("/v2/models/none/infer")
        async with asyncio.timeout(20):
            while True:
                report = await agent.until(messages.Statistics)
                if "requests_total|model=tiny|outcome=ok" in report.counters:
                    break
                agent.said.clear()
        assert report.counters["requests_total|model=tiny|outcome=ok"] == 1
        assert report.counters["refusals_total|reason=unknown_model"] == 1
        assert report.in_work == 0


@pytest.mark.parametrize(
    "spoil",
    [
        lambda agent: agent.tell_bytes(b"no message"),
        lambda agent: agent.tell_bytes(messages.encode(messages.Ready())),
        lambda agent: agent.tell(messages.PolicyData("a" * 64)),
        lambda agent: agent.tell(messages.WorkerEndpoint(1, "a", "r"), 0),
        lambda agent: agent.tell(messages.LoadModel(1, "a", "1", "d", "s", ("x", "y"), last=True), 0),
        lambda agent: agent.tell(messages.PolicyData("a" * 64), 0),
        lambda agent: _policy_data(agent, b"{}"),
    ],
)
async def test_an_agent_that_disagrees_ends_the_gateway(node_home, spoil):
    """A message that is none, that has other descriptors than it says, or data that is not sealed or malformed: the gateway says so and ends."""
    async with Agent(node_home) as agent:
        await asyncio.sleep(0)
        spoil(agent)
        await agent.until(messages.Fatal)
        async with asyncio.timeout(20):
            await agent.running


def _policy_data(agent, document):
    data = seal_bytes("policy-data", document)
    agent.tell(messages.PolicyData("a" * 64), data.fd)
    data.close()


MANIFEST = {
    "name": "tiny",
    "version": "1",
    "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 64]}],
    "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 10]}],
}


def _files(model=None, **manifest):
    files = {"model.onnx": tiny_graph()[0].SerializeToString() if model is None else model}
    return {**files, "model.yaml": yaml.safe_dump({**MANIFEST, **manifest}).encode()}


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"model.yaml": b"x"}, "model.onnx"),
        (_files(b"no model"), "model-load"),
        (_files(inputs=[{"name": "z", "datatype": "FP32", "shape": [-1, 64]}]), "model-io"),
        (_files(labels="labels.txt"), "labels.txt"),
        ({**_files(labels="labels.txt"), "labels.txt": b"\xff"}, "labels"),
        ({**_files(), "model.yaml": b": ["}, "manifest"),
    ],
)
async def test_a_model_that_makes_no_session_is_reported_and_not_ready(node_home, files, words):
    """Why there is no session goes to the agent; callers get 503, and the gateway is not ready."""
    async with Agent(node_home) as agent:
        await agent.serve(("mixed", "1"))
        number = agent.give_model("tiny", "1", files)
        report = await agent.until(messages.ModelReport, 2)
        assert report.number == number
        assert words in report.error
        answer, body = await Client(agent).infer()
        assert answer.status == 503
        assert "unavailable" in body["error"]
        assert (await Client(agent).ask("GET", "/v2/health/ready"))[0].status == 503
        assert (await Client(agent).ask("GET", "/v2/models/tiny/ready"))[0].status == 503
        assert (await Client(agent).ask("GET", "/v2/models/mixed/ready"))[0].status == 200


async def test_a_package_of_many_files_comes_in_parts(node_home):
    """More files than a message holds descriptors arrive as one package."""
    async with Agent(node_home) as agent:
        agent.give_model("tiny", "1", {**_files(), **{f"data{n}": b"x" for n in range(254)}})
        assert (await agent.until(messages.ModelReport)).error == ""


async def test_a_model_that_is_taken_away_while_it_loads_never_answers(node_home):
    """An unload that comes before the session is ready wins."""
    async with Agent(node_home) as agent:
        await agent.serve(("mixed", "1"))
        agent.give_model("tiny", "1")
        agent.tell(messages.UnloadModel("tiny", "1"))
        assert (await agent.until(messages.ModelReport, 2)).error
        assert (await Client(agent).infer())[0].status == 404
        assert (await Client(agent).ask("GET", "/v2/health/ready"))[0].status == 200


async def test_the_highest_version_answers_and_each_by_its_name(node_home):
    """Without a version the highest answers; a version may hold a plus sign; an unloaded one is gone."""
    async with Agent(node_home) as agent:
        await agent.serve()
        for version in ("1", "2.0+cpu"):
            agent.give_model("tiny", version, _files(version=version))
        await agent.until(messages.ModelReport, 2)
        client = Client(agent)
        assert (await client.infer())[1]["model_version"] == "2.0+cpu"
        assert (await client.infer("/v2/models/tiny/versions/2.0+cpu/infer"))[0].status == 200
        assert (await client.infer("/v2/models/tiny/versions/2.0%2Bcpu/infer"))[0].status == 200
        assert (await client.infer("/v2/models/tiny/versions/1/infer"))[1]["model_version"] == "1"
        assert (await client.ask("GET", "/v2/models/tiny"))[1]["versions"] == ["1", "2.0+cpu"]
        agent.tell(messages.UnloadModel("tiny", "2.0+cpu"))
        await until(lambda: agent.gateway._registry.versions("tiny") == ("1",))
        assert (await client.infer())[1]["model_version"] == "1"


async def test_what_breaks_its_own_manifest_is_our_fault(node_home):
    """A model whose output is not as its manifest says is a 503 without a word of it; the record has the words."""
    async with Agent(node_home) as agent:
        await agent.serve()
        agent.give_model("tiny", "1", _files(outputs=[{"name": "y", "datatype": "FP32", "shape": [-1, 5]}]))
        await agent.until(messages.ModelReport)
        answer, body = await Client(agent).infer()
        assert (answer.status, body["error"]) == (503, "the node can't answer this request; its log says why")
        assert "model-output" in agent.events[-1]["error"]


async def test_a_decision_of_a_policy_without_its_data_is_not_used(node_home):
    """Limits and profiles of one policy are never applied to the decision of another."""
    async with Agent(node_home) as agent:
        await agent.serve(("tiny", "1"))
        agent.gateway._flow.data = _of_another_policy(agent.gateway._flow.data)
        answer, _ = await Client(agent).infer()
        assert answer.status == 503
        assert "no longer in force" in agent.events[-1]["error"]


def _of_another_policy(data):
    """Return the data under the name of another policy."""
    return type(data)("e" * 64, data.limits, data.default_limit, sanitizers=data.sanitizers, outputs=data.outputs)


async def test_one_request_too_many_is_busy(node_home):
    """Past the number of requests in work the next is 503, recorded, and the place is free again afterwards."""
    async with Agent(node_home, changed(max_concurrent=1)) as agent:
        await agent.serve(("tiny", "1"))
        reader, writer = await Client(agent).connect()
        body = json.dumps(TINY).encode()
        writer.write(f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode())
        await until(lambda: agent.gateway._routes.in_work)
        answer, refused = await Client(agent).infer()
        assert (answer.status, refused, answer.headers["Retry-After"]) == (
            503,
            {"error": "too many requests are in work"},
            "1",
        )
        assert agent.events[-1]["detail"] == {"reason": "busy"}
        writer.write(body)
        assert (await reader.readline()) == b"HTTP/1.1 200 OK\r\n"
        writer.close()
        assert (await Client(agent).infer())[0].status == 200


async def test_a_body_that_ends_early_is_400(node_home):
    """A client that leaves in the middle of its body gets its refusal recorded."""
    async with Agent(node_home) as agent:
        await agent.serve(("tiny", "1"))
        _, writer = await Client(agent).connect()
        writer.write(f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: 999\r\n\r\n{{".encode())
        await until(lambda: agent.gateway._routes.in_work)
        writer.close()
        await until(lambda: agent.events)
        assert agent.events[-1]["detail"] == {"reason": "body_cut_short"}


async def test_draining_ends_the_requests_in_work_first(node_home):
    """In a drain new connections are refused, the readiness of open ones is false, what is in work is answered, and then it ends."""
    async with Agent(node_home) as agent:
        await agent.serve(("tiny", "1"))
        reader, writer = await Client(agent).connect()
        body = json.dumps(TINY).encode()
        writer.write(f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode())
        other_reader, other = await Client(agent).connect()
        await until(lambda: agent.gateway._routes.in_work)
        agent.tell(messages.Drain(20_000))
        await until(lambda: agent.gateway._routes.draining)
        other.write(b"GET /v2/health/ready HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await other_reader.readline()).startswith(b"HTTP/1.1 503 ")
        with pytest.raises(ConnectionRefusedError):
            await Client(agent).connect()
        assert messages.Drained() not in agent.said
        writer.write(body)
        assert (await reader.readline()) == b"HTTP/1.1 200 OK\r\n"
        await agent.until(messages.Drained)
        async with asyncio.timeout(20):
            await agent.running
        for end in (writer, other):
            end.close()


async def test_tokens_make_certificates_optional(node_home):
    """With tokens accepted a request without either is 401; a certificate alone still counts."""
    tokens = TokenVerifier(jwks(k1=new_key()), audience="edge-0001")
    rules = messages.TokenRules("edge-0001", None, "roles")
    async with Agent(node_home, changed(tokens=rules), tokens) as agent:
        await agent.serve(("tiny", "1"))
        answer, _ = await Client(agent, None).infer()
        assert (answer.status, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
        answer, _ = await Client(agent, None).ask("POST", INFER, TINY, Authorization="Basic abc")
        assert answer.status == 401
        assert (await Client(agent).infer())[0].status == 200


PATHS = st.one_of(
    st.text(string.printable, max_size=30).map(lambda text: "/v2/" + text),
    st.lists(
        st.sampled_from(["v2", "models", "tiny", "versions", "1", "infer", "ready", "config", "..", "%2f", ""]),
        max_size=7,
    ).map(lambda parts: "/" + "/".join(parts)),
)


@settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(st.sampled_from(["GET", "POST", "PUT", "DELETE", "OPTIONS", "X"]), PATHS), min_size=60, max_size=60
    )
)
def test_every_path_is_answered_in_the_same_form(node_home, calls):
    """Whatever is asked for, it is a success, or an error of the protocol's form that is recorded or counted; never a 500."""

    async def run():
        async with Agent(node_home) as agent:
            await agent.serve(("tiny", "1"))
            for method, path in calls:
                reader, writer = await Client(agent).connect()
                line = f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
                writer.write(line.encode())
                with contextlib.suppress(ConnectionError):
                    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
                    status = int(head.split()[1])
                    assert status in {200, 400, 403, 404, 405}, (line, head)
                    if status != 200:
                        assert set(json.loads(body)) == {"error"}
                writer.close()

    asyncio.run(run())
