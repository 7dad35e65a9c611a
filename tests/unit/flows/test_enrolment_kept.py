"""What a damaged disk, a stranger or a kill at any moment leaves of an enrolment: a named error with the way out, or all or nothing."""

import json
import os
import signal
import stat
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat

from agent.errors import VerificationError
from agent.flows.enrolled import ADVICE, MAX_FILE_BYTES, EnrolmentStore
from tests.support.controller import Ca, pem, private_key
from tests.support.ek_chains import armoured, of_version
from tests.support.enrolment import identity_of

KEY = ec.generate_private_key(ec.SECP256R1())


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "state" / "controller"


@pytest.fixture
def store(folder):
    return EnrolmentStore(folder)


@pytest.fixture
def identity():
    return identity_of(KEY)


def save(store, identity, result="a.b.c"):
    store.save_key(identity.key)
    store.save(identity, result)


OTHER = identity_of(ec.generate_private_key(ec.SECP256R1()))
ENCRYPTED = private_key(OTHER.key).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"word"))


def _record(**changes: Any) -> Callable[[bytes], bytes]:
    return lambda data: json.dumps({**json.loads(data), **changes}).encode()


def _of_no_version(data: bytes) -> bytes:
    return armoured(of_version(7, x509.load_pem_x509_certificate(data).public_bytes(Encoding.DER)))


DAMAGE: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    f"{name}: {how}": (name, change)
    for name in ("enrolment.json", "key.pem", "certificate.pem", "ca.pem")
    for how, change in {
        "empty": lambda _: b"",
        "cut": lambda data: data[: len(data) // 2],
        "zeros": lambda data: bytes(len(data)),
        "no text": lambda _: b"\xff\xfe",
        "too large": lambda data: data + b" " * MAX_FILE_BYTES,
    }.items()
} | {
    "key.pem: another node's": ("key.pem", lambda _: OTHER.key),
    "key.pem: encrypted": ("key.pem", lambda _: ENCRYPTED),
    "certificate.pem: another node's": ("certificate.pem", lambda _: OTHER.certificate),
    "ca.pem: a key": ("ca.pem", lambda _: OTHER.key),
    "ca.pem: of no version": ("ca.pem", _of_no_version),
    "enrolment.json: nested without end": ("enrolment.json", lambda _: b'{"url":' + b"[" * 100_000),
    "enrolment.json: a list": ("enrolment.json", lambda _: b"[]"),
    "enrolment.json: another version": ("enrolment.json", _record(version=2)),
    "enrolment.json: more than it has": ("enrolment.json", _record(more=1)),
    "enrolment.json: a time without text": ("enrolment.json", _record(since=10**17)),
    "enrolment.json: no interval": ("enrolment.json", _record(interval_s=0)),
    "enrolment.json: no address": ("enrolment.json", _record(url="ftp://controller.example")),
    "enrolment.json: no keys": ("enrolment.json", _record(jwks="[]")),
    "enrolment.json: another fleet's": ("enrolment.json", _record(trust_domain="other.example")),
    "enrolment.json: another node's": ("enrolment.json", _record(node="n2")),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_what_was_damaged_is_named_with_the_way_out(store, folder, identity, how):
    """Not "not enrolled", which would be trusted more; and nothing but a VerificationError."""
    save(store, identity)
    name, change = DAMAGE[how]
    path = folder / name
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(VerificationError, match="enrolment") as caught:
        store.load("n1")
    assert ADVICE in str(caught.value)
    assert str(folder) in str(caught.value)
    assert "PRIVATE" not in str(caught.value)


@pytest.mark.parametrize("name", ["key.pem", "certificate.pem", "ca.pem"])
def test_what_is_missing_is_named_with_the_way_out(store, folder, identity, name):
    """Each file by its name."""
    save(store, identity)
    (folder / name).unlink()
    with pytest.raises(VerificationError, match=name) as caught:
        store.load("n1")
    assert ADVICE in str(caught.value)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o644, 0o666])
def test_a_key_that_others_could_read_is_not_used(store, folder, identity, mode):
    """Whoever read it is this node for the controller's TLS; what others can read of the rest is no secret."""
    save(store, identity)
    for name in ("certificate.pem", "ca.pem", "enrolment.json", "result.jwt"):
        (folder / name).chmod(0o644)
    assert store.load("n1") == identity
    (folder / "key.pem").chmod(mode)
    with pytest.raises(VerificationError, match="others may have read the key") as caught:
        store.load("n1")
    assert ADVICE in str(caught.value)


@pytest.mark.parametrize("name", ["enrolment.json", "key.pem", "certificate.pem", "ca.pem", "result.jwt"])
@pytest.mark.parametrize("what", ["pipe", "link", "directory"])
def test_what_is_no_file_is_neither_waited_for_nor_followed(store, folder, identity, name, what):
    """Each by name."""
    save(store, identity)
    path = folder / name
    path.rename(folder / "elsewhere")
    if what == "pipe":
        os.mkfifo(path, 0o600)
    elif what == "link":
        path.symlink_to("elsewhere")
    else:
        path.mkdir()
    with pytest.raises(VerificationError, match=f"{name} is no file"):
        _ = store.result() if name == "result.jwt" else store.load("n1")


def test_a_ca_that_has_ended_stops_no_start(store):
    """Nothing expires into a site visit: the node starts, is not connected, and says why."""
    identity = identity_of(KEY, begin_s=-7200, end_s=-3600)
    save(store, identity)
    again = store.load("n1")
    assert again is not None
    assert again.ca_until > again.valid_until


# --- kill -9 between any two calls of the system

CALLS = ("mkdir", "open", "fsync", "replace", "unlink")


def _killed_before(number: int, work: Callable[[], object]) -> bool:
    """Do work in a child that is killed before its n-th call of the system; returns whether it came that far."""
    child = os.fork()
    if child == 0:
        left = number

        def counted(call: Callable[..., Any]) -> Callable[..., Any]:
            def counting(*words: Any, **more: Any) -> Any:
                nonlocal left
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*words, **more)

            return counting

        for name in CALLS:
            setattr(os, name, counted(getattr(os, name)))
        try:
            work()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def test_a_kill_at_any_moment_of_an_enrolment_leaves_all_or_nothing(tmp_path, identity):
    """Also over what an earlier enrolment and an earlier kill left; and the next try is as good as the first."""
    folder = tmp_path / "controller"
    store = EnrolmentStore(folder)
    seen = set()
    number = 0
    while _killed_before(number, lambda: save(store, identity, "new")):
        found = store.load("n1")
        assert found in (None, identity)
        if found is not None:
            assert store.result() == "new"
        seen.add(found is None)
        store.forget()
        assert list(folder.glob("*")) == []
        number += 1
    assert store.load("n1") == identity
    assert (seen, number > 20) == ({True, False}, True)


def test_a_kill_at_any_moment_over_leftovers_leaves_all_or_nothing(store, folder, identity):
    """Half of another enrolment and half-written files do not become a part of the new one."""
    for number in range(0, 24, 3):
        _killed_before(number, lambda: save(store, OTHER, "old"))
        for name in ("key.pem.new", "ca.pem.new"):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            (folder / name).write_bytes(b"half")
        if (folder / "enrolment.json").exists():
            store.forget()
        save(store, identity, "new")
        assert (store.load("n1"), store.result()) == (identity, "new")
        assert {stat.S_IMODE(path.stat().st_mode) for path in folder.glob("*")} == {0o600}
        store.forget()


def test_a_kill_at_any_moment_of_a_renewal_leaves_the_old_certificate_or_the_new(store, identity):
    """Each of which is the node's."""
    save(store, identity)
    name = "spiffe://fleet.example/node/n1"
    key = private_key(identity.key).public_key()
    renewed = replace(identity, certificate=pem(Ca().issue(key, name)).encode())
    number, seen = 0, set()
    while _killed_before(number, lambda: store.save_certificate(renewed.certificate)):
        found = store.load("n1")
        assert found is not None
        assert found.certificate in {identity.certificate, renewed.certificate}
        seen.add(found.certificate)
        store.save_certificate(identity.certificate)
        number += 1
    assert seen == {identity.certificate, renewed.certificate}


def test_a_kill_at_any_moment_of_taking_a_result_leaves_the_old_one_or_the_new(store, identity):
    """Never none, with which the node would load nothing, and never a part."""
    save(store, identity, "old" * 1000)
    number, seen = 0, set()
    while _killed_before(number, lambda: store.save_result("new" * 1000)):
        seen.add(store.result())
        store.save_result("old" * 1000)
        number += 1
    assert seen == {"old" * 1000, "new" * 1000}


def test_a_kill_at_any_moment_of_a_leaving_leaves_all_or_nothing(store, folder, identity):
    """And asking again does the rest: no key stays behind."""
    number, seen = 0, set()
    save(store, identity)
    while _killed_before(number, store.forget):
        found = store.load("n1")
        assert found in (None, identity)
        seen.add(found is None)
        store.forget()
        assert list(folder.glob("*")) == []
        save(store, identity)
        number += 1
    assert seen == {True, False}
    assert list(folder.glob("*")) == []


def test_where_nothing_is_kept_there_is_nothing_to_forget(store, folder):
    """And no directory is made for it."""
    store.forget()
    assert not folder.exists()
