"""``edgewarden attest enrol|status|leave`` at the terminal: words, exit codes, and a token that shows nowhere."""

import json

import pytest
from click.testing import CliRunner

from agent.cli.enrol import MAX_TOKEN_FILE_BYTES, enrol, leave, status
from agent.errors import HostError, PolicyError, VerificationError
from tests.support.admin_socket import answering

STATUS = {
    "enrolled": True,
    "controller": "https://c.example",
    "mode": "pull",
    "address": "edge.example:8444",
    "since": "2026-01-01T00:00:00Z",
    "certificate_until": "2026-02-01T00:00:00Z",
    "connected": True,
    "why": "https://c.example appraises this node",
    "trust": "warning",
    "issued_at": "2026-01-02T00:00:00Z",
    "age_s": 7,
    "interval_s": 60,
    "withdrawn": 2,
    "checks": [{"name": "refused", "outcome": "warning", "words": "m/1"}],
    "push_failure": "",
}
NOT_ENROLLED = {"enrolled": False, "connected": False, "why": "no controller is configured", "trust": "unknown"}


def reply(code, document):
    body = json.dumps(document).encode()
    return b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%b" % (code, len(body), body)


def ask(command, path, *words, text=None):
    return CliRunner().invoke(command, [*words, "--socket", str(path)], input=text)


def test_the_token_goes_in_the_body():
    """With mode and address; the answer is shown line by line."""
    with answering(reply(200, STATUS), after=b"}") as (path, asked):
        shown = ask(enrol, path, "--token-file", "-", "--mode", "push", text="ew1.word\n")
    assert shown.exit_code == 0
    head, _, body = asked[0].partition(b"\r\n\r\n")
    assert json.loads(body) == {"token": "ew1.word", "mode": "push", "address": None}
    assert b"ew1" not in head
    assert shown.output.splitlines() == [
        "enrolled     https://c.example",
        "mode         pull edge.example:8444",
        "since        2026-01-01T00:00:00Z",
        "certificate  2026-02-01T00:00:00Z",
        "connected    https://c.example appraises this node",
        "trust        warning",
        "result       2026-01-02T00:00:00Z (7 s ago, 2 files withdrawn)",
        "  refused           warning  m/1",
    ]


def test_a_node_that_is_not_enrolled_says_no():
    """And nothing of what it does not have."""
    with answering(reply(200, NOT_ENROLLED)) as (path, _):
        shown = ask(status, path)
    assert shown.output.splitlines() == [
        "enrolled     no",
        "connected    no controller is configured",
        "trust        unknown",
    ]


@pytest.mark.parametrize("text", ["", " \n", "x" * (MAX_TOKEN_FILE_BYTES + 1)])
def test_what_holds_no_token_is_wrong_usage(tmp_path, text):
    """2, and the agent is not asked."""
    shown = ask(enrol, tmp_path / "none.sock", "--token-file", "-", text=text)
    assert (shown.exit_code, "no join token" in shown.output) == (2, True)


REFUSALS = [
    (403, "admin.enrol is denied to uid:7: role_may_not_administer", PolicyError),
    (409, "this node is enrolled at https://c.example: leave first", VerificationError),
    (422, "controller-key: the listener's key is not the one of the join token", VerificationError),
    (400, "pull needs the address where the controller reaches the control listener", HostError),
    (502, "https://c.example:443: refused with 403: the join token was used", HostError),
    (503, "the TPM does not answer", HostError),
]


@pytest.mark.parametrize(("code", "words", "kind"), REFUSALS)
def test_a_refusal_reaches_the_operator_in_its_words(code, words, kind):
    """With the error whose exit code says whose turn it is."""
    with answering(reply(code, {"error": words}), after=b"}") as (path, _):
        shown = ask(enrol, path, "--token-file", "-", text="ew1.secret-word")
    assert isinstance(shown.exception, kind)
    assert words in str(shown.exception)
    assert "secret-word" not in str(shown.exception) + shown.output


def test_a_refusal_without_words_says_so():
    """It is no less a refusal."""
    with answering(reply(409, {})) as (path, _):
        shown = ask(leave, path)
    assert isinstance(shown.exception, VerificationError)
    assert "no reason given" in str(shown.exception)


def test_json_is_what_the_agent_said():
    """Unchanged."""
    with answering(reply(200, NOT_ENROLLED)) as (path, asked):
        shown = ask(leave, path, "--json")
    assert json.loads(shown.output) == NOT_ENROLLED
    assert asked[0].startswith(b"DELETE /admin/v1/enrolment ")


def test_nothing_that_a_controller_said_moves_the_terminal():
    """Neither in a status nor in a refusal."""
    escape = "\x1b[2J\r"
    check = {"name": f"a{escape}", "outcome": f"b{escape}", "words": f"c{escape}"}
    said = STATUS | {"checks": [check], "push_failure": f"encoding: {escape}", "why": escape}
    with answering(reply(200, said)) as (path, _):
        shown = ask(status, path)
    assert (shown.exit_code, "\x1b" in shown.output, "\r" in shown.output) == (0, False, False)
    with answering(reply(502, {"error": f"refused: {escape}"})) as (path, _):
        shown = ask(leave, path)
    assert str(shown.exception).endswith("refused: ?[2J?")
