"""Client certificates become principals, or are refused with the rule that they break."""

from functools import partial

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID
from hypothesis import given
from hypothesis import strategies as st

from agent.errors import PeerError
from agent.identity.peer import MAX_CERTIFICATE_BYTES, MAX_ROLES, PeerVerifier, read_certificate
from tests.support.identity import NOT_AFTER, NOT_BEFORE, client_certificate
from tests.support.outcome import value_or_refusal

_VALID = client_certificate(common_names=["alice"], roles=["operator"], uris=["spiffe://edge.example/line/7"])


def _usage(*, sign=True, cert_sign=False):
    return x509.KeyUsage(
        digital_signature=sign,
        content_commitment=False,
        key_encipherment=True,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=cert_sign,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )


def test_a_common_name_is_the_id_and_the_units_are_roles():
    """Without a SPIFFE ID the common name is the id, and roles come sorted and once each."""
    der = client_certificate(
        common_names=["camera-7.line"], roles=["operator", "admin", "operator"], key_usage=_usage()
    )
    principal = read_certificate(der).principal
    assert (principal.id, principal.kind) == ("camera-7.line", "mtls")
    assert principal.roles == ("admin", "operator")
    assert not principal.mfa


def test_a_spiffe_id_is_the_id_whatever_the_common_name_says():
    """An X.509-SVID is known by its URI alone."""
    der = client_certificate(common_names=["root"], uris=["spiffe://edge.example/ns/a/sa/b"])
    principal = read_certificate(der).principal
    assert (principal.id, principal.kind) == ("spiffe://edge.example/ns/a/sa/b", "spiffe")


def test_a_svid_needs_no_common_name():
    """SPIRE's certificates have no common name."""
    assert read_certificate(client_certificate(common_names=[], uris=["spiffe://t/x"])).principal.id == "spiffe://t/x"


def test_another_uri_alone_does_not_make_an_id():
    """A URI of another scheme is not read as an identity."""
    assert read_certificate(client_certificate(uris=["https://example.org/a"])).principal.id == "alice"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"usages": None}, "certificate_usage"),
        ({"usages": [ExtendedKeyUsageOID.SERVER_AUTH]}, "certificate_usage"),
        ({"usages": [ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE]}, "certificate_usage"),
        ({"key_usage": _usage(sign=False)}, "certificate_usage"),
        ({"ca": True}, "certificate_is_ca"),
        ({"key_usage": _usage(cert_sign=True)}, "certificate_is_ca"),
        ({"common_names": []}, "certificate_subject"),
        ({"common_names": ["alice", "bob"]}, "certificate_subject"),
        ({"common_names": ["alice\n"]}, "certificate_subject"),
        ({"common_names": ["alice\0.example"]}, "certificate_subject"),
        ({"common_names": ["\u0430lice"]}, "certificate_subject"),
        ({"common_names": ["spiffe://edge.example/admin"]}, "certificate_subject"),
        ({"roles": ["operator "]}, "certificate_roles"),
        ({"roles": ["Line 7"]}, "certificate_roles"),
        ({"roles": [f"r{n}" for n in range(MAX_ROLES + 1)]}, "certificate_roles"),
        ({"uris": ["spiffe://a/x", "spiffe://a/y"]}, "certificate_spiffe_id"),
        ({"uris": ["spiffe://a/x", "https://example.org"]}, "certificate_spiffe_id"),
        *(
            ({"uris": [uri]}, "certificate_spiffe_id")
            for uri in (
                "spiffe://edge.example",
                "spiffe://edge.example/",
                "spiffe://edge.example/a/",
                "spiffe://edge.example//a",
                "spiffe://edge.example/a/../b",
                "spiffe://edge.example/.",
                "spiffe://Edge.example/a",
                "spiffe://user@edge.example/a",
                "spiffe://edge.example:443/a",
                "spiffe://edge.example/a?b",
                "spiffe://edge.example/a#b",
                "spiffe://edge.example/%61",
                "SPIFFE://edge.example/a",
                "spiffe:///a",
                "spiffe://edge.example/" + "a" * 2048,
            )
        ),
    ],
)
def test_a_certificate_that_breaks_a_rule_is_refused(arguments, reason):
    """Each rule has its own word, and the answer is 401."""
    with pytest.raises(PeerError) as refusal:
        read_certificate(client_certificate(**arguments))
    assert (refusal.value.status, refusal.value.reason) == (401, reason)


@pytest.mark.parametrize("segment", ["...", "a.b", ".a", "..a"])
def test_dots_inside_a_path_segment_are_allowed(segment):
    """Only the segments '.' and '..' themselves are refused."""
    assert read_certificate(client_certificate(uris=[f"spiffe://t/{segment}"])).principal.kind == "spiffe"


def test_the_period_is_checked_at_every_use():
    """A certificate that was good when it was first seen is refused once it has expired, and before it starts."""
    now = NOT_BEFORE.timestamp()
    verifier = PeerVerifier(wall_clock=lambda: now)
    assert verifier.principal(_VALID).id == "spiffe://edge.example/line/7"
    now = NOT_AFTER.timestamp() + 1
    with pytest.raises(PeerError) as refusal:
        verifier.principal(_VALID)
    assert refusal.value.reason == "certificate_expired"
    now = NOT_BEFORE.timestamp() - 1
    with pytest.raises(PeerError) as refusal:
        verifier.principal(_VALID)
    assert refusal.value.reason == "certificate_not_yet_valid"


def test_a_known_certificate_is_not_parsed_again_and_the_memory_is_bounded():
    """The last certificates are remembered; the oldest goes first."""
    verifier = PeerVerifier(wall_clock=NOT_BEFORE.timestamp, capacity=2)
    first, second, third = (client_certificate(common_names=[name]) for name in ("a", "b", "c"))
    known = verifier.principal(first)
    assert verifier.principal(first) is known
    verifier.principal(second)
    assert verifier.principal(first) is known
    verifier.principal(third)
    assert len(verifier._known) == 2
    assert verifier.principal(first) is known
    assert {identity.principal.id for identity in verifier._known.values()} == {"a", "c"}


def test_an_oversized_certificate_is_not_parsed():
    """The size is checked first, on both ways in."""
    oversized = bytes(MAX_CERTIFICATE_BYTES + 1)
    for read in (read_certificate, PeerVerifier().principal):
        with pytest.raises(PeerError) as refusal:
            read(oversized)
        assert refusal.value.reason == "certificate_too_large"


@given(st.data())
def test_a_damaged_certificate_is_a_peer_error_or_still_a_principal(data):
    """Whatever bytes a peer sends, only PeerError comes out."""
    damaged = bytearray(_VALID)
    for _ in range(data.draw(st.integers(1, 8))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    end = data.draw(st.integers(0, len(damaged)) | st.just(len(damaged)))
    outcome = value_or_refusal(lambda: read_certificate(bytes(damaged[:end])))
    assert outcome.status == 401 if isinstance(outcome, PeerError) else outcome.principal.id


@given(st.binary(max_size=600))
def test_arbitrary_bytes_are_no_certificate(data):
    """Noise is refused as malformed."""
    with pytest.raises(PeerError):
        read_certificate(data)


def test_every_byte_of_a_certificate_may_be_changed():
    """Each single-byte change of the whole certificate leads to a principal or a PeerError."""
    for index in range(len(_VALID)):
        for value in (0x00, 0xFF, _VALID[index] ^ 0x01, _VALID[index] ^ 0x20, _VALID[index] ^ 0x80):
            damaged = _VALID[:index] + bytes([value]) + _VALID[index + 1 :]
            outcome = value_or_refusal(partial(read_certificate, damaged))
            assert outcome.status == 401 if isinstance(outcome, PeerError) else outcome.principal.id
