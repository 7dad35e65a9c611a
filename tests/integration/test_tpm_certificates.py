"""Certificates in a TPM's NV: what a maker left there, and what somebody else did."""

import contextlib
import os

import pytest
from tpm2_pytss import TPMA_NV

from agent.attest.enrolment import MAX_CERTIFICATE_BYTES, MAX_EK_CHAIN, MAX_EK_CHAIN_BYTES
from agent.attest.tpm import Tpm
from agent.errors import TpmError, VerificationError
from tests.support.ek_chains import line
from tests.support.swtpm import SwTpm

pytestmark = pytest.mark.integration
FIRST = 0x01C00100
INTERMEDIATES = tuple(ca.der() for ca in line(3))


@pytest.fixture
def swtpm(tmp_path):
    with SwTpm(tmp_path) as running:
        yield running


def _chain(swtpm):
    with contextlib.closing(Tpm(swtpm.tcti)) as tpm:
        return tpm.ek_chain()


def _write(swtpm, data, size):
    for number, at in enumerate(range(0, len(data), size)):
        swtpm.write_nv(FIRST + number, data[at : at + size])


def test_a_tpm_without_them_has_none(swtpm):
    """Nor do certificates count that stand anywhere else in NV."""
    assert _chain(swtpm) == ()
    swtpm.write_nv(FIRST + 1, INTERMEDIATES[0])
    swtpm.write_nv(FIRST - 1, INTERMEDIATES[0])
    assert _chain(swtpm) == ()


@pytest.mark.parametrize("size", [2048, 500, 64])
def test_a_chain_goes_on_over_indices(swtpm, size):
    """However the maker cut it: certificates one after the other, over as many indices as they need."""
    _write(swtpm, b"".join(INTERMEDIATES), size)
    assert _chain(swtpm) == INTERMEDIATES


def test_a_missing_index_ends_the_chain(swtpm):
    """What stands behind the gap is not read."""
    for number in (0, 1, 3):
        swtpm.write_nv(FIRST + number, INTERMEDIATES[number % 3])
    assert _chain(swtpm) == INTERMEDIATES[:2]


@pytest.mark.parametrize("padding", [bytes(300), b"\xff" * 300], ids=["zeros", "ones"])
def test_padding_is_no_part_of_a_certificate(swtpm, padding):
    """Neither behind an intermediate nor behind the certificate of the key itself."""
    for number, one in enumerate(INTERMEDIATES):
        swtpm.write_nv(FIRST + number, one + padding)
    assert _chain(swtpm) == INTERMEDIATES
    with contextlib.closing(Tpm(swtpm.tcti)) as tpm:
        swtpm.write_nv(0x01C0000A, INTERMEDIATES[0] + padding)
        (found,) = tpm.endorsements()
    assert found.certificate == INTERMEDIATES[0]


@pytest.mark.parametrize(
    ("attributes", "data"),
    [
        (TPMA_NV.PPWRITE | TPMA_NV.AUTHREAD | TPMA_NV.PPREAD | TPMA_NV.PLATFORMCREATE, b""),
        (TPMA_NV.PPWRITE | TPMA_NV.PPREAD | TPMA_NV.PLATFORMCREATE, INTERMEDIATES[2]),
    ],
    ids=["never written", "for the platform alone"],
)
def test_an_index_that_nobody_may_read_ends_the_chain(swtpm, attributes, data):
    """It is as if it were not there, and the TPM goes on working."""
    swtpm.write_nv(FIRST, INTERMEDIATES[0])
    swtpm.write_nv(FIRST + 1, data, attributes, size=len(data) or 100)
    swtpm.write_nv(FIRST + 2, INTERMEDIATES[1])
    assert _chain(swtpm) == INTERMEDIATES[:1]


def _too_many():
    return INTERMEDIATES[0] * (MAX_EK_CHAIN + 1)


def _too_large():
    return b"\x30\x82" + (MAX_CERTIFICATE_BYTES - 3).to_bytes(2) + bytes(MAX_CERTIFICATE_BYTES)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (os.urandom(40).replace(b"\x30", b"\x31"), "what follows 0 certificates"),
        (INTERMEDIATES[0] + b"junk", "what follows 1 certificates"),
        (INTERMEDIATES[0] + INTERMEDIATES[1][:-1], "what follows 1 certificates"),
        (_too_many(), f"more than {MAX_EK_CHAIN} certificates"),
        (_too_large(), "what follows 0 certificates"),
        (bytes(MAX_EK_CHAIN_BYTES + 1), f"more than {MAX_EK_CHAIN_BYTES} bytes"),
    ],
    ids=["garbage", "junk behind", "cut", "too many", "too large", "too much"],
)
def test_what_is_no_chain_is_refused_by_name(swtpm, data, words):
    """Garbage, cut or over a limit: a VerificationError, and the TPM goes on working."""
    _write(swtpm, data, 2048)
    with contextlib.closing(Tpm(swtpm.tcti)) as tpm:
        with pytest.raises(VerificationError, match=words) as refused:
            tpm.ek_chain()
        assert refused.value.check == "ek-chain"
        assert tpm.clock().safe


def test_a_tpm_that_goes_away_is_a_tpm_error(swtpm):
    """Not a chain without certificates."""
    with contextlib.closing(Tpm(swtpm.tcti)) as tpm:
        swtpm.kill()
        with pytest.raises(TpmError):
            tpm.ek_chain()
