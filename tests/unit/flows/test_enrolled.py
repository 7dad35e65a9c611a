"""What is kept of an enrolment: either all of it or none, and nothing that was damaged is believed."""

import stat

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from agent.errors import HostError, VerificationError
from agent.flows.enrolled import EnrolmentStore, csr_for, new_key, public_spki_sha256
from tests.support.controller import Ca, pem, private_key, spki
from tests.support.ek_chains import armoured
from tests.support.enrolment import identity_of

KEY = ec.generate_private_key(ec.SECP256R1())


@pytest.fixture
def store(tmp_path):
    return EnrolmentStore(tmp_path / "state" / "controller")


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "state" / "controller"


@pytest.fixture
def identity():
    return identity_of(KEY)


def save(store, identity, result="a.b.c"):
    store.save_key(identity.key)
    store.save(identity, result)


def test_an_enrolment_comes_back_as_it_was(store, identity):
    """Everything that was kept, and what follows from it."""
    save(store, identity)
    again = store.load("n1")
    assert again == identity
    assert again.controller_id == "spiffe://fleet.example/controller"
    assert again.valid_from < again.renew_at < again.valid_until
    assert store.result() == "a.b.c"


def test_where_nothing_is_kept_the_node_is_not_enrolled(store):
    """No directory is no enrolment."""
    assert store.load("n1") is None
    assert store.result() is None


def test_others_can_not_read_the_key(store, folder, identity):
    """The key is its owner's alone, and so is the directory; no error or description shows the key."""
    save(store, identity)
    assert stat.S_IMODE((folder / "key.pem").stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert "PRIVATE" not in repr(identity)


@pytest.mark.parametrize("steps", range(5))
def test_a_crash_leaves_the_node_enrolled_or_not(store, identity, monkeypatch, steps):
    """Whatever write is the last one: until the last file is there the node is not enrolled, then wholly."""
    wrote = EnrolmentStore._write
    left = steps

    def write(self, name, data):
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        wrote(self, name, data)

    monkeypatch.setattr(EnrolmentStore, "_write", write)
    if steps < 5:
        with pytest.raises(KeyboardInterrupt):
            save(store, identity)
    assert store.load("n1") is None
    monkeypatch.setattr(EnrolmentStore, "_write", wrote)
    save(store, identity)
    assert store.load("n1") == identity


@pytest.mark.parametrize("steps", range(1, 5))
def test_a_crash_while_leaving_is_a_node_that_left(store, folder, identity, monkeypatch, steps):
    """The first file to go is the one that makes it enrolled."""
    save(store, identity)
    synced = EnrolmentStore._sync
    left = steps

    def sync(self):
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        synced(self)

    monkeypatch.setattr(EnrolmentStore, "_sync", sync)
    with pytest.raises(KeyboardInterrupt):
        store.forget()
    assert store.load("n1") is None
    monkeypatch.setattr(EnrolmentStore, "_sync", synced)
    store.forget()
    assert list(folder.iterdir()) == []
    store.forget()


@pytest.mark.parametrize("name", ["key.pem", "certificate.pem", "ca.pem"])
def test_a_file_that_is_missing_is_no_missing_enrolment(store, folder, identity, name):
    """Not enrolled would be trusted more."""
    save(store, identity)
    (folder / name).unlink()
    with pytest.raises(VerificationError, match="missing"):
        store.load("n1")


@pytest.mark.parametrize("name", ["enrolment.json", "key.pem", "certificate.pem", "ca.pem"])
@pytest.mark.parametrize("content", [b"", b"garbage", b"\xff" * 100])
def test_a_damaged_file_is_an_error(store, folder, identity, name, content):
    """Whatever was damaged, and however."""
    save(store, identity)
    (folder / name).write_bytes(content)
    with pytest.raises(VerificationError, match="enrolment"):
        store.load("n1")


@pytest.mark.filterwarnings("ignore:Parsed a serial number")  # a flipped bit makes it negative; that is no refusal
def test_a_certificate_with_a_flipped_bit_is_refused_by_name_or_says_the_same(identity):
    """Every bit of the node's certificate: nothing but a VerificationError, and where it loads, it names this node and this key."""
    der = x509.load_pem_x509_certificate(identity.certificate).public_bytes(Encoding.DER)
    refused = 0
    for at in range(8 * len(der)):
        damaged = der[: at // 8] + bytes([der[at // 8] ^ 1 << at % 8]) + der[at // 8 + 1 :]
        try:
            built = identity.renewed(armoured(damaged))
        except VerificationError as error:
            refused += str(error).startswith("enrolment: ")
            continue
        assert (built.spki_sha256, built.enrolment) == (identity.spki_sha256, identity.enrolment)
    assert refused > len(der)


def test_a_file_that_is_too_large_is_an_error(store, folder, identity):
    """No file is read without a limit."""
    save(store, identity)
    (folder / "ca.pem").write_bytes(identity.ca * 4000)
    with pytest.raises(VerificationError, match="larger"):
        store.load("n1")


def test_a_damaged_result_is_none(store, folder, identity):
    """It is then asked for anew; until then nothing loads."""
    save(store, identity)
    (folder / "result.jwt").write_bytes(b"\xff")
    assert store.result() is None
    (folder / "result.jwt").write_bytes(b"x" * (600 * 1024))
    assert store.result() is None


def test_another_node_can_not_take_it_over(store, identity):
    """A node that was given another name must enrol anew."""
    save(store, identity)
    with pytest.raises(VerificationError, match=r"node\.id"):
        store.load("n2")


def test_a_certificate_for_another_key_is_refused(identity):
    """A renewal keeps the key."""
    other = identity_of(KEY)
    with pytest.raises(VerificationError, match="enrolment"):
        identity.renewed(other.certificate)


def test_a_certificate_for_another_node_is_refused(identity):
    """So does the name."""
    ca = Ca()
    key = private_key(identity.key).public_key()
    for name in (
        "spiffe://fleet.example/node/n2",
        "spiffe://other.example/node/n1",
        "spiffe://fleet.example/controller",
    ):
        with pytest.raises(VerificationError, match="not for this node"):
            identity.renewed(pem(ca.issue(key, name)).encode())


@pytest.mark.parametrize("certificate", [b"", b"-----BEGIN CERTIFICATE-----\nAA==\n-----END CERTIFICATE-----\n"])
def test_what_is_no_certificate_is_refused(identity, certificate):
    """Nothing but a VerificationError leaves."""
    with pytest.raises(VerificationError, match="certificate"):
        identity.renewed(certificate)


def test_a_certificate_without_names_is_refused(identity):
    """The node is known by its SPIFFE ID."""
    with pytest.raises(VerificationError, match="certificate"):
        identity.renewed(pem(Ca().root).encode())


def test_keys_of_the_controller_that_are_none_are_refused():
    """An enrolment without keys to verify results with is none."""
    with pytest.raises(VerificationError, match="keys"):
        identity_of(KEY, jwks="{}")


def test_a_renewed_certificate_comes_back(store, identity):
    """In the place of the old one, for the same key."""
    ca = Ca()
    first = identity_of(KEY, ca)
    save(store, first)
    name = "spiffe://fleet.example/node/n1"
    renewed = first.renewed(pem(ca.issue(private_key(first.key).public_key(), name, end_s=9e5)).encode())
    store.save_certificate(renewed.certificate)
    assert store.load("n1") == renewed
    assert renewed.valid_until > first.valid_until
    assert identity.key != renewed.key


def test_a_request_is_for_the_key(identity):
    """It is signed by the key and shows it."""
    request = x509.load_der_x509_csr(identity.csr())
    assert request.is_signature_valid
    key = request.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    assert spki(key) == identity.spki_sha256 == public_spki_sha256(identity.key)


@pytest.mark.parametrize(
    "key",
    [
        b"",
        rsa.generate_private_key(65537, 2048).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
    ],
)
def test_what_is_no_ec_key_is_refused(key):
    """The key was the node's own once; a damaged one is an error with a name."""
    with pytest.raises(VerificationError, match="key"):
        csr_for(key, "n1")
    assert new_key() != new_key()


def test_what_the_disk_refuses_is_an_error_of_the_host(store, folder, identity):
    """Reading, writing and removing: each names the file."""
    save(store, identity)
    (folder / "ca.pem").unlink()
    (folder / "ca.pem").mkdir()
    with pytest.raises(VerificationError, match=r"ca\.pem is no file"):
        store.load("n1")
    with pytest.raises(HostError, match=r"ca\.pem"):
        store.save(identity, "a.b.c")
    with pytest.raises(HostError, match=r"ca\.pem"):
        store.forget()
    (folder / "result.jwt.new").mkdir()
    with pytest.raises(HostError, match=r"result\.jwt"):
        store.save_result("a.b.c")
