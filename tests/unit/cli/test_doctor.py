"""``edgewarden doctor`` as an operator sees it."""

import json

import click
import pytest
from click.testing import CliRunner

from agent.cli.doctor import command, report
from agent.host.doctor import Finding

GOOD = Finding("kernel", "ok", "6.1")
ODD = Finding("clock", "warn", "not synchronised", "enable chrony")
BAD = Finding("tpm device", "fail", "/dev/tpmrm0 does not exist", "switch it on")


def shown(*findings, as_json=False):
    @click.command()
    def wrapped() -> None:
        report(findings, as_json=as_json)

    return CliRunner().invoke(wrapped, [])


@pytest.mark.parametrize(("findings", "code"), [([GOOD], 0), ([GOOD, ODD], 0), ([GOOD, ODD, BAD], 1)])
def test_only_a_failure_fails(findings, code):
    """Warnings leave the exit code at 0, a failure makes it 1, in both formats."""
    assert shown(*findings).exit_code == code
    assert shown(*findings, as_json=True).exit_code == code


def test_each_line_says_what_and_how_to_mend_it():
    """A table with the level, the check, what was found, and below it the fix."""
    assert shown(GOOD, BAD).output == (
        "ok    kernel      6.1\nFAIL  tpm device  /dev/tpmrm0 does not exist\n                  -> switch it on\n"
    )
    assert json.loads(shown(BAD, as_json=True).output) == [
        {"check": "tpm device", "level": "fail", "found": "/dev/tpmrm0 does not exist", "fix": "switch it on"}
    ]


def test_the_command_examines_this_host(tmp_path):
    """A state directory that does not exist is a failure with its fix."""
    result = CliRunner().invoke(command, ["--state-dir", str(tmp_path / "none"), "--json"])
    assert result.exit_code == 1
    assert "install -d -m 0700" in {f["check"]: f for f in json.loads(result.output)}["state directory"]["fix"]
