"""``edgewarden log`` as an operator sees it."""

import json
import re

import msgspec
import pytest
from click.testing import CliRunner

from agent.audit.journal import Journal
from agent.audit.reader import list_segments
from agent.audit.segment import Header, pack_frame
from agent.cli.log import command
from agent.errors import AuditError, VerificationError
from tests.support.audit import SMALL, event, write_log


def run(*arguments):
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


@pytest.fixture
def log(tmp_path):
    write_log(tmp_path / "log", [2, 2])
    return tmp_path / "log"


def test_a_good_log_is_summed_up(log):
    """Verification says what is kept, the tree's size and root, and the result; by argument or by option."""
    for arguments in ([log], ["--dir", log]):
        result = run("verify", *arguments)
        assert result.exit_code == 0
        assert "records 0 to 3, 1 segment\n" in result.output
        assert re.search(r"size 4, root [0-9a-f]{64}\nresult    verified\n$", result.output)
    report = json.loads(run("verify", "--json", log).output)
    assert report["ok"] is True
    assert (report["size"], report["findings"]) == (4, [])
    assert run("verify", log, "--dir", log).exit_code == 2


def test_a_bad_log_fails_and_names_the_place(log):
    """A flipped bit is an error that says which record in which file, and not a result of zero."""
    path = list_segments(log)[0]
    whole = bytearray(path.read_bytes())
    whole[whole.index(b"decision-1")] ^= 1
    path.write_bytes(whole)
    result = run("verify", log)
    assert isinstance(result.exception, VerificationError)
    assert "FINDING   record: 00000000000000000000.seg" in result.output
    assert "NOT VERIFIED" in result.output
    assert "record 1" in str(result.exception)
    assert json.loads(run("verify", "--json", log).output)["ok"] is False


def test_an_empty_log_and_no_log(tmp_path):
    """An empty log verifies; a directory without one is an error, not an empty log."""
    write_log(tmp_path / "log", [])
    assert "no records" in run("verify", tmp_path / "log").output
    assert isinstance(run("verify", tmp_path).exception, AuditError)


def test_tail_shows_what_matters_in_one_line(log):
    """A line has time, number, kind, outcome, principal, model, decision and reasons; --json gives the stored bytes."""
    lines = run("tail", "-n", "2", log).output.splitlines()
    assert len(lines) == 2
    assert lines[1].startswith("2023-11-14T22:13:20.000003Z  #3  infer  ok  principal=spiffe://example.org/camera")
    assert "model=orientation  decision=decision-3" in lines[1]
    assert r'reasons="shift \u00e4\u2028"' in lines[1]
    stored = run("tail", "--json", "-n", "1", log).output
    assert json.loads(stored)["seq"] == 3


def test_a_stored_record_of_another_shape_is_an_error(tmp_path):
    """What passes the checksum and is still no record ends in our own error."""
    path = list_segments(tmp_path / "log")[0] if write_log(tmp_path / "log", [1]) else None
    assert path is not None
    header = Header.unpack(path.read_bytes()).pack()
    path.write_bytes(header + pack_frame(b'{"seq":0,"kind":["x"],"time_us":1}', 0))
    assert isinstance(run("tail", tmp_path / "log").exception, VerificationError)


def test_text_from_clients_can_not_forge_a_line(tmp_path):
    """Control characters in a record are shown, never sent to the terminal."""
    journal = Journal.open(tmp_path / "log", "node-1", SMALL, strict=True)
    evil = msgspec.structs.replace(event(), principal="x\n2026  #9  infer  ok", kind="\x1b[2Jk", error="\x9b1A")
    journal.commit([evil])
    journal.close()
    output = run("tail", tmp_path / "log").output
    assert output.count("\n") == 1
    assert output.isascii()
    assert "\x1b" not in output
