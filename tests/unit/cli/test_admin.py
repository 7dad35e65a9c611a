"""The command line's call to the agent, over a real Unix socket."""

import socket
import tempfile
from pathlib import Path

import pytest

from agent.cli import admin
from agent.errors import HostError
from tests.support.admin_socket import ANSWER, answering


def test_status_and_object_come_back():
    """A refusal is no error of the call: the status and the agent's words are handed on."""
    with answering(ANSWER % (15, b'{"error":"old"}')) as (path, asked):
        assert admin.request(path, "GET", "/v1/status") == (409, {"error": "old"})
    assert asked[0].startswith(b"GET /v1/status HTTP/1.1\r\n")
    assert b"Content-Type" not in asked[0]


def test_a_body_goes_with_its_type():
    """What is sent says what it is."""
    with answering(ANSWER % (2, b"{}"), after=b"bundle") as (path, asked):
        admin.request(path, "POST", "/v1/policy", b"bundle", "application/gzip")
    assert b"Content-Type: application/gzip\r\n" in asked[0]


@pytest.mark.parametrize("answer", [b"SSH-2.0\r\n\r\n", b"", ANSWER % (3, b"no!"), ANSWER % (2, b"[]")])
def test_what_is_not_the_agents_answer_is_the_hosts_error(answer):
    """Another protocol, nothing, no JSON, or no object."""
    with answering(answer) as (path, _), pytest.raises(HostError, match=r"answer"):
        admin.request(path, "GET", "/v1/status")


def test_an_agent_that_does_not_run_is_named(tmp_path):
    """Without a socket the path is told, and what to look at."""
    with pytest.raises(HostError, match=r"none\.sock.*is it running"):
        admin.request(tmp_path / "none.sock", "GET", "/v1/status")


def test_an_agent_that_hangs_is_given_up(monkeypatch):
    """A socket that takes a call and never answers is an error after the time limit."""
    monkeypatch.setattr(admin, "TIMEOUT_S", 0.05)
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        path = Path(folder) / "admin.sock"
        listener.bind(str(path))
        listener.listen()
        with pytest.raises(HostError, match="does not answer"):
            admin.request(path, "GET", "/v1/status")
