"""``edgewarden policy`` in this process: what it writes, asks and says, and whose fault an error is."""

import json

import pytest
from click.testing import CliRunner

from agent.cli.policy import command
from agent.errors import HostError, PolicyError
from agent.policy.build import build
from agent.policy.bundle import MAX_BUNDLE_BYTES, Bundle
from tests.support.admin_socket import ANSWER, answering
from tests.support.policy import ROOT, document, keypair


def run(*arguments: object) -> str:
    """Run the command; raises what it raises."""
    return CliRunner().invoke(command, [*map(str, arguments)], catch_exceptions=False).output


@pytest.fixture
def home(tmp_path):
    private, public = keypair()
    (tmp_path / "key.pem").write_bytes(private)
    (tmp_path / "pub.pem").write_bytes(public)
    (tmp_path / "p.tar.gz").write_bytes(build(ROOT / "rego", ROOT / "policies", "r1"))
    return tmp_path


def test_build_and_sign_write_bundles(home):
    """Signing keeps what was built, adds a signature that the key verifies, and writes in place or elsewhere."""
    out = home / "out.tar.gz"
    run("build", ROOT / "rego", ROOT / "policies", "-r", "r1", "-o", out)
    assert out.read_bytes() == (home / "p.tar.gz").read_bytes()
    said = json.loads(run("sign", out, "--key", home / "key.pem", "-o", home / "signed.tar.gz", "--json"))
    signed = Bundle.from_bytes((home / "signed.tar.gz").read_bytes(), [(home / "pub.pem").read_bytes()])
    assert (said["revision"], said["sha256"]) == ("r1", signed.sha256)
    assert "revision: r1" in run("sign", out, "--key", home / "key.pem")
    assert Bundle.from_bytes(out.read_bytes(), [(home / "pub.pem").read_bytes()]).revision == "r1"


def test_what_can_not_be_read_or_written_is_the_hosts(home):
    """The path is named; a file of no possible size is not read whole."""
    with pytest.raises(HostError, match="no/where"):
        run("build", ROOT / "rego", ROOT / "policies", "-r", "r1", "-o", home / "no/where")
    with (home / "huge.tar.gz").open("wb") as file:
        file.truncate(MAX_BUNDLE_BYTES + 1)
    with pytest.raises(HostError, match="over"):
        run("sign", home / "huge.tar.gz", "--key", home / "key.pem")
    (home / "folder").mkdir()
    assert "is a directory" in run("sign", home / "p.tar.gz", "--key", home / "folder")


@pytest.mark.integration
@pytest.mark.xdist_group("isolation")
def test_check_and_eval_decide_in_a_sandbox(home):
    """A bundle that loads is said to, its decision is printed, and one that does not decide is an error."""
    checked = json.loads(run("check", home / "p.tar.gz", "--allow-missing-sandbox", "--json"))
    assert (checked["ok"], checked["revision"]) == (True, "r1")
    (home / "in.json").write_text(json.dumps(document("infer")))
    decision = json.loads(run("eval", home / "p.tar.gz", "-i", home / "in.json", "--allow-missing-sandbox"))
    assert decision["allow"] is False
    (home / "no.json").write_text("{")
    assert "not JSON" in run("eval", home / "p.tar.gz", "-i", home / "no.json", "--allow-missing-sandbox")


def test_the_running_agent_is_asked(home):
    """Activation sends the bundle as it is, and what the agent says is shown; its refusal is an error with its words."""
    bundle = (home / "p.tar.gz").read_bytes()
    said = b'{"revision":"r1","sha256":"ab"}'
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(said), said)
    with answering(answer, after=bundle) as (socket_path, asked):
        assert "revision: r1" in run("activate", home / "p.tar.gz", "--socket", socket_path)
    assert asked[0].startswith(b"PUT /admin/v1/policy ")
    with answering(answer) as (socket_path, _):
        assert json.loads(run("show", "--socket", socket_path, "--json")) == {"revision": "r1", "sha256": "ab"}
    with answering(ANSWER % (15, b'{"error":"old"}')) as (socket_path, _), pytest.raises(PolicyError, match="old"):
        run("show", "--socket", socket_path)
    with answering(ANSWER % (2, b"{}")) as (socket_path, _), pytest.raises(PolicyError, match="409"):
        run("show", "--socket", socket_path)
