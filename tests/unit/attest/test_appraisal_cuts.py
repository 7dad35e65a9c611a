"""Evidence whose parts are cut short or too large: each at every cut, each named by its check."""

import msgspec
import pytest

from agent.attest.appraisal import appraise
from agent.attest.evidence import MAX_EVIDENCE_BYTES
from agent.attest.measurement import MAX_LOG_BYTES
from agent.attest.structures import MAX_ATTEST_BYTES, MAX_PUBLIC_BYTES, MAX_SIGNATURE_BYTES
from tests.support.attest import ENTRIES, PCR, Attester, expectation

HONEST = Attester()
EVIDENCE = HONEST.evidence()
ASKED = expectation()


def _appraised(part, data):
    """Return the first failed check of Evidence with one part exchanged."""
    if part == "ak":
        result = appraise(EVIDENCE.encode(), expectation(ak_public=data))
    elif part == "json":
        result = appraise(data, ASKED)
    else:
        result = appraise(msgspec.structs.replace(EVIDENCE, **{part: data}).encode(), ASKED)
    assert result.failed is not None
    return result.status, result.failed.name


WHOLE = {
    "attest": EVIDENCE.attest,
    "signature": EVIDENCE.signature,
    "entries": EVIDENCE.entries,
    "ak": HONEST.ak_public,
    "json": EVIDENCE.encode(),
}
CHECK = {
    "attest": "encoding",
    "signature": "signature-scheme",
    "entries": "log-replay",
    "ak": "ak-template",
    "json": "encoding",
}


@pytest.mark.parametrize("part", WHOLE)
def test_a_part_cut_anywhere_fails_its_own_check(part):
    """Every proper prefix is refused, by the check that owns the part."""
    found = {_appraised(part, WHOLE[part][:size]) for size in range(len(WHOLE[part]))}
    assert found == {("none", CHECK[part])}


@pytest.mark.parametrize("part", WHOLE)
def test_a_part_without_its_beginning_fails_its_own_check(part):
    """Every proper suffix is refused too; an attest that does not begin with the magic is of another type."""
    found = {_appraised(part, WHOLE[part][size:]) for size in range(1, len(WHOLE[part]) + 1)}
    # Entries from a later boundary on are whole, so it is their count that is wrong: the same check.
    assert found <= {("none", CHECK[part]), ("none", "attest-type" if part == "attest" else CHECK[part])}


@pytest.mark.parametrize("part", WHOLE)
def test_a_part_with_a_byte_more_fails_its_own_check(part):
    """Nothing may follow a part."""
    assert _appraised(part, WHOLE[part] + b"\x01") == ("none", CHECK[part])


OVERSIZED = {
    "attest": MAX_ATTEST_BYTES,
    "signature": MAX_SIGNATURE_BYTES,
    "ak": MAX_PUBLIC_BYTES,
    "json": MAX_EVIDENCE_BYTES,
    "entries": MAX_LOG_BYTES,
}


@pytest.mark.parametrize("part", OVERSIZED)
def test_a_part_over_its_limit_fails_its_own_check(part):
    """A part is refused by its size, before it is read."""
    filler = b" " if part == "json" else b"\0"
    assert _appraised(part, WHOLE[part] + filler * (OVERSIZED[part] + 1 - len(WHOLE[part]))) == ("none", CHECK[part])


@pytest.mark.parametrize("at", range(len(EVIDENCE.attest)))
def test_every_byte_of_the_quote_counts(at):
    """No byte of what the TPM signed can be another."""
    changed = bytearray(EVIDENCE.attest)
    changed[at] ^= 0x80
    assert _appraised("attest", bytes(changed))[0] == "none"


def test_every_byte_of_the_log_counts():
    """No byte of the entries can be another."""
    for at in range(len(EVIDENCE.entries)):
        changed = bytearray(EVIDENCE.entries)
        changed[at] ^= 0x80
        assert _appraised("entries", bytes(changed)) == ("none", "log-replay")


def test_an_entry_cut_at_its_boundary_is_a_missing_entry():
    """A log that ends between two entries is refused by its count."""
    whole = 0
    for entry in ENTRIES[:-1]:
        whole += len(entry.encode(PCR))
        assert _appraised("entries", EVIDENCE.entries[:whole]) == ("none", "log-replay")
