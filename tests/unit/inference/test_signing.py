"""Signatures over packages, and the ways to forge them."""

import base64
import datetime as dt
import hashlib
import json

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID
from hypothesis import given
from hypothesis import strategies as st

from agent.certificate import key_usage
from agent.errors import ConfigError, VerificationError
from agent.inference.signing import (
    MAX_BUNDLE_BYTES,
    TrustStore,
    load_signing_key,
    sign,
    verify_bundle,
)
from tests.support.ek_chains import Ca as EkCa
from tests.support.ek_chains import armoured, of_version
from tests.support.models import DIGITAL_SIGNATURE, EPOCH, CertificateMaker, new_key, private_pem, public_pem

FILES = {"model.onnx": "aa" * 32, "model.yaml": "bb" * 32, "sub/data.bin": "cc" * 32}
KEY = new_key()
TRUST = TrustStore((KEY.public_key(),))
BUNDLE = sign("m", FILES, KEY)


def _check(bundle, files=None, trust=TRUST):
    with pytest.raises(VerificationError) as caught:
        verify_bundle(bundle, FILES if files is None else files, trust)
    return caught.value.check


def _resigned(change, key=KEY, payload_type="application/vnd.in-toto+json", encode=json.dumps):
    """Return the bundle with a changed statement, signed again by the right key."""
    bundle = json.loads(BUNDLE)
    statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    change(statement)
    payload = encode(statement).encode()
    message = b"DSSEv1 %d %s %d %s" % (len(payload_type), payload_type.encode(), len(payload), payload)
    signature = key.sign(message, ec.ECDSA(hashes.SHA256()))
    bundle["dsseEnvelope"] = {
        "payload": base64.b64encode(payload).decode(),
        "payloadType": payload_type,
        "signatures": [{"sig": base64.b64encode(signature).decode(), "keyid": ""}],
    }
    return json.dumps(bundle).encode()


def test_a_signed_package_verifies_and_names_its_signer():
    """The signer is known by the digest of its public key in DER."""
    der = KEY.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    signer = verify_bundle(BUNDLE, FILES, TRUST)
    assert (signer.kind, signer.sha256_of_spki) == ("key", hashlib.sha256(der).hexdigest())


def test_a_bundle_without_hint_is_tried_against_every_trusted_key():
    """Older signers leave the key's name out."""
    bundle = json.loads(BUNDLE)
    bundle["verificationMaterial"]["publicKey"] = {}
    trust = TrustStore((new_key().public_key(), KEY.public_key()))
    assert verify_bundle(json.dumps(bundle).encode(), FILES, trust).kind == "key"


def _statement_forgeries():
    def resources(statement):
        return statement["predicate"]["resources"]

    def set_root(statement):
        digests = b"".join(bytes.fromhex(entry["digest"]) for entry in resources(statement))
        statement["subject"][0]["digest"]["sha256"] = hashlib.sha256(digests).hexdigest()

    def drop_file(statement):
        resources(statement).pop()
        set_root(statement)

    def ignore_file(statement):
        drop_file(statement)
        statement["predicate"]["serialization"]["ignore_paths"] = ["sub", "sub/data.bin", "model.sig"]

    def twice(statement):
        resources(statement).append(dict(resources(statement)[0]))
        set_root(statement)

    def extra(name):
        def change(statement):
            resources(statement).append({"name": name, "algorithm": "sha256", "digest": "dd" * 32})
            set_root(statement)

        return change

    def other_digest(statement):
        resources(statement)[0]["digest"] = "ee" * 32
        set_root(statement)

    def upper_case(statement):
        resources(statement)[0]["digest"] = "AA" * 32
        set_root(statement)

    return [
        ("unlisted-file", drop_file),
        ("unlisted-file", ignore_file),
        ("duplicate-name", twice),
        ("missing-file", extra("other.bin")),
        ("missing-file", extra("../model.onnx")),
        ("missing-file", extra("/etc/passwd")),
        ("missing-file", extra("./model.onnx")),
        ("missing-file", extra("model.sig")),
        ("file-digest", other_digest),
        ("file-digest", upper_case),
        ("subject-digest", lambda s: s["subject"][0]["digest"].update(sha256="00" * 32)),
        ("subject-digest", lambda s: s["subject"][0]["digest"].update(sha512="00")),
        ("subject", lambda s: s["subject"].append(s["subject"][0])),
        ("statement-type", lambda s: s.update(_type="https://in-toto.io/Statement/v0.1")),
        ("predicate-type", lambda s: s.update(predicateType="https://model_signing/Digests/v0.1")),
        ("predicate-type", lambda s: s.update(predicateType="https://slsa.dev/provenance/v1")),
        ("serialization", lambda s: s["predicate"]["serialization"].update(method="shards")),
        ("serialization", lambda s: s["predicate"]["serialization"].update(hash_type="blake2")),
        ("digest-algorithm", lambda s: resources(s)[0].update(algorithm="md5")),
        ("statement-format", lambda s: resources(s)[0].update(digest="not hex")),
        ("statement-format", lambda s: s.pop("predicate")),
        ("statement-format", lambda s: s.pop("_type")),
        ("statement-format", lambda s: s["predicate"].update(resources={})),
    ]


@pytest.mark.parametrize(("check", "change"), _statement_forgeries())
def test_a_statement_that_says_something_else_is_refused(check, change):
    """Even signed by a trusted key, only exactly these files with exactly these digests hold."""
    assert _check(_resigned(change)) == check


def _envelope_forgeries():
    def edit(path, value):
        def change(bundle):
            *parents, last = path
            for step in parents:
                bundle = bundle[step]
            bundle[last] = value

        return change

    signatures = json.loads(BUNDLE)["dsseEnvelope"]["signatures"]
    other = sign("m", FILES, new_key())
    return [
        ("bundle-media-type", edit(["mediaType"], "application/vnd.dev.sigstore.bundle.v0.2+json")),
        ("payload-type", edit(["dsseEnvelope", "payloadType"], "text/plain")),
        ("signature-count", edit(["dsseEnvelope", "signatures"], [])),
        ("signature-count", edit(["dsseEnvelope", "signatures"], signatures * 2)),
        ("signature", edit(["dsseEnvelope", "signatures"], json.loads(other)["dsseEnvelope"]["signatures"])),
        ("signature", edit(["dsseEnvelope", "signatures", 0, "sig"], "")),
        ("signature", edit(["dsseEnvelope", "signatures", 0, "sig"], "MAYCAQACAQA=")),
        ("untrusted-key", edit(["verificationMaterial", "publicKey", "hint"], "00" * 32)),
        ("verification-material", edit(["verificationMaterial"], {})),
        ("verification-material", edit(["verificationMaterial"], {"certificate": {"rawBytes": ""}})),
        ("verification-material", edit(["verificationMaterial", "x509CertificateChain"], {"certificates": []})),
        ("certificate-chain", edit(["verificationMaterial"], {"x509CertificateChain": {"certificates": []}})),
        (
            "certificate-chain",
            edit(["verificationMaterial"], {"x509CertificateChain": {"certificates": [{"rawBytes": "AAAA"}]}}),
        ),
        ("bundle-format", edit(["dsseEnvelope"], None)),
        ("bundle-format", edit(["dsseEnvelope", "payload"], "%%%")),
    ]


@pytest.mark.parametrize(("check", "change"), _envelope_forgeries())
def test_a_bundle_that_is_put_together_wrongly_is_refused(check, change):
    """Each part of the bundle that could be swapped has a check of its own."""
    bundle = json.loads(BUNDLE)
    change(bundle)
    assert _check(json.dumps(bundle).encode()) == check


def test_another_payload_type_under_a_good_signature_is_refused():
    """A trusted key that signed some other kind of document has not signed a model."""
    assert _check(_resigned(lambda _: None, payload_type="application/json")) == "payload-type"


def test_an_untrusted_key_is_refused():
    """A good signature by a stranger is no signature."""
    assert _check(sign("m", FILES, new_key())) == "untrusted-key"


def test_a_stranger_who_borrows_the_trusted_keys_name_is_refused():
    """The hint names a key, it does not prove one."""
    stranger = json.loads(sign("m", FILES, new_key()))
    stranger["verificationMaterial"] = json.loads(BUNDLE)["verificationMaterial"]
    assert _check(json.dumps(stranger).encode()) == "signature"


def test_the_format_before_version_one_is_refused():
    """The signature over the badly escaped encoding of version 0.2 does not hold."""
    bundle = json.loads(BUNDLE)
    payload = base64.b64decode(bundle["dsseEnvelope"]["payload"])
    kind = "application/vnd.in-toto+json"
    old = f"DSSEV1 {len(kind)} {kind} {len(payload)} {payload!r}".encode()
    signature = KEY.sign(old, ec.ECDSA(hashes.SHA256()))
    bundle["dsseEnvelope"]["signatures"] = [{"sig": base64.b64encode(signature).decode()}]
    assert _check(json.dumps(bundle).encode()) == "signature"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"null",
        b'{"mediaType":"\xff"}',
        b"[" * 100_000,
        b'{"x":' * 100_000,
        b"1" * 10_000,
    ],
)
def test_rubbish_is_no_bundle(data):
    """Malformed, deep and undecodable input has the same name as every other: bundle-format."""
    assert _check(data) == "bundle-format"


def test_an_oversized_bundle_is_not_parsed():
    """The size is looked at first."""
    assert _check(b" " * (MAX_BUNDLE_BYTES + 1)) == "bundle-size"


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@given(data=st.data())
def test_any_mutation_is_refused_by_name(data):
    """Replace any node of the bundle, or of the signed statement, by anything: only VerificationError comes out."""
    bundle = json.loads(BUNDLE)
    inner = data.draw(st.booleans())
    document = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"])) if inner else bundle
    node = document
    while isinstance(node, dict | list) and node:
        keys = sorted(node) if isinstance(node, dict) else range(len(node))
        key = data.draw(st.sampled_from(list(keys)))
        if data.draw(st.booleans()) or not isinstance(node[key], dict | list) or not node[key]:
            node[key] = data.draw(_JSON)
            break
        node = node[key]
    forged = _resigned(lambda s: (s.clear(), s.update(document))) if inner else json.dumps(bundle).encode()
    try:
        signer = verify_bundle(forged, FILES, TRUST)
    except VerificationError as error:
        assert error.check  # noqa: PT017 -- which check it is depends on what was drawn
    else:
        assert signer == verify_bundle(BUNDLE, FILES, TRUST)


@given(st.binary(max_size=300))
def test_random_bytes_are_refused_by_name(data):
    """No input leaks another exception."""
    assert _check(data) == "bundle-format"


@given(st.integers(0, len(BUNDLE) - 1), st.integers(1, 255))
def test_a_flipped_byte_never_changes_the_verdict_to_another_signer(position, mask):
    """One changed byte in the bundle is refused, or lies outside of what is signed and changes nothing."""
    forged = bytearray(BUNDLE)
    forged[position] ^= mask
    try:
        signer = verify_bundle(bytes(forged), FILES, TRUST)
    except VerificationError:
        return
    assert signer == verify_bundle(BUNDLE, FILES, TRUST)


ROOT = CertificateMaker.root()
ROOTS = TrustStore(roots=(ROOT.certificate,))


def _chain(leaf, *others):
    return sign("m", FILES, leaf.key, [leaf.certificate, *(other.certificate for other in others)])


def test_a_chain_to_a_trusted_root_verifies_and_names_its_subject():
    """An intermediate may stand between; the signer carries the subject."""
    middle = ROOT.issue("Middle", ca=True)
    leaf = middle.issue("Release", key_usage=DIGITAL_SIGNATURE)
    signer = verify_bundle(_chain(leaf, middle), FILES, ROOTS)
    assert (signer.kind, signer.subject, signer.in_date) == ("certificate", "CN=Release", True)


NO_SIGNATURES = key_usage("key_encipherment")


def _bad_chains():
    other = CertificateMaker.root("Other")
    middle = ROOT.issue("Middle", ca=True)
    short = ROOT.issue("Short", ca=True, path_length=0)
    below = short.issue("Below", ca=True)
    no_ca = ROOT.issue("Not a CA")
    fake = CertificateMaker.root("Root")
    old = ROOT.issue("Old", ca=True, days=1)
    rsa_key = rsa.generate_private_key(65537, 2048)
    return [
        ("candidates exhausted", _chain(other.issue("Leaf"))),
        ("missing required extension", _chain(CertificateMaker.root("Leaf"))),
        ("signature does not match", _chain(fake.issue("Leaf"))),
        ("candidates exhausted", _chain(middle.issue("Leaf"))),
        ("no code-signing extended key usage", _chain(ROOT.issue("Leaf", usages=(ExtendedKeyUsageOID.CLIENT_AUTH,)))),
        ("missing required extension", _chain(ROOT.issue("Leaf", usages=()))),
        ("may not make signatures", _chain(ROOT.issue("Leaf", key_usage=NO_SIGNATURES))),
        ("cA must be asserted", _chain(no_ca.issue("Leaf"), no_ca)),
        ("path length constraint", _chain(below.issue("Leaf"), below, short)),
        (
            "not valid at validation time",
            _chain(old.issue("Leaf", start=EPOCH + dt.timedelta(days=9)), old),
        ),
        ("not an EC P-256 key", _with_certificate(ROOT.issue("Leaf", key=rsa_key))),
        ("not an EC P-256 key", _with_certificate(ROOT.issue("Leaf", key=ec.generate_private_key(ec.SECP384R1())))),
        ("9 certificates", _chain(ROOT.issue("Leaf"), *[middle] * 8)),
    ]


def _with_certificate(maker):
    return _with_der(maker.certificate.public_bytes(serialization.Encoding.DER))


def _with_der(der):
    bundle = json.loads(BUNDLE)
    raw = base64.b64encode(der).decode()
    bundle["verificationMaterial"] = {"x509CertificateChain": {"certificates": [{"rawBytes": raw}]}}
    return json.dumps(bundle).encode()


@pytest.mark.parametrize(("reason", "bundle"), _bad_chains())
def test_a_chain_with_a_weak_link_is_refused(reason, bundle):
    """Every link is looked at: issuer, CA, path length, usages, dates, kind of key."""
    with pytest.raises(VerificationError, match=reason) as caught:
        verify_bundle(bundle, FILES, ROOTS)
    assert caught.value.check == "certificate-chain"


def test_a_certificate_of_no_version_is_refused():
    """A number that X.509 does not have is an error of its own in the library, and one of verification here."""
    assert _check(_with_der(of_version(7, EkCa("Signer").der()))) == "certificate-chain"


def test_a_certificate_is_worth_nothing_without_trusted_roots():
    """A node that trusts a key alone does not take certificates."""
    assert _check(_chain(ROOT.issue("Leaf"))) == "certificate-chain"


def test_a_certificate_signs_only_with_its_own_key():
    """A good chain beside a signature by another key is refused."""
    assert _check(_with_certificate(ROOT.issue("Leaf")), trust=ROOTS) == "signature"


def test_an_expired_certificate_still_verifies_and_says_so():
    """What was signed in date goes on to load; policy is told that the certificate is out of date."""
    past = CertificateMaker.root("Past", start=dt.datetime(2000, 1, 1, tzinfo=dt.UTC), days=400)
    old = past.issue("Old", start=dt.datetime(2000, 2, 1, tzinfo=dt.UTC), days=30)
    signer = verify_bundle(_chain(old), FILES, TrustStore(roots=(past.certificate,)))
    assert not signer.in_date


def test_trust_store_takes_keys_and_certificates_and_nothing_else():
    """Trust is loaded from PEM; another kind of key or rubbish names the setting."""
    trust = TrustStore.from_pem(public_pem(KEY), ROOT.pem)
    assert verify_bundle(BUNDLE, FILES, trust).kind == "key"
    assert verify_bundle(_chain(ROOT.issue("Leaf")), FILES, trust).kind == "certificate"
    ed = ed25519.Ed25519PrivateKey.generate().public_key()
    pem = ed.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    for wrong in (pem, b"rubbish", b"", private_pem(KEY), armoured(of_version(7, EkCa("Signer").der()))):
        with pytest.raises(ConfigError, match="trusted signer"):
            TrustStore.from_pem(wrong)


def test_signing_key_must_be_p256():
    """Another kind of key is refused before anything is signed."""
    for key in (ec.generate_private_key(ec.SECP384R1()), ed25519.Ed25519PrivateKey.generate()):
        with pytest.raises(ConfigError, match="EC P-256"):
            load_signing_key(private_pem(key))
    for pem in (b"", public_pem(KEY)):
        with pytest.raises(ConfigError):
            load_signing_key(pem)
    encrypted = KEY.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"pw")
    )
    assert load_signing_key(encrypted, b"pw").public_key() == KEY.public_key()
    for password in (None, b"wrong"):
        with pytest.raises(ConfigError):
            load_signing_key(encrypted, password)


def test_a_chain_must_begin_with_the_keys_certificate():
    """Signing with a certificate of another key is the signer's mistake, found before it is shipped."""
    with pytest.raises(ConfigError, match="first certificate"):
        sign("m", FILES, KEY, [ROOT.certificate])
