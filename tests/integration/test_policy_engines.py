"""The two engines on the same bundles: the shipped one, and small policies made from a seed.

Where an engine errs, its answer is a deny; where both answer, they answer the same.
"""

import asyncio
import contextlib
import gc
import json
import socket
import ssl
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import msgspec
import numpy as np
import pytest
import requests

from agent.errors import IsolationError, PolicyError
from agent.isolation.memfd import seal_bytes
from agent.isolation.supervisor import Zygote
from agent.policy import opa as opa_rules
from agent.policy import opa_server
from agent.policy.build import build
from agent.policy.bundle import Bundle
from agent.policy.embedded import EmbeddedEngine
from agent.policy.engine import Engine
from agent.policy.opa import OpaAccess, OpaEngine
from agent.policy.opa_server import OpaProgram, OpaServer
from agent.policy.samples import SAMPLES
from tests.support.policy import HOSTILE, OPA, ROOT, bundle, document
from tests.support.policy_inputs import generate

pytestmark = [pytest.mark.integration, pytest.mark.xdist_group("isolation")]
PROGRAM = OpaProgram(str(OPA))
SHIPPED_INPUTS = 2000
SEED = 20260704


@pytest.fixture(scope="module")
def zygote():
    started = Zygote.start([])
    yield started
    started.close()


@pytest.fixture(autouse=True)
def engines_end_here() -> Iterator[None]:
    """Collect engines in the thread that made them; caught errors keep them alive in cycles."""
    yield
    gc.collect()


@contextlib.asynccontextmanager
async def serving(zygote, data: bytes):
    """A real OPA server on this bundle."""
    sealed = seal_bytes("policy", data)
    server = await OpaServer.start(zygote, PROGRAM, sealed)
    try:
        yield server
    finally:
        process = server._process
        server.close()
        assert process is not None
        await process.wait()
        sealed.close()


def outcome(engine: Engine, value: object) -> object:
    """Return the decision, or ``deny`` for an error."""
    try:
        return json.loads(engine.evaluate(json.dumps(value).encode()))
    except PolicyError:
        return "deny"


async def test_the_shipped_bundle_decides_alike(zygote):
    """Over generated and sample inputs both engines give one and the same decision; both answers occur."""
    data = build(ROOT / "rego", ROOT / "policies", "test")
    embedded = EmbeddedEngine(Bundle.from_bytes(data))
    seen: Counter[object] = Counter()
    async with serving(zygote, data) as server:
        engine = OpaEngine(server.access)
        engine.check()
        for value in [*SAMPLES.values(), *generate(SEED, SHIPPED_INPUTS)]:
            ours, theirs = outcome(embedded, value), outcome(engine, value)
            assert ours == theirs, value
            seen[ours["allow"] if isinstance(ours, dict) else ours] += 1
    assert seen[True] > SHIPPED_INPUTS / 20
    assert seen[False] > SHIPPED_INPUTS / 20


# Conditions over an input whose members may be missing or of any type: what engines disagree about, if they do.
_CONDITIONS = [
    "input.a == {v}", "input.a != {v}", "input.a < {v}", "input.a >= input.b", "not input.a", "not input.c.d", "input.c.d == {v}",
    "input.a in [{v}, 1, null]", "some x in input.l; x == {v}", "every x in input.l {{ x != {v} }}", "count(input.l) > {n}",
    "input.l[_] == {v}", "input.l[{n}] == {v}", "sum(input.l) > {n}", "max(input.l) == {v}", 'startswith(input.s, "a")',
    "contains(input.s, input.a)", 'lower(input.s) == "abc"', 'regex.match("^[a-c]+$", input.s)', "to_number(input.s) > {n}",
    'net.cidr_contains("10.0.0.0/8", input.s)', 'net.cidr_contains(input.s, "10.0.0.1")', "time.parse_rfc3339_ns(input.s) > {n}",
    'object.get(input, ["c", "d"], {v}) == {v}', "{{x | some x in input.l}} == {{1, {v}}}", "[x | some x in input.l; x == {v}] == []",
    "is_string(input.a)", "is_number(input.a)", 'sprintf("%v", [input.a]) == "1"', 'sprintf("%d", [input.n]) == "1"',
    'trim_space(input.s) == "a"', 'split(input.s, ",")[0] == "a"', 'concat("-", input.l) == "a-b"',
    "json.unmarshal(input.s) == {v}", 'semver.compare(input.s, "1.0.0") >= 0', "input.n / input.m > {n}", "input.n % input.m == {n}",
    "array.slice(input.l, 0, 1) == [{v}]", 'object.keys(input.c) == {{"d"}}', "union({{{{1}}, {{{v}}}}}) == {{1}}", "walked",
    "units.parse_bytes(input.s) > {n}", 'base64.decode(input.s) == "a"', 'glob.match("a*", [], input.s)', "helper(input.a)",
    "not blocked", "blocked", "input[input.s] == {v}", 'indexof(input.s, "b") == {n}', 'substring(input.s, 0, {n}) == "a"',
    "bits.and(input.n, 3) == {n}", "round(input.n) == {n}", "sort(input.l)[0] == {v}", "numbers.range(1, 3)[{n}] == input.n",
]  # fmt: skip
_LITERALS = ['"a"', '"abc"', "1", "2", "true", "null", "1.5", '["a"]', '{"d": 1}', "0", '""']
_POLICIES, _INPUTS = 250, 12


def generated_policy(source: np.random.Generator) -> str:
    """Return rules of one to three conditions each, some under a default, some negated through another rule."""

    def body() -> str:
        chosen = source.choice(_CONDITIONS, size=source.integers(1, 4))
        return "\n\t".join(
            text.format(v=source.choice(_LITERALS), n=source.integers(0, 3)) for text in map(str, chosen)
        )

    default = 'default decision := {"allow": false}\n' if source.random() < 0.5 else ""
    plain = [text for text in _CONDITIONS if "blocked" not in text and "helper" not in text and "walked" not in text]
    simple = [str(source.choice(plain)).format(v=source.choice(_LITERALS), n=source.integers(0, 3)) for _ in range(3)]
    return f"""package edgewarden.authz
{default}decision := {{"allow": true}} if {{
	{body()}
}} else := {{"allow": false, "reasons": ["else"]}} if {{
	{body()}
}}
blocked if {{ {simple[0]} }}
helper(_) if {{ {simple[1]} }}
walked if {{
	walk(input, [path, value])
	count(path) > 1
	value == 1
}}
walked if {{ {simple[2]} }}
"""


def generated_input(source: np.random.Generator) -> dict[str, object]:
    """Return a document with some of the members that the conditions ask for, of any type."""
    values: list[object] = ["a", "abc", "10.0.0.1", "10.0.0.0/8", "2026-01-01T00:00:00Z", "1.2.3", "12", "a,b", "", "YQ==", "1KiB",
                            0, 1, 2, 1.5, -1, True, False, None, [], ["a", "b"], [1, 2], [1, "a", None], {"d": 1}, {"d": "a"}, {}]  # fmt: skip
    usual: dict[str, list[object]] = {
        "s": values[:11],
        "l": values[19:23],
        "c": values[23:],
        "n": values[11:16],
        "m": values[11:14],
    }
    found: dict[str, object] = {}
    for name in "abcslnm":
        if source.random() < 0.8:
            likely = usual.get(name, values) if source.random() < 0.7 else values
            found[name] = likely[int(source.integers(len(likely)))]
    return found


async def test_generated_policies_decide_alike(zygote):
    """On small policies over any input, two answers never differ, and an allow never stands against another answer."""
    source = np.random.default_rng(SEED)
    seen: Counter[str] = Counter()
    modules: list[str] = []
    inputs = [generated_input(source) for _ in range(_INPUTS)]
    while len(modules) < _POLICIES:
        module = generated_policy(source)
        with contextlib.suppress(
            PolicyError
        ):  # OPA's type checker is asked below; this one refuses what it cannot read
            EmbeddedEngine(Bundle.from_bytes(bundle(module)))
            modules.append(module)
    # One server for all: each policy in a package of its own.
    names = [f"p{number}" for number in range(len(modules))]
    renamed = [
        module.replace("edgewarden.authz", f"edgewarden.{name}", 1) for name, module in zip(names, modules, strict=True)
    ]
    async with serving(zygote, bundle(*renamed)) as server:
        client = OpaEngine(server.access)._client
        for name, module in zip(names, modules, strict=True):
            embedded = EmbeddedEngine(Bundle.from_bytes(bundle(module)))
            for value in inputs:
                ours = outcome(embedded, value)
                theirs = asked(client, name, value)
                if "deny" not in (ours, theirs):
                    assert ours == theirs, (module, value)
                seen[f"{kind(ours)} {kind(theirs)}"] += 1
    assert seen["allow deny"] == 0, "the embedded engine allows where OPA errs"
    assert seen["allow allow"] > 50
    assert seen["refuse refuse"] > 50
    assert seen["deny deny"] > 100


def asked(client, package: str, value: object) -> object:
    """Ask OPA for one package's decision; an error or no decision is ``deny``."""
    try:
        answer = client.query_rule(value, f"edgewarden.{package}", "decision", {"strict-builtin-errors": "true"})
    except requests.RequestException:
        return "deny"
    return answer.get("result", "deny")


def kind(answer: object) -> str:
    if isinstance(answer, dict):
        return "allow" if answer["allow"] else "refuse"
    return "deny"


async def test_the_server_answers_nobody_else(zygote):
    """Without the token nothing is answered, with it nothing can be changed, and a stranger's certificate is not trusted."""
    async with serving(zygote, bundle(HOSTILE)) as server:
        access = server.access
        question = json.dumps(document("infer")).encode()
        assert json.loads(await asyncio.to_thread(OpaEngine(access).evaluate, question)) == {"allow": True}
        with pytest.raises(PolicyError, match="OPA"):
            OpaEngine(msgspec.structs.replace(access, token="x" * 64)).evaluate(question)
        stranger, _ = opa_server._certificate()
        with pytest.raises(PolicyError, match="does not answer"):
            OpaEngine(msgspec.structs.replace(access, certificate=stranger.decode())).evaluate(question)
        session = OpaEngine(access)._session
        root = f"https://127.0.0.1:{access.port}/v1"
        for method, path in (("PUT", "policies/x"), ("PUT", "data/x"), ("PATCH", "data"), ("DELETE", "policies/x"),
                             ("GET", "data"), ("GET", "config"), ("GET", "policies"), ("POST", "query"), ("POST", "compile")):  # fmt: skip
            assert session.request(method, f"{root}/{path}", data="{}", timeout=5).status_code == 401, path


async def test_the_environment_does_not_lead_astray(zygote, monkeypatch, tmp_path):
    """Neither a proxy nor a certificate bundle of the environment is used for the question."""
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "nothing"))
    async with serving(zygote, bundle(HOSTILE)) as server:
        answer = await asyncio.to_thread(OpaEngine(server.access).evaluate, b'{"action":"infer"}')
        assert json.loads(answer) == {"allow": True}


async def test_an_opa_that_cannot_be_run_is_the_hosts_fault(zygote, tmp_path):
    """A missing binary is an isolation error."""
    sealed = seal_bytes("policy", bundle(HOSTILE))
    with pytest.raises(IsolationError, match="cannot run"):
        await OpaServer.start(zygote, OpaProgram(str(tmp_path / "opa")), sealed)
    sealed.close()


async def test_a_program_that_never_answers_is_given_up(zygote, monkeypatch, tmp_path):
    """A server that is not ready in time is refused and ended."""
    monkeypatch.setattr(opa_server, "_READY_TIMEOUT_S", 0.3)
    sleeper = tmp_path / "opa"
    sleeper.write_text("#!/bin/sh\nexec sleep 100\n")
    sleeper.chmod(0o755)
    sealed = seal_bytes("policy", bundle(HOSTILE))
    with pytest.raises(PolicyError, match="not ready"):
        await OpaServer.start(zygote, OpaProgram(str(sleeper)), sealed)
    sealed.close()


async def test_a_server_that_was_closed_does_not_come_back(zygote):
    """After its end nothing is started again."""
    async with serving(zygote, bundle(HOSTILE)) as server:
        server.close()
        with pytest.raises(IsolationError, match="retired"):
            await server._spawn()


class _Answers(BaseHTTPRequestHandler):
    """A server that answers what a test says."""

    status, body = 200, b"{}"

    def do_POST(self) -> None:
        self.send_response(type(self).status)
        self.end_headers()
        self.wfile.write(type(self).body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def odd_server() -> Iterator[OpaEngine]:
    """An engine whose server answers oddly, over TLS with the certificate that it expects."""
    certificate, key = opa_server._certificate()
    server = HTTPServer(("127.0.0.1", 0), _Answers)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    pem = seal_bytes("pem", key + certificate)
    context.load_cert_chain(f"/proc/self/fd/{pem.fd}")
    pem.close()
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    engine = OpaEngine(OpaAccess(server.server_port, "t", certificate.decode()))
    yield engine
    engine._client.close_connection()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (200, b"{}", "undefined"),
        (200, b"no json", "does not answer"),
        (500, b'{"errors":[{"message":"eval","location":{"file":"a.rego","row":3}}]}', "a.rego:3: eval"),
        (500, b'{"code":"internal_error","message":"boom"}', "boom"),
        (500, b"no json", "HTTP 500"),
        (500, b"[]", "HTTP 500"),
        (500, b'{"errors":{"x":1}}', "HTTP 500"),
        (500, b'{"errors":["x"]}', "HTTP 500"),
    ],
)
def test_whatever_the_server_answers_is_a_decision_or_our_error(odd_server, monkeypatch, status, body, words):
    """Odd answers are policy errors with the server's words where it has any."""
    monkeypatch.setattr(_Answers, "status", status)
    monkeypatch.setattr(_Answers, "body", body)
    with pytest.raises(PolicyError, match=words):
        odd_server.evaluate(b"{}")


def test_an_error_without_a_response_has_words():
    """The client's error may carry no response."""
    assert opa_rules._words(None) == "no response"


def test_a_server_that_is_not_there_is_our_error(monkeypatch):
    """Nobody listening, and an input that is no JSON, are policy errors; the wait for readiness ends."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        engine = OpaEngine(OpaAccess(taken.getsockname()[1], "t", opa_server._certificate()[0].decode()))
        with pytest.raises(PolicyError, match="does not answer"):
            engine.evaluate(b"{}")
        with pytest.raises(PolicyError):
            engine.evaluate(b"{")
        monkeypatch.setattr(opa_rules, "_READY_TIMEOUT_S", 0.05)
        with pytest.raises(PolicyError, match="not ready"):
            engine.check()
