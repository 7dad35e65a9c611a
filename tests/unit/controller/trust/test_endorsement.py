"""Whose TPM it is: chains, keys, and the operator's lists."""

import datetime as dt

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtensionOID
from hypothesis import given
from hypothesis import strategies as st

from agent.attest.enrolment import MAX_EK_CHAIN
from agent.errors import ConfigError, VerificationError
from controller.trust import endorsement
from controller.trust.credential import make_credential
from controller.trust.endorsement import (
    MAX_CHAIN,
    allowed,
    load_allowlist,
    load_roots,
    parse_ek_public,
    verify_endorsement,
)
from tests.support.ek_chains import HOSTILE, PAST, ROOT, Ca, Shown, armoured, good, line, of_version, under, usage
from tests.support.software_node import SoftwareNode

MOMENT = dt.datetime(2026, 6, 1, tzinfo=dt.UTC)
NODE = SoftwareNode()
KEY = NODE.ek.public_key()
RSA = rsa.generate_private_key(65537, 2048).public_key()
RSA_PUBLIC = endorsement._RSA_HEAD + b"\x01\x00" + RSA.public_numbers().n.to_bytes(256)
DIGEST = "ab" * 32


def _verify(shown, *, public=NODE.ek_public, roots=(ROOT,), moment=MOMENT):
    trusted = [root.certificate() for root in roots]
    return verify_endorsement(shown.certificate, shown.chain, public, trusted, moment)


def _refused(check, function, *args, **options):
    with pytest.raises(VerificationError) as refused:
        function(*args, **options)
    assert refused.value.check == check
    return str(refused.value)


@pytest.mark.parametrize("intermediates", [0, 1, 2, MAX_EK_CHAIN])
def test_a_genuine_tpm_is_known_by_its_key(intermediates):
    """With any number of intermediates that fits, an ECC or RSA key is known by the same digest as on an allowlist."""
    for key, public in ((KEY, NODE.ek_public), (RSA, RSA_PUBLIC)):
        found = _verify(good(key, intermediates), public=public)
        assert (found.key, found.subject) == (key, "CN=TPM")
        assert allowed(public, frozenset({found.sha256})).sha256 == found.sha256


def test_the_order_of_intermediates_and_what_is_beside_them_do_not_matter():
    """They may come in any order, twice, with the root or with certificates of other chains: what is not needed is not asked."""
    shown = good(KEY, 2)
    extra = (Ca("Somebody").der(), ROOT.der(), HOSTILE["expired intermediate"](NODE.ek).chain[0])
    assert _verify(Shown(shown.certificate, (*extra, *reversed(shown.chain)))).key == KEY
    assert _verify(Shown(shown.certificate, shown.chain * 3)).key == KEY


def test_an_intermediate_that_the_operator_trusts_needs_no_root():
    """A certificate of the trust store is an end of the chain, whoever signed it."""
    (middle,) = line(1)
    assert _verify(Shown(middle.endorse(KEY)), roots=[middle]).key == KEY


@pytest.mark.parametrize("how", HOSTILE)
def test_a_chain_that_does_not_hold_is_refused_by_name(how):
    """Dates, signatures, uses, CA flags and path lengths of every link: one check, ``ek-chain``."""
    _refused("ek-chain", _verify, HOSTILE[how](NODE.ek))


@pytest.mark.parametrize(
    ("moment", "good_then"),
    [(PAST, True), (PAST + dt.timedelta(seconds=1), False), (dt.datetime(2019, 12, 31, tzinfo=dt.UTC), False)],
)
def test_dates_are_held_to_the_second(moment, good_then):
    """The last second counts, the next does not; the trusted certificate has dates as well."""
    for shown, roots in (
        (Shown(ROOT.endorse(KEY, end=PAST)), [ROOT]),
        (under(KEY, Ca("Old", ROOT, end=PAST)), [ROOT]),
        (Shown((old := Ca("Old root", end=PAST)).endorse(KEY)), [old]),
    ):
        if good_then:
            assert _verify(shown, roots=roots, moment=moment).key == KEY
        else:
            _refused("ek-chain", _verify, shown, roots=roots, moment=moment)


def test_a_chain_has_a_longest_form(monkeypatch):
    """More CAs below the trusted one than the limit, and more certificates than a node may send, are refused."""
    _refused("ek-chain", _verify, good(KEY, MAX_EK_CHAIN + 1))
    monkeypatch.setattr(endorsement, "MAX_EK_CHAIN", MAX_CHAIN + 1)
    assert "depth" in _refused("ek-chain", _verify, good(KEY, MAX_CHAIN + 1))


def test_certificates_have_a_largest_size(monkeypatch):
    """The one of the key and each beside it, to the byte."""
    small = under(KEY, Ca("Intermediate", ROOT))
    large = ROOT.endorse(KEY, padding=1000)
    monkeypatch.setattr(endorsement, "MAX_CERTIFICATE_BYTES", len(large))
    assert _verify(Shown(large, small.chain)).key == KEY
    _refused("ek-chain", _verify, Shown(small.certificate, (*small.chain, bytes(len(large) + 1))))
    monkeypatch.setattr(endorsement, "MAX_CERTIFICATE_BYTES", len(large) - 1)
    _refused("ek-certificate", _verify, Shown(large, small.chain))


def test_without_a_trust_store_no_certificate_is_believed():
    """The operator is told which setting is empty."""
    assert "ek_roots" in _refused("ek-chain", _verify, good(KEY), roots=[])


def test_what_is_no_certificate_is_named():
    """Garbage in the certificate's place, or beside it."""
    _refused("ek-certificate", _verify, Shown(b"garbage"))
    _refused("ek-certificate", _verify, Shown(ROOT.endorse(KEY), (b"garbage",)))
    _refused("ek-certificate", _verify, Shown(ROOT.endorse(KEY) + b"\0"))
    _refused("ek-certificate", _verify, Shown(of_version(7, ROOT.endorse(KEY))))


def test_the_certificate_is_the_shown_key_s():
    """Not another's of the same kind, not of another kind, and not for a key that no endorsement key can be."""
    others = (SoftwareNode().ek.public_key(), RSA, ec.generate_private_key(ec.SECP384R1()).public_key())
    for other in others:
        _refused("ek-key", _verify, Shown(ROOT.endorse(other, key_usage=usage("key_agreement"))))
    _refused("ek-template", _verify, good(KEY), public=NODE.ek_public[:-1])


def test_a_default_that_is_spelled_out_is_no_ca():
    """The EK certificates of a large vendor encode ``cA FALSE``, which DER does not allow; they are genuine all the same."""
    spelled = x509.UnrecognizedExtension(ExtensionOID.BASIC_CONSTRAINTS, b"\x30\x03\x01\x01\x00")
    assert _verify(Shown(ROOT.endorse(KEY, constraints=spelled))).key == KEY


@pytest.mark.parametrize(
    "value",
    [
        b"\x30\x03\x01\x01\x01",
        b"\x30\x06\x01\x01\x00\x02\x01\x00",
        b"\x30\x06\x01\x01\xff\x02\x01\x00",
        b"\x30\x80\x00\x00",
        b"",
        b"\x30",
    ],
)
def test_any_other_encoding_of_constraints_is_refused(value):
    """Whatever a lenient parser could take for a CA is none of the two forms that are taken."""
    odd = x509.UnrecognizedExtension(ExtensionOID.BASIC_CONSTRAINTS, value)
    _refused("ek-chain", _verify, Shown(ROOT.endorse(KEY, constraints=odd)))


def test_an_extension_that_nobody_knows_must_not_be_critical():
    """What a certificate calls critical must be understood."""
    unknown = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"?")
    _refused("ek-chain", _verify, Shown(ROOT.endorse(KEY, constraints=unknown)))


# --- bytes of a stranger

SHOWN = good(KEY, 1)


def _damaged(data, draw):
    at = draw(st.integers(0, len(data) - 1))
    match draw(st.sampled_from(["flip", "cut", "insert", "repeat"])):
        case "flip":
            return data[:at] + bytes([data[at] ^ draw(st.integers(1, 255))]) + data[at + 1 :]
        case "cut":
            return data[:at]
        case "insert":
            return data[:at] + draw(st.binary(min_size=1, max_size=8)) + data[at:]
        case _:
            return data[: at + 1] + data


@pytest.mark.filterwarnings(
    "ignore:Parsed a serial number"
)  # a flipped bit makes it negative; what is said about that is no refusal
@given(st.data())
def test_a_damaged_certificate_is_refused_and_nothing_else_happens(data):
    """Any byte of the EK certificate or of the intermediate: a VerificationError of one of the two checks."""
    leaf, middle = SHOWN.certificate, SHOWN.chain[0]
    if data.draw(st.booleans()):
        leaf = _damaged(leaf, data.draw)
    else:
        middle = _damaged(middle, data.draw)
    with pytest.raises(VerificationError) as refused:
        _verify(Shown(leaf, (middle,)))
    assert refused.value.check in {"ek-certificate", "ek-chain"}


PUBLICS = (NODE.ek_public, RSA_PUBLIC)


def _parsed(public):
    """Return the key; None where it is refused by name. Anything else that is raised fails the test."""
    try:
        return parse_ek_public(public)
    except VerificationError as error:
        return error.check if error.check != "ek-template" else None


@given(st.data())
def test_a_damaged_public_area_is_refused_or_another_key(data):
    """Nothing but a VerificationError leaves the parser; what it takes is a key of the template, which differs, and a credential can be made for it."""
    public = data.draw(st.sampled_from(PUBLICS))
    changed = _damaged(public, data.draw)
    key = _parsed(changed)
    if key is not None:
        assert len(changed) == len(public)
        assert key != parse_ek_public(public)
        assert len(make_credential(key, b"\x00\x0b" + bytes(32), bytes(32))) == 2


@given(st.binary(max_size=600))
def test_bytes_are_no_public_area(data):
    """Nor are they after the head of a template, unless they are of its size."""
    _refused("ek-template", parse_ek_public, data)
    for head, size in ((endorsement._ECC_HEAD, 68), (endorsement._RSA_HEAD, 258)):
        if len(data) != size:
            _refused("ek-template", parse_ek_public, head + data)


def test_numbers_that_are_no_key_are_refused():
    """A point that is not on the curve, a modulus that is even or small."""
    _refused("ek-template", parse_ek_public, NODE.ek_public[:-1] + bytes([NODE.ek_public[-1] ^ 1]))
    for modulus in (bytes(256), b"\xff" * 255 + b"\xfe"):
        _refused("ek-template", parse_ek_public, endorsement._RSA_HEAD + b"\x01\x00" + modulus)


# --- what an operator writes


def test_a_tpm_that_is_not_listed_is_refused_with_its_digest():
    """So that the operator can copy it."""
    digest = _verify(good(KEY)).sha256
    assert digest in _refused("ek-allowlist", allowed, NODE.ek_public, frozenset({DIGEST}))


def test_the_trust_store_is_all_files_together(tmp_path):
    """Each file may hold several certificates."""
    (tmp_path / "a.pem").write_bytes(ROOT.pem() + Ca("Second").pem())
    (tmp_path / "b.pem").write_bytes(Ca("Third").pem())
    roots = load_roots([str(tmp_path / "a.pem"), str(tmp_path / "b.pem")])
    assert [root.subject.rfc4514_string() for root in roots] == ["CN=TPM vendor", "CN=Second", "CN=Third"]
    assert load_roots([]) == ()


def test_a_trust_store_that_is_none_is_a_configuration_error(tmp_path, monkeypatch):
    """Missing, no PEM, too large, too many: the message names setting and file."""
    path = tmp_path / "roots.pem"
    words = []
    for content in (
        None,
        b"garbage",
        b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
        armoured(of_version(7, ROOT.der())),
    ):
        if content is not None:
            path.write_bytes(content)
        words.append(_config_error(load_roots, [str(path)]))
    path.write_bytes(ROOT.pem())
    monkeypatch.setattr(endorsement, "MAX_ROOTS", 2)
    words.append(_config_error(load_roots, [str(path)] * 3))
    assert len(load_roots([str(path)] * 2)) == 2
    monkeypatch.setattr(endorsement, "MAX_ROOTS_FILE_BYTES", path.stat().st_size - 1)
    words.append(_config_error(load_roots, [str(path)]))
    assert all(f"enrolment.ek_roots: {path}: " in one for one in words)
    assert ["more than 2" in words[-2], "larger than" in words[-1]] == [True, True]


def _config_error(function, *args):
    with pytest.raises(ConfigError) as refused:
        function(*args)
    return str(refused.value)


def test_the_allowlist_is_digests_and_comments(tmp_path):
    """One a line; no file is nobody."""
    path = tmp_path / "list"
    path.write_text(f"# all of them\n\n  {DIGEST}  # till 3\n{DIGEST}\n{'cd' * 32}\n")
    assert load_allowlist(str(path)) == {DIGEST, "cd" * 32}
    assert load_allowlist(None) == frozenset()


def test_an_allowlist_that_is_none_is_a_configuration_error(tmp_path, monkeypatch):
    """Missing, no text, a line that is no digest, too large, too many: the message names setting, file and line."""
    path = tmp_path / "list"
    assert f"enrolment.ek_allowlist: {path}: " in _config_error(load_allowlist, str(path))
    path.write_bytes(b"\xff")
    assert f"enrolment.ek_allowlist: {path}: " in _config_error(load_allowlist, str(path))
    for line_of_it in ("AB" * 32, DIGEST[1:], DIGEST + "0", "all"):
        path.write_text(f"{DIGEST}\n{line_of_it}\n")
        assert f"{path}:2: not a SHA-256 digest" in _config_error(load_allowlist, str(path))
    path.write_text("".join(f"{number:064x}\n" for number in range(4)))
    monkeypatch.setattr(endorsement, "MAX_ALLOWED", 3)
    assert f"{path}:4: more than 3" in _config_error(load_allowlist, str(path))
    monkeypatch.setattr(endorsement, "MAX_ALLOWLIST_BYTES", 65 * 4 - 1)
    assert "larger than 259 bytes" in _config_error(load_allowlist, str(path))
