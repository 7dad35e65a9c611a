"""``edgewarden policy``, as an operator types it, in a process of its own."""

import http.server
import json
import os
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import ClassVar

import pytest

from agent.policy.build import build
from agent.policy.bundle import Bundle
from tests.support.policy import HOSTILE, OPA, ROOT, bundle, document, keypair

pytestmark = [pytest.mark.integration, pytest.mark.xdist_group("isolation")]


def run(*arguments: object, code: int = 0) -> str:
    """Run the command; return standard output when it succeeds, else standard error."""
    done = subprocess.run(
        [sys.executable, "-c", "from agent.cli.main import main; main()", "policy", *map(str, arguments)],
        capture_output=True, text=True, check=False, timeout=60, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},  # noqa: TID251 -- the child gets this one's environment
    )  # fmt: skip
    assert done.returncode == code, done.stderr + done.stdout
    return done.stdout if code == 0 else done.stderr


@pytest.fixture
def files(tmp_path):
    private, public = keypair()
    contents = {
        "key.pem": private,
        "pub.pem": public,
        "good.tar.gz": build(ROOT / "rego", ROOT / "policies", "r1"),
        "hostile.tar.gz": bundle(HOSTILE.replace('input.action == "infer"', "input.action")),
        "bad.tar.gz": bundle("package edgewarden.authz\nx := 1"),
        "infer.json": json.dumps(document("infer")).encode(),
        "loop.json": json.dumps(document("loop")).encode(),
        "no.json": b"{",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def test_build_makes_the_bundle_and_says_what_it_is(files):
    """The file is the reproducible bundle, and the digest printed is its own."""
    out = files / "out.tar.gz"
    shown = json.loads(run("build", "rego", "policies", "-r", "r1", "-o", out, "--json"))
    assert out.read_bytes() == (files / "good.tar.gz").read_bytes()
    assert shown["sha256"] == Bundle.from_bytes(out.read_bytes()).sha256
    assert "revision: r1" in run("build", "rego", "policies", "-r", "r1", "-o", out)
    assert "No such file" in run("build", "rego", "policies", "-r", "r1", "-o", files / "no/where", code=3)


def test_sign_and_check_go_together(files):
    """A signed bundle passes the check with its key; an unsigned one, and another engine's view, are as they are."""
    good, signed = files / "good.tar.gz", files / "signed.tar.gz"
    run("sign", good, "--key", files / "key.pem", "-o", signed)
    for more in ((), ("--opa", OPA)):
        assert json.loads(run("check", signed, "--key", files / "pub.pem", "--json", *more))["ok"] is True
    assert "not signed" in run("check", good, "--key", files / "pub.pem", code=1)
    assert "signing key" in run("sign", good, "--key", files / "pub.pem", code=3)
    run("sign", good, "--key", files / "key.pem")
    assert "revision" in run("check", good, "--key", files / "pub.pem")


def test_check_says_why_it_refuses(files):
    """The reason of the activation is the command's last word."""
    assert "trial failed" in run("check", files / "bad.tar.gz", code=1)


def test_eval_prints_the_decision_the_agent_would_get(files):
    """A decision is printed as JSON; an error and input that is no JSON end with the right exit code."""
    good = files / "good.tar.gz"
    assert json.loads(run("eval", good, "-i", files / "infer.json"))["allow"] is False
    assert "not JSON" in run("eval", good, "-i", files / "no.json", code=2)
    assert "trial failed" in run("eval", files / "bad.tar.gz", "-i", files / "infer.json", code=1)


class _Admin(http.server.BaseHTTPRequestHandler):
    """The admin socket's two methods, as contract and seam have them."""

    answer: bytes | None = None
    active: ClassVar[dict[str, str]] = {"revision": "r0", "sha256": "0" * 64}

    def do_GET(self) -> None:
        self._say(200, self.active)

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        read = Bundle.from_bytes(data)
        if read.revision == "test":
            self._say(422, {"error": "the trial failed: sample 'infer'"})
        else:
            type(self).active = {"revision": read.revision, "sha256": read.sha256}
            self._say(200, self.active)

    def _say(self, status: int, value: object) -> None:
        assert self.path == "/admin/v1/policy"
        content = json.dumps(value).encode() if self.answer is None else self.answer
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def address_string(self) -> str:
        return "unix"

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def admin(tmp_path) -> Iterator[str]:
    path = str(tmp_path / "admin.sock")
    with socketserver.ThreadingUnixStreamServer(path, _Admin) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield path
        server.shutdown()
        thread.join()


def test_show_and_activate_speak_to_the_agent(files, admin):
    """What is in force is shown, a good bundle is activated, a refused one ends with the agent's reason."""
    assert "revision: r0" in run("show", "--socket", admin)
    assert json.loads(run("activate", files / "good.tar.gz", "--socket", admin, "--json"))["revision"] == "r1"
    assert json.loads(run("show", "--socket", admin, "--json"))["revision"] == "r1"
    assert "the trial failed" in run("activate", files / "bad.tar.gz", "--socket", admin, code=1)


@pytest.mark.parametrize("answer", [b"no json", b"[]", b""])
def test_an_agent_that_answers_oddly_is_the_hosts_fault(admin, monkeypatch, answer):
    """Anything but a JSON object is refused with words."""
    monkeypatch.setattr(_Admin, "answer", answer)
    assert "not the agent's" in run("show", "--socket", admin, code=3)


def test_no_agent_is_said_plainly(tmp_path):
    """Without a socket the command says that the agent does not answer."""
    assert "does not answer" in run("show", "--socket", tmp_path / "nothing.sock", code=3)
