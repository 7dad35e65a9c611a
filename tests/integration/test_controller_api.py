"""The operators' surface: who may do what, what it says of itself, and its audit log."""

import asyncio
import re
import socket

import aiohttp
import pytest
import yaml
from aiohttp import web
from click.testing import CliRunner
from cryptography.hazmat.primitives import serialization
from openapi_spec_validator import validate
from standardwebhooks import Webhook

from agent.audit.merkle import leaf_hash, verify_inclusion
from agent.errors import ConfigError, HostError, PolicyError
from controller.api.limiter import MAX_SOURCES, Limiter
from controller.cli import admin, node, poll, reference, service, token
from controller.settings import DatabaseSettings, database_url, load
from controller.store.database import Database
from tests.support.controller_service import controller_home, desk, eventually
from tests.support.software_node import SoftwareNode, Vendor

pytestmark = pytest.mark.integration
VENDOR = Vendor()


@pytest.fixture
def config(tmp_path):
    return controller_home(tmp_path, VENDOR.pem())


@pytest.fixture
async def office(config):
    async with desk(config) as running:
        await running.approve()
        yield running


def _invoke(command, *arguments, **more):
    return CliRunner().invoke(command, [str(argument) for argument in arguments], catch_exceptions=False, **more)


async def _cli(office, config, command, *arguments, **more):
    """The command line, beside the controller; its directory names the port that was free."""
    access = config.parent / "admin"
    (access / "url").write_text(office.url)
    return await asyncio.to_thread(_invoke, command, *arguments, "--admin", access, **more)


async def test_without_a_certificate_nothing_is_shown(office):
    """401, and the attempt is in the audit log."""
    async with office.anyone.get(office.url + "/v1/nodes") as answer:
        assert answer.status == 401
    (record,) = await office.records("node.list")
    assert (record["outcome"], record["check"]) == ("denied", "no_certificate")


async def test_a_node_s_certificate_is_no_admin_s(office, tmp_path):
    """It is of the same CA, and grants nothing here."""
    edge = SoftwareNode(vendor=VENDOR)
    await edge.enrol(office.anyone, office.url, await office.token())
    connector = aiohttp.TCPConnector(ssl=_node_context(edge, tmp_path))
    async with aiohttp.ClientSession(connector=connector) as session, session.get(office.url + "/v1/nodes") as answer:
        assert (answer.status, (await answer.json())["check"]) == (403, "no_admin")


def _node_context(edge, folder):
    import ssl  # noqa: PLC0415 -- a helper of one function

    (folder / "n.pem").write_text(edge.grant["certificate"])
    encoding = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "n.key").write_bytes(edge.control.private_bytes(*encoding))
    (folder / "ca.pem").write_text(edge.grant["ca"])
    context = ssl.create_default_context(cafile=str(folder / "ca.pem"))
    context.load_cert_chain(folder / "n.pem", folder / "n.key")
    return context


async def test_roles_are_steps_and_a_revoked_admin_is_nobody(office, config, tmp_path):
    """A viewer sees, an operator makes tokens, only an approver approves; revoking takes effect at once."""
    (config.parent / "admin" / "url").write_text(office.url)
    for role in ("viewer", "operator"):
        made = await _cli(office, config, admin.command, "create", role, "--role", role, "--out", tmp_path / role)
        assert made.exit_code == 0, made.output
    allowed = {}
    for role in ("viewer", "operator"):
        for name, method, path, body in (
            ("see", "GET", "/v1/nodes", None),
            ("token", "POST", "/v1/tokens", {"group": "default"}),
            ("approve", "POST", "/v1/groups/default/references", {}),
            ("admin", "DELETE", "/v1/admins/viewer", None),
        ):
            allowed[role, name] = await _status(office, tmp_path / role, method, path, body)
    assert allowed == {
        ("viewer", "see"): 200,
        ("viewer", "token"): 403,
        ("viewer", "approve"): 403,
        ("viewer", "admin"): 403,
        ("operator", "see"): 200,
        ("operator", "token"): 201,
        ("operator", "approve"): 403,
        ("operator", "admin"): 403,
    }
    assert (await _cli(office, config, admin.command, "revoke", "viewer")).exit_code == 0
    assert await _status(office, tmp_path / "viewer", "GET", "/v1/nodes", None) == 403
    listed = await _cli(office, config, admin.command, "list")
    assert re.search(r"viewer +viewer +revoked", listed.output)
    assert (await office.records("reference.approve"))[-1]["outcome"] == "denied"


async def _status(office, access, method, path, body):
    import ssl  # noqa: PLC0415 -- a helper of one function

    context = ssl.create_default_context(cafile=str(access / "ca.pem"))
    context.load_cert_chain(access / "certificate.pem", access / "key.pem")
    async with (
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context)) as session,
        session.request(method, office.url + path, json=body) as answer,
    ):
        return answer.status


async def test_the_description_is_valid_and_whole(office):
    """The OpenAPI document validates, and names every route with its action."""
    described = await (await office.anyone.get(office.url + "/openapi.json")).json()
    validate(described)
    assert described["paths"]["/v1/nodes/{node}/poll"]["post"]["x-edgewarden-action"] == "node.poll"
    assert "/node/v1/enrol" in described["paths"]
    assert "/openapi.json" in described["paths"]


async def test_every_change_has_a_record_that_the_tree_holds(office):
    """Records are numbered without gap, and each is proven by the root."""
    await office.token()
    head = await office.call("GET", "/v1/audit/head")
    records = await office.call("GET", "/v1/audit?limit=1000")
    assert [record["sequence"] for record in records] == list(range(head["size"]))
    assert [record["kind"] for record in records] == ["admin.create", "reference.approve", "token.create"]
    for index in range(head["size"]):
        proven = await office.call("GET", f"/v1/audit/proofs/{index}")
        path = [bytes.fromhex(part) for part in proven["proof"]]
        leaf = leaf_hash(proven["record"].encode())
        verify_inclusion(leaf, index, head["size"], path, bytes.fromhex(head["root"]))
    await office.call("GET", "/v1/audit/proofs/99", expect=404)
    await office.call("GET", "/v1/audit/proofs/x", expect=400)


BAD = [
    ("GET", "/v1/nodes?limit=x", None, 400),
    ("GET", "/v1/nodes/nobody", None, 404),
    ("GET", "/v1/nodes/nobody/result", None, 404),
    ("POST", "/v1/nodes/nobody/poll", None, 404),
    ("DELETE", "/v1/nodes/nobody", None, 404),
    ("POST", "/v1/tokens", {"group": "nowhere"}, 404),
    ("POST", "/v1/tokens", {"group": "default", "more": 1}, 400),
    ("POST", "/v1/tokens", {"group": "a b"}, 400),
    ("POST", "/v1/groups/new/references", {}, 422),
    ("POST", "/v1/groups/a%20b/references", {}, 400),
    ("POST", "/v1/groups/default/references", {"pcr": 13}, 422),
    ("POST", "/v1/groups/default/references", {"boot": {"10": {"mode": "pinned"}}}, 422),
    ("POST", "/v1/groups/default/references", {"boot": {"14": {"mode": "pinned"}}}, 422),
    ("POST", "/v1/groups/default/references", {"boot": {"-1": {"mode": "pinned"}}}, 422),
    ("POST", "/v1/groups/default/references", {"boot": {"7": {"mode": "exact"}}}, 422),
    ("POST", "/v1/groups/default/references", {"boot": {"7": {"mode": "exact", "values": ["AB"]}}}, 400),
    ("POST", "/v1/groups/default/references", {"boot": {"7": {"mode": "ignored", "values": ["ab" * 32]}}}, 422),
    (
        "POST",
        "/v1/groups/default/references",
        {"boot": {"7": {"mode": "pinned", "values": [f"{number:064x}" for number in range(257)]}}},
        422,
    ),
    ("POST", "/v1/groups/default/withdrawals", {"kind": "boot", "what": "7=" + "ab" * 32}, 404),
    ("POST", "/v1/groups/default/withdrawals", {"kind": "boot", "what": "7"}, 404),
    ("POST", "/v1/groups/default/withdrawals", {"kind": "model", "what": "m/9"}, 404),
    ("POST", "/v1/groups/default/withdrawals", {"kind": "config", "what": "00"}, 404),
    ("POST", "/v1/groups/default/withdrawals", {"kind": "policy", "what": "00"}, 404),
    ("POST", "/v1/groups/nowhere/withdrawals", {"kind": "model", "what": "m/1"}, 404),
    ("GET", "/v1/groups/default/references/99", None, 404),
    ("GET", "/v1/groups/default/references/x", None, 400),
    ("GET", "/v1/groups/nowhere/references/current", None, 404),
    ("POST", "/v1/admins", {"name": "a", "role": "viewer", "csr": "AAAA"}, 422),
    ("DELETE", "/v1/admins/nobody", None, 404),
    ("PUT", "/v1/nodes/nobody/interval", {"interval_s": 30}, 404),
    ("PUT", "/v1/nodes/nobody/interval", {"interval_s": 0}, 400),
    ("PUT", "/v1/groups/nowhere/interval", {"interval_s": 30}, 404),
    ("PUT", "/v1/groups/default/interval", {"interval_s": None}, 400),
    ("GET", "/v2/nothing", None, 404),
    ("PUT", "/v1/nodes", None, 405),
]


@pytest.mark.parametrize(("method", "path", "body", "status"), BAD)
async def test_bad_input_gets_a_named_refusal(office, method, path, body, status):
    """A status that fits its blame and words, never a 500."""
    answer = await office.call(method, path, body, expect=status)
    assert answer["error"]


async def test_the_assigned_policy_can_t_be_withdrawn(office):
    """Else no policy would be right."""
    assigned = (await office.call("GET", "/v1/groups/default/references/current"))["policy"]["assigned"]
    answer = await office.call(
        "POST", "/v1/groups/default/withdrawals", {"kind": "policy", "what": assigned}, expect=422
    )
    assert answer["check"] == "assigned"


async def test_a_change_of_trust_reaches_a_webhook(office):
    """Signed, by the secret that was shown once; a removed hook gets nothing and is gone."""
    heard = []

    async def hear(request):
        heard.append((dict(request.headers), await request.read()))
        return web.Response(status=204)

    application = web.Application()
    application.add_routes([web.post("/hook", hear)])
    runner = web.AppRunner(application, shutdown_timeout=0)
    await runner.setup()
    sock = socket.create_server(("127.0.0.1", 0))
    await web.SockSite(runner, sock).start()
    try:
        url = f"http://127.0.0.1:{sock.getsockname()[1]}/hook"
        hook = await office.call("POST", "/v1/hooks", {"url": url, "kinds": ["node.result"]}, expect=201)
        await SoftwareNode(vendor=VENDOR).enrol(office.anyone, office.url, await office.token())

        async def came():
            return heard

        await eventually(came)
        headers, body = heard[0]
        event = Webhook(hook["secret"]).verify(body, {name.lower(): value for name, value in headers.items()})
        assert (event["kind"], event["node"], event["status"]) == ("node.result", "edge-1", "affirming")
        (listed,) = await office.call("GET", "/v1/hooks")
        assert "secret" not in listed
        await office.call("DELETE", f"/v1/hooks/{hook['id']}")
        await office.call("DELETE", f"/v1/hooks/{hook['id']}", expect=404)
        await office.call("POST", "/v1/hooks", {"url": "http://example.org/"}, expect=400)
    finally:
        await runner.cleanup()


async def test_a_compressed_body_is_not_taken(office):
    """A small body can't become a large one."""
    async with office.admin.post(office.url + "/v1/tokens", data=b"x", headers={"Content-Encoding": "gzip"}) as answer:
        assert answer.status == 415


async def test_the_command_line_shows_a_fleet(office, config):
    """Tokens, nodes, history, polls and releases, for people and as JSON."""
    edge = SoftwareNode(vendor=VENDOR)
    runner = await edge.serve()
    try:
        made = await _cli(office, config, token.command, "create", "--label", "site=north", "--node", "edge-1")
        assert made.exit_code == 0, made.output
        from agent.attest.enrolment import JoinToken  # noqa: PLC0415 -- one use

        (text,) = re.findall(r"ew1\.\S+", made.output)
        await edge.enrol(office.anyone, office.url, JoinToken.parse(text))
        polled = await _cli(office, config, poll.command, "edge-1")
        assert (polled.exit_code, polled.output) == (0, "edge-1: affirming\n")
        listed = await _cli(office, config, node.command, "list")
        assert re.search(r"edge-1 +default +affirming", listed.output)
        shown = await _cli(office, config, node.command, "show", "edge-1")
        assert "label              site=north" in shown.output
        assert "used by edge-1" in (await _cli(office, config, token.command, "list")).output
        for command, *arguments in (
            (node.command, "list", "--json", "--status", "warning"),
            (node.command, "show", "edge-1", "--json"),
            (token.command, "list", "--json"),
            (admin.command, "list", "--json"),
            (reference.command, "list", "--json"),
        ):
            outcome = await _cli(office, config, command, *arguments)
            assert outcome.exit_code == 0
            assert yaml.safe_load(outcome.output) is not None
        withdrawn = await _cli(office, config, reference.command, "withdraw", "model", "m/1", "-m", "a flaw")
        assert "withdrew model m/1: a flaw" in withdrawn.output
        bad = await _cli(office, config, poll.command, "edge-1")
        assert bad.exit_code == 1
        assert "do: unload it on the node" in bad.output
        assert "gone " in (await _cli(office, config, reference.command, "list")).output
        signed = await office.call("GET", "/v1/nodes/edge-1/result")
        assert signed["result"].count(".") == 2
        gone = await _cli(office, config, node.command, "release", "edge-1", "--yes")
        assert gone.output.endswith("released\n")
        with pytest.raises(PolicyError, match="no node 'edge-1'"):
            await _cli(office, config, node.command, "show", "edge-1")
    finally:
        await runner.cleanup()


def test_without_a_controller_the_command_line_says_so(config):
    """Nobody answers, or there is no access: a clear error for each."""
    with pytest.raises(HostError, match="does not answer"):
        _invoke(node.command, "list", "--admin", config.parent / "admin")
    with pytest.raises(ConfigError, match="no admin's access"):
        _invoke(node.command, "list", "--admin", config.parent / "nobody")


def test_a_controller_is_not_made_twice(config):
    """Keys are never replaced."""
    with pytest.raises(ConfigError, match="there is a controller already"):
        _invoke(service.command, "init", config.parent, "--url", "https://localhost:1")
    config.unlink()
    with pytest.raises(ConfigError, match="holds a controller's keys already"):
        _invoke(service.command, "init", config.parent, "--url", "https://localhost:1")


def test_a_start_that_failed_can_be_tried_again(tmp_path):
    """A database that is not there or settings that are none leave neither keys nor settings behind."""
    home = tmp_path / "c"
    for option, words in (
        (("--database", f"sqlite+aiosqlite:///{tmp_path}/none/c.db"), "No such file"),
        (("--database", "mysql://x/y"), "begins with"),
        (("--metrics", "0.0.0.0:1"), "not a loopback address"),
    ):
        with pytest.raises((ConfigError, HostError), match=words):
            _invoke(service.command, "init", home, "--url", "https://localhost:1", *option)
        assert list(home.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"exists|Not a directory"):
        _invoke(service.command, "init", tmp_path / "file" / "c", "--url", "https://localhost:1")
    assert _invoke(service.command, "init", home, "--url", "https://localhost:1").exit_code == 0


def test_settings_are_checked(config, tmp_path):
    """What is unknown, unreadable or of the wrong kind is named; the schema can be printed."""
    assert "valid" in _invoke(service.command, "run", "--config", config, "--check").output
    assert "EnrolmentSettings" in _invoke(service.command, "run", "--schema").output
    with pytest.raises(ConfigError, match="controller init"):
        load(tmp_path / "none.yaml")
    for text, words in (
        ("listen: [", "controller.yaml"),
        ("more: 1", "unknown field"),
        ("nats: {url: 'tls://me:secret@nats.example:4222'}", "nats"),
        ("# " + "x" * 300_000, "larger"),
    ):
        config.write_text(text)
        with pytest.raises(ConfigError, match=words):
            load(config)


def test_relative_paths_are_the_file_s(config):
    """Files that the settings name lie beside them."""
    text = {"oidc": {"issuer": "i", "audience": "a", "jwks": "j.json"}, "nats": {"url": "nats://n", "ca": "ca.pem"}}
    config.write_text(yaml.safe_dump(text))
    settings = load(config)
    assert settings.oidc
    assert settings.nats
    assert (settings.oidc.jwks, settings.nats.ca) == (str(config.parent / "j.json"), str(config.parent / "ca.pem"))


def test_databases_are_of_two_kinds(tmp_path):
    """Another driver, a password in the open and a password file that is gone are refused."""
    (tmp_path / "password").write_text("s3\n")
    good = DatabaseSettings(url="postgresql+asyncpg://me@db/ew", password_file=str(tmp_path / "password"))
    assert database_url(good).password == "s3"
    for url, file in (
        ("mysql://x", None),
        ("nonsense", None),
        ("postgresql+asyncpg://me:pw@db/ew", None),
        ("postgresql+asyncpg://me@db/ew", str(tmp_path / "none")),
    ):
        with pytest.raises(ConfigError, match="database"):
            database_url(DatabaseSettings(url=url, password_file=file))


async def test_sqlite_is_for_one_replica(config):
    """A second one is refused, by the file's lock."""
    first = await Database.open(load(config).database)
    with pytest.raises(HostError, match="SQLite is for one replica"):
        await Database.open(load(config).database)
    await first.close()
    await (await Database.open(load(config).database)).close()


def test_a_limiter_forgets_the_least_used():
    """Addresses can't fill its memory."""
    limiter = Limiter(1)
    for number in range(MAX_SOURCES + 10):
        limiter.admit(str(number))
    assert len(limiter._buckets) == MAX_SOURCES
