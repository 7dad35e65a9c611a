"""The TPM's structures, from bytes that anyone may have written."""

import struct

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from agent.attest.structures import (
    AK_TEMPLATE,
    MAX_ATTEST_BYTES,
    RSA_AK_TEMPLATE,
    ClockInfo,
    PcrSelection,
    Signature,
    parse_ak_public,
    parse_quote,
    parse_rsa_ak_public,
    parse_signature,
)
from agent.errors import VerificationError
from tests.support.attest import BOOT_PCRS, Attester

ATTESTER = Attester()
ATTEST, SIGNATURE = ATTESTER.quote(b"n" * 32, BOOT_PCRS | {14: bytes(32)})
RSA_AK = RSA_AK_TEMPLATE + struct.pack(">H", 256) + b"\xc1" * 256
PARSERS = [
    (parse_quote, ATTEST),
    (parse_signature, SIGNATURE),
    (parse_ak_public, ATTESTER.ak_public),
    (parse_rsa_ak_public, RSA_AK),
]


@st.composite
def _mangled(draw):
    """A well-formed structure that was cut, lengthened or changed in a few bytes."""
    parse, data = draw(st.sampled_from(PARSERS))
    changed = bytearray(data[: draw(st.integers(0, len(data)))] + draw(st.binary(max_size=8)))
    for at, value in draw(st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=3)):
        if at < len(changed):
            changed[at] = value
    return parse, bytes(changed)


@given(_mangled() | st.tuples(st.sampled_from([parse for parse, _ in PARSERS]), st.binary(max_size=300)))
def test_nothing_but_a_verification_error_leaves_a_parser(case):
    """Whatever the bytes, a parser returns the structure or raises a VerificationError."""
    parse, data = case
    try:
        parse(data)
    except VerificationError as error:
        assert error.check in {"encoding", "attest-type", "signature-scheme", "ak-template"}  # noqa: PT017 -- both ends of the claim


def test_a_quote_is_read_in_full():
    """Every field of a quote comes out as it went in."""
    quote = parse_quote(ATTEST)
    assert quote.extra_data == b"n" * 32
    assert quote.clock == ClockInfo(1000, 3, 0, safe=True)
    assert quote.firmware_version == 0x2019
    assert quote.selections == (PcrSelection(0x000B, frozenset({*range(10), 11, 14})),)
    assert quote.qualified_signer == parse_ak_public(ATTESTER.ak_public).qualified_name


@pytest.mark.parametrize(
    ("data", "check", "words"),
    [
        (b"\x00" + ATTEST[1:], "attest-type", "magic"),
        (ATTEST[:4] + b"\x80\x17" + ATTEST[6:], "attest-type", "not a quote"),
        (ATTEST[:3], "encoding", "cut short"),
        (ATTEST[:-1], "encoding", "cut short"),
        (ATTEST + b"\x00", "encoding", "follow"),
        (bytes(MAX_ATTEST_BYTES + 1), "encoding", "limit"),
        (ATTEST.replace(b"\x00\x00\x00\x01\x00\x0b\x03", b"\x00\x00\x00\x11\x00\x0b\x03"), "encoding", "banks"),
        (ATTEST.replace(b"\x00\x00\x00\x01\x00\x0b\x03", b"\x00\x00\x00\x01\x00\x0b\x09"), "encoding", "bitmap"),
        (ATTEST.replace(struct.pack(">II?", 3, 0, True), struct.pack(">IIB", 3, 0, 2)), "encoding", "neither"),
    ],
)
def test_a_malformed_quote_names_its_fault(data, check, words):
    """Each fault of a TPMS_ATTEST has its check and its words."""
    with pytest.raises(VerificationError, match=words) as raised:
        parse_quote(data)
    assert raised.value.check == check


@pytest.mark.parametrize(
    "data",
    [
        b"\x00\x14" + SIGNATURE[2:],  # RSASSA
        SIGNATURE[:2] + b"\x00\x04" + SIGNATURE[4:],  # over SHA-1
        SIGNATURE[:4] + b"\x00\x21" + bytes(33) + b"\x00\x01\x01",
        SIGNATURE[:-1],
        SIGNATURE + b"\x00",
    ],
)
def test_a_malformed_signature_names_its_fault(data):
    """Only ECDSA over SHA-256 with numbers of the curve's size is a signature."""
    with pytest.raises(VerificationError) as raised:
        parse_signature(data)
    assert raised.value.check == "signature-scheme"


@pytest.mark.parametrize("number", [0, 2**256 - 1])
def test_numbers_outside_the_group_do_not_verify(number):
    """A signature of zero or of a number past the group's order is just wrong."""
    with pytest.raises(VerificationError) as raised:
        parse_ak_public(ATTESTER.ak_public).verify(Signature(number, number), ATTEST)
    assert raised.value.check == "signature"


def test_a_signature_verifies_over_its_message_only():
    """The key accepts its signature, and not over another message."""
    ak = parse_ak_public(ATTESTER.ak_public)
    ak.verify(parse_signature(SIGNATURE), ATTEST)
    with pytest.raises(VerificationError):
        ak.verify(parse_signature(SIGNATURE), ATTEST + b"\x00")


@pytest.mark.parametrize("at", range(len(AK_TEMPLATE)))
def test_every_bit_of_the_template_counts(at):
    """A key that differs from the template in any byte is no attestation key."""
    public = bytearray(ATTESTER.ak_public)
    public[at] ^= 0x04
    with pytest.raises(VerificationError) as raised:
        parse_ak_public(bytes(public))
    assert raised.value.check == "ak-template"


def test_the_sized_form_is_the_same_key():
    """A TPM2B_PUBLIC and the TPMT_PUBLIC inside name the same key."""
    public = ATTESTER.ak_public
    sized = parse_ak_public(struct.pack(">H", len(public)) + public)
    assert (sized.name, sized.marshaled) == (parse_ak_public(public).name, public)


@pytest.mark.parametrize(
    "point",
    [
        struct.pack(">H", 32) + bytes(32) + struct.pack(">H", 32) + bytes(32),  # not on the curve
        struct.pack(">H", 33) + bytes(33) + struct.pack(">H", 32) + bytes(32),
        bytes(4),
    ],
)
def test_a_point_must_lie_on_the_curve(point):
    """A public key that is no point of P-256 is refused."""
    with pytest.raises(VerificationError, match=r"point|coordinate"):
        parse_ak_public(AK_TEMPLATE + point)


def test_two_keys_have_two_names():
    """The name is made of the key."""
    other = Attester(key=ec.derive_private_key(8, ec.SECP256R1()))
    assert parse_ak_public(other.ak_public).name != parse_ak_public(ATTESTER.ak_public).name


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (ATTESTER.ak_public, "template"),
        (RSA_AK[:-1], "cut short"),
        (RSA_AK + b"x", "follow its end"),
        (RSA_AK_TEMPLATE + struct.pack(">H", 256) + bytes(1) + b"\xc1" * 255, "2048 bits"),
    ],
)
def test_a_second_key_off_its_template_is_refused(data, words):
    """Only a whole RSA-2048 key of the fixed template is the second attestation key."""
    assert parse_rsa_ak_public(RSA_AK) == RSA_AK
    with pytest.raises(VerificationError, match=words):
        parse_rsa_ak_public(data)
