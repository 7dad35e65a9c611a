"""``edgewarden hook``: webhooks from the command line, against a running controller and a real receiver."""

import asyncio
import base64
import json
import re
import secrets
from importlib.metadata import entry_points

import click
import pytest
from aiohttp import web
from click.testing import CliRunner
from standardwebhooks import Webhook
from structlog.testing import capture_logs

from agent.errors import PolicyError
from controller.cli import hook
from tests.support.controller_service import controller_home, desk
from tests.support.receiver import Receiver
from tests.support.software_node import Vendor

pytestmark = pytest.mark.integration
VENDOR = Vendor()
UNUSED = "https://receiver.example/events"


@pytest.fixture
def config(tmp_path):
    return controller_home(tmp_path, VENDOR.pem())


@pytest.fixture
async def office(config):
    async with desk(config) as running:
        yield running


@pytest.fixture
async def receiver():
    async with Receiver().serving() as serving:
        yield serving


@pytest.fixture
def run(office, config):
    """The command line, beside the controller."""
    access = config.parent / "admin"
    (access / "url").write_text(office.url)

    async def invoke(*arguments, **more):
        words = [str(argument) for argument in (*arguments, "--admin", access)]
        return await asyncio.to_thread(CliRunner().invoke, hook.command, words, catch_exceptions=False, **more)

    return invoke


def test_the_verb_is_found():
    """`edgewarden hook` is there, beside the controller's other verbs."""
    (found,) = entry_points(group="edgewarden.commands", name="hook")
    assert found.load() is hook.command


async def test_a_webhook_from_its_making_to_its_end(office, run, receiver):
    """Its secret is all that is on standard output; a test arrives, signed with it; it is listed, shown and removed."""
    made = await run("add", receiver.url, "--kind", "node.result", "--kind", "node.unreachable")
    assert made.exit_code == 0
    secret = made.stdout.strip()
    (name,) = re.findall(r"webhook ([0-9a-f]{32}); its secret is shown this once", made.stderr)
    tested = await run("test", name)
    assert tested.exit_code == 0
    event, _, how = tested.output.partition(": ")
    assert how.startswith("delivered ")
    (got,) = receiver.got
    body = Webhook(secret).verify(got.body, got.headers)
    assert (body["id"], body["kind"], body["hook"], body["by"]) == (event, "hook.test", name, "admin/root")
    for listed in (
        await run("list"),
        await run("list", "--json"),
        await run("show", name),
        await run("show", name, "--json"),
    ):
        assert listed.exit_code == 0
        assert receiver.url in listed.output
        assert secret not in listed.output
    shown = await run("show", name)
    assert re.search(rf"{event} hook\.test +delivered", shown.output)
    assert "kinds        node.result, node.unreachable" in shown.output
    removed = await run("remove", name, "--yes")
    assert (removed.exit_code, removed.output) == (0, f"{name}: removed\n")
    assert json.loads((await run("list", "--json")).output) == []
    kinds = [record["kind"] for record in await office.call("GET", "/v1/audit") if record["kind"].startswith("hook.")]
    assert kinds == ["hook.create", "hook.test", "hook.delete"]


async def test_a_test_reaches_one_webhook_alone(run, receiver):
    """Another webhook that takes all kinds does not get it."""
    first = json.loads((await run("add", receiver.url + "/first", "--json")).output)
    await run("add", receiver.url + "/second")
    assert (await run("test", first["id"])).exit_code == 0
    assert [got.path for got in receiver.got] == ["/events/first"]


@pytest.mark.parametrize("status", [500, 410])
async def test_a_test_that_fails_says_why(run, receiver, status):
    """Exit code 1, with what was met; 410 disables the webhook, which can't be tested then."""
    receiver.answers = [status]
    made = json.loads((await run("add", receiver.url, "--json")).output)
    tested = await run("test", made["id"])
    assert tested.exit_code == 1
    assert f"status {status}" in tested.output
    assert ("waiting, 1 attempts, next " in tested.output) == (status == 500)
    if status == 410:
        with pytest.raises(PolicyError, match="wanted no more events"):
            await run("test", made["id"])
        assert "disabled" in (await run("show", made["id"])).output
    assert f"last error: {'given up, ' if status == 410 else ''}" in (await run("list")).output


async def test_a_test_waits_no_longer_than_it_is_told(run, receiver):
    """A receiver that does not answer in that time is a test that failed."""
    answered = asyncio.Event()

    async def hang(_request):
        await answered.wait()
        return web.Response()

    receiver.answers = [hang]
    made = json.loads((await run("add", receiver.url, "--json")).output)
    tested = await run("test", made["id"], "--wait", "1", "--json")
    answered.set()
    assert (tested.exit_code, json.loads(tested.output)["state"]) == (1, "waiting")


@pytest.mark.parametrize("size", [24, 64])
async def test_a_receiver_s_own_secret(run, receiver, tmp_path, size):
    """It is read from a file or standard input, never printed, and signs what is sent."""
    secret = "whsec_" + base64.b64encode(secrets.token_bytes(size)).decode()
    (tmp_path / "secret").write_text(secret + "\n")
    from_file = await run("add", receiver.url, "--secret-file", tmp_path / "secret")
    from_input = await run("add", receiver.url, "--secret-file", "-", input=secret)
    for made in (from_file, from_input):
        assert made.exit_code == 0
        assert secret not in made.output
        assert (await run("test", made.stdout.strip())).exit_code == 0
        Webhook(secret).verify(receiver.got[-1].body, receiver.got[-1].headers)


@pytest.mark.parametrize(
    "text", ["", "x" * 5000, "whsec_", "whsec_AAAA", "whsec_!", "c2VjcmV0IHNlY3JldCBzZWNyZXQgc2Vj", "whsec_" + "A" * 96]
)
async def test_what_is_no_secret_is_refused(office, run, receiver, text):
    """Nothing is made, and what was given is not told: not in the words, not in the log."""
    with capture_logs() as log:
        try:
            refused = (await run("add", receiver.url, "--secret-file", "-", input=text)).output
        except PolicyError as error:
            refused = str(error)
    assert "secret" in refused
    assert len(text) < 8 or text not in refused + json.dumps(log)
    assert await office.call("GET", "/v1/hooks") == []


def test_no_option_takes_a_secret():
    """There is no way to hand a secret over as an argument: what speaks of one is a file."""
    for verb in hook.command.commands.values():
        for option in verb.params:
            assert "secret" not in (option.name or "") or isinstance(option.type, click.File)


async def test_what_is_not_there_is_refused_by_name(run):
    """A webhook that is not there, an address and a kind that are none: the controller's words, and exit code 1 outside of the tests."""
    for verb in (("show",), ("test",), ("remove", "--yes")):
        with pytest.raises(PolicyError, match="no such hook"):
            await run(*verb, "0" * 32)
    with pytest.raises(PolicyError, match="https://"):
        await run("add", "http://receiver.example/")
    with pytest.raises(PolicyError, match="kinds"):
        await run("add", UNUSED, "--kind", "No")
    with pytest.raises(PolicyError):
        await run("show", "../admins")


async def test_a_viewer_sees_and_an_operator_changes(config, run, tmp_path):
    """Roles hold for each verb."""
    from controller.cli import admin  # noqa: PLC0415 -- one use

    made = json.loads((await run("add", UNUSED, "--json")).output)
    for role in ("viewer", "operator"):
        words = ["create", role, "--role", role, "--out", str(tmp_path / role), "--admin", str(config.parent / "admin")]
        created = await asyncio.to_thread(CliRunner().invoke, admin.command, words, catch_exceptions=False)
        assert created.exit_code == 0
    allowed = {}
    for role in ("viewer", "operator"):
        for verb in (
            ("list",),
            ("show", made["id"]),
            ("add", UNUSED),
            ("test", made["id"], "--wait", "1"),
            ("remove", made["id"], "--yes"),
        ):
            words = [*verb, "--admin", str(tmp_path / role)]
            outcome = await asyncio.to_thread(CliRunner().invoke, hook.command, words)
            allowed[role, verb[0]] = not isinstance(outcome.exception, PolicyError)
    verbs = ("list", "show", "add", "test", "remove")
    assert allowed == {
        (role, verb): role == "operator" or verb in {"list", "show"}
        for role in ("viewer", "operator")
        for verb in verbs
    }
