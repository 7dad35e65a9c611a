"""The node protocol's messages: what is read, and what is refused."""

import contextlib
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.attest.enrolment import (
    MAX_EK_CHAIN,
    MAX_JOIN_TOKEN_CHARS,
    Challenge,
    ChallengeRequest,
    EnrolRequest,
    JoinToken,
    read_message,
    split_certificates,
    without_padding,
)
from agent.errors import VerificationError

TOKEN = JoinToken(url="https://controller.example:8445", spki_sha256="ab" * 32, id="0123456789abcdef", secret=bytes(32))


def test_a_join_token_is_one_word_that_reads_back():
    """What an operator copies is what the node reads, spaces and line ends around it included."""
    text = TOKEN.text()
    assert " " not in text
    assert JoinToken.parse(f"  {text}\n") == TOKEN


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ew2." + TOKEN.text().removeprefix("ew1."),
        TOKEN.text()[:-4],
        TOKEN.text() + "!",
        "ew1.e30",
        "ew1." + "A" * MAX_JOIN_TOKEN_CHARS,
        msgspec.structs.replace(TOKEN, url="http://controller.example").text(),
    ],
)
def test_what_is_no_join_token_is_refused_without_an_echo(text):
    """A damaged token, one for plain HTTP and one of another version are refused, and the error repeats nothing of it."""
    with pytest.raises(VerificationError) as refusal:
        JoinToken.parse(text)
    assert refusal.value.check == "join-token"
    assert text[4:] not in str(refusal.value) or len(text) < 8


def test_messages_read_back_as_they_were_written():
    """Byte strings and the field called ``from`` survive the way."""
    challenge = Challenge(nonce="cd" * 32, start=7)
    assert b'"from":7' in challenge.encode()
    assert read_message(challenge.encode(), Challenge, 1024) == challenge


@pytest.mark.parametrize(
    "data", [b"{", b'{"node":"a/b"}', b'{"node":"a","more":1}', b'{"node":"' + b"a" * 65 + b'"}', b"[]"]
)
def test_what_is_no_message_is_refused(data):
    """No JSON, an unknown field and a value over its limit are one error: ``encoding``."""
    with pytest.raises(VerificationError) as refusal:
        read_message(data, ChallengeRequest, 1024)
    assert refusal.value.check == "encoding"


def test_a_message_over_its_limit_is_not_parsed():
    """The limit is looked at first."""
    with pytest.raises(VerificationError, match="over 4"):
        read_message(b'{"node":"a"}', ChallengeRequest, 4)


def test_an_enrolment_takes_only_so_many_certificates():
    """A node can't make the controller hold what it does not need."""
    fields: dict[str, Any] = {
        "token": "0" * 16,
        "secret": b"s" * 32,
        "node": "n",
        "mode": "push",
        "ek_public": b"e",
        "ak_public": b"a",
    }
    good = EnrolRequest(**fields, ek_chain=(b"c",) * MAX_EK_CHAIN)
    assert read_message(good.encode(), EnrolRequest, 65536) == good
    with pytest.raises(VerificationError):
        read_message(EnrolRequest(**fields, ek_chain=(b"c",) * (MAX_EK_CHAIN + 1)).encode(), EnrolRequest, 65536)


# --- certificates out of NV

_CERTIFICATES = st.binary(min_size=1, max_size=600).map(lambda body: b"\x30\x82" + len(body).to_bytes(2) + body)
_PADDINGS = st.sampled_from([b"", b"\0", b"\xff" * 9, bytes(64)])


@given(st.lists(st.tuples(_PADDINGS, _CERTIFICATES), max_size=MAX_EK_CHAIN), _PADDINGS)
def test_certificates_are_split_by_their_own_sizes(parts, end):
    """Whatever stands in them, and whichever padding between and behind them, what comes out is what was put in."""
    data = b"".join(padding + certificate for padding, certificate in parts) + end
    assert split_certificates(data) == tuple(certificate for _, certificate in parts)


@given(_CERTIFICATES, _PADDINGS)
def test_padding_behind_a_certificate_is_cut(certificate, padding):
    """And nothing of the certificate, whatever byte it ends with."""
    assert without_padding(certificate + padding) == certificate


@given(st.binary(max_size=700))
def test_bytes_are_split_or_refused_by_name(data):
    """Nothing but a VerificationError leaves it, and what leaves it is a part of what came in; what is no certificate stays for its verifier."""
    found: tuple[bytes, ...] = ()
    with contextlib.suppress(VerificationError):
        found = split_certificates(data)
    assert all(one in data for one in found)
    if not data.startswith(b"\x30\x82"):
        assert without_padding(data) == data


@pytest.mark.parametrize(
    "data",
    [
        b"\x30",
        b"\x30\x82\x01",
        b"\x30\x82\x00\x02\x00",
        b"\x30\x81\x80" + bytes(128),
        b"\x31\x82\x00\x01a",
        b"\x30\x82\x10\x00" + bytes(4096),
        b"\x30\x82\x00\x01a" * (MAX_EK_CHAIN + 1),
    ],
    ids=["one byte", "head cut", "body cut", "short form", "no sequence", "too large", "too many"],
)
def test_what_is_no_chain_of_certificates_is_refused(data):
    """Cut, of another kind, over the size of a certificate or over their number."""
    with pytest.raises(VerificationError) as refused:
        split_certificates(data)
    assert refused.value.check == "ek-chain"
