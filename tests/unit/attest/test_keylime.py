"""Keylime's formats, from bytes that anyone may have written."""

import base64
import hashlib
import hmac
import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.attest.keylime import (
    MAX_ANSWER_BYTES,
    MAX_KERNEL_LIST_BYTES,
    KernelList,
    Registration,
    activation,
    measurement_list,
    parse_challenge,
    parse_kernel_list,
    parse_revocation,
    pcr_blob,
    quote_string,
    runtime_policy,
)
from agent.attest.measurement import Entry, boot_aggregate, replay
from agent.errors import HostError, VerificationError
from tests.support.attest import ENTRIES

CREDENTIAL, SECRET = b"\x00\x03abc", b"\x00\x02de"
BLOB = struct.pack(">II", 0xBADCC0DE, 1) + CREDENTIAL + SECRET
AGGREGATE = boot_aggregate([bytes(32)] * 10)


def _answer(blob):
    return json.dumps({"code": 200, "status": "Success", "results": {"blob": base64.b64encode(blob).decode()}}).encode()


def _sig_line(algorithm="sha256", digest=AGGREGATE.digest):
    """The kernel's boot_aggregate in the template ima-sig, which has an empty signature."""
    fields = [algorithm.encode() + b":\0" + digest, b"boot_aggregate\0", b""]
    data = b"".join(struct.pack("<I", len(field)) + field for field in fields)
    sha1 = hashlib.sha1(data, usedforsecurity=False).hexdigest()
    return f"10 {sha1} ima-sig {algorithm}:{digest.hex()} boot_aggregate ", data


@pytest.mark.parametrize("indices", [(16,), (10, 16), tuple(range(17))])
def test_pcr_values_lie_as_in_the_memory_of_the_tss(indices):
    """One bank's bitmap, then lists of eight digests in ascending order, everything at its full size."""
    values = {index: bytes([index]) * 32 for index in reversed(indices)}
    blob = pcr_blob(values)
    count, algorithm, size, bitmap = struct.unpack_from("<IHB3s", blob)
    assert (count, algorithm, size) == (1, 0x000B, 3)
    assert int.from_bytes(bitmap, "little") == sum(1 << index for index in indices)
    (lists,) = struct.unpack_from("<I", blob, 132)
    assert lists == -(-len(indices) // 8)
    assert len(blob) == 136 + lists * (4 + 8 * 66)
    found = []
    for at in range(136, len(blob), 4 + 8 * 66):
        (digests,) = struct.unpack_from("<I", blob, at)
        for number in range(8):
            length, digest = struct.unpack_from("<H64s", blob, at + 4 + number * 66)
            assert length == (32 if number < digests else 0)
            found += [digest[:length]] if length else []
    assert found == [values[index] for index in indices]


def test_a_quote_is_three_parts():
    """A quote is the letter r and three parts in base64."""
    text = quote_string(b"attest", b"signature", {16: bytes(32)})
    assert text[0] == "r"
    assert [base64.b64decode(part) for part in text[1:].split(":")] == [
        b"attest",
        b"signature",
        pcr_blob({16: bytes(32)}),
    ]


def test_a_registration_says_both_keys_and_where_the_listener_is():
    """Public keys go as TPM2B_PUBLIC; without an endorsement certificate the field is null."""
    sent = json.loads(Registration.of(b"cert", b"ek", b"ak!", b"PEM", ("192.0.2.1", 9002)).encode())
    decoded = {name: base64.b64decode(sent[name]) for name in ("ekcert", "ek_tpm", "aik_tpm")}
    assert decoded == {"ekcert": b"cert", "ek_tpm": b"\x00\x02ek", "aik_tpm": b"\x00\x03ak!"}
    assert (sent["mtls_cert"], sent["ip"], sent["port"]) == ("PEM", "192.0.2.1", 9002)
    assert json.loads(Registration.of(None, b"ek", b"ak", b"PEM", ("192.0.2.1", 1)).encode())["ekcert"] is None


def test_a_challenge_is_read_in_full():
    """Both parts come out with their lengths, as the TPM wants them."""
    challenge = parse_challenge(_answer(BLOB))
    assert (challenge.credential_blob, challenge.encrypted_secret) == (CREDENTIAL, SECRET)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "not an answer"),
        (b'{"results": {}}', "not an answer"),
        (b'{"results": {"blob": "!"}}', "not an answer"),
        ('{"results": {"blob": "\u00e4"}}'.encode(), "not an answer"),
        (b" " * (MAX_ANSWER_BYTES + 1), "are over"),
        (_answer(b""), "does not begin"),
        (_answer(b"\xba\xdc\xc0\xdf" + BLOB[4:]), "does not begin"),
        (_answer(struct.pack(">II", 0xBADCC0DE, 2) + BLOB[8:]), "does not begin"),
        (_answer(BLOB[:8]), "cut short"),
        (_answer(BLOB[:9]), "cut short"),
        (_answer(BLOB[:-1]), "cut short"),
        (_answer(BLOB[: 8 + len(CREDENTIAL)]), "cut short"),
        (_answer(BLOB + b"x"), "follow"),
    ],
)
def test_a_challenge_that_is_none_is_a_verification_error(body, words):
    """What a registrar sends instead of a challenge has one error and a reason."""
    with pytest.raises(VerificationError, match=words) as caught:
        parse_challenge(body)
    assert caught.value.check == "keylime-challenge"


@given(st.binary(max_size=64) | st.binary(max_size=16).map(lambda tail: BLOB[:8] + tail))
def test_nothing_but_a_verification_error_leaves_the_challenge_s_parser(blob):
    """Whatever the blob's bytes, they are two sized parts or a VerificationError."""
    try:
        challenge = parse_challenge(_answer(blob))
    except VerificationError:
        return
    assert blob == BLOB[:8] + challenge.credential_blob + challenge.encrypted_secret


def test_the_proof_is_keyed_by_the_secret_s_text():
    """The tag is HMAC-SHA384 of the node's name under the base64 text of the secret."""
    tag = json.loads(activation(b"\x01" * 32, "node-1"))["auth_tag"]
    assert tag == hmac.new(base64.b64encode(b"\x01" * 32), b"node-1", hashlib.sha384).hexdigest()


def test_a_revocation_is_read():
    """Type, node and event come out of the message in the message; what else is there does not matter."""
    message = json.dumps({"type": "revocation", "agent_id": "a", "event_id": "ima.x", "context": {"deep": [1]}})
    told = parse_revocation(json.dumps({"msg": message, "signature": ""}).encode())
    assert (told.type, told.agent_id, told.event_id) == ("revocation", "a", "ima.x")


@pytest.mark.parametrize("body", [b"", b"{}", b'{"msg": 1}', b'{"msg": "no JSON"}', b'{"msg": "{\\"type\\": 1}"}'])
def test_a_revocation_that_is_none_is_a_verification_error(body):
    """Another body is refused by name."""
    with pytest.raises(VerificationError, match="keylime-notification"):
        parse_revocation(body)


def test_an_absent_kernel_list_starts_at_zero():
    """Without a line of the kernel's the node's list begins at zero."""
    assert parse_kernel_list(b"") == KernelList((), bytes(32))


def test_the_kernel_s_boot_aggregate_is_followed():
    """One boot_aggregate of either template stands before the node's entries, and the PCR begins where it left it."""
    line = AGGREGATE.ascii(10)
    assert parse_kernel_list(f"{line}\n".encode()) == KernelList((line,), replay([AGGREGATE]))
    for algorithm, digest in (("sha256", AGGREGATE.digest), ("sha1", b"\x07" * 20)):
        line, data = _sig_line(algorithm, digest)
        value = hashlib.sha256(bytes(32) + hashlib.sha256(data).digest()).digest()
        assert parse_kernel_list(f"{line}\n".encode()) == KernelList((line,), value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"{AGGREGATE.ascii(10)}\n{Entry('/usr/bin/init', bytes(32)).ascii(10)}\n", "goes|go on"),
        (" " * (MAX_KERNEL_LIST_BYTES + 1), "go on"),
        (Entry("/usr/bin/init", bytes(32)).ascii(10), "something else"),
        (AGGREGATE.ascii(11), "something else"),
        (AGGREGATE.ascii(10).replace("ima-ng", "ima-buf"), "something else"),
        (Entry("boot_aggregate", bytes(32)).ascii(10).replace("sha256:0", "sha256:1"), "something else"),
    ],
)
def test_a_kernel_that_measures_more_keeps_the_mode_off(text, words):
    """More than boot_aggregate, another entry, another PCR, or a line that does not hold: the mode says why it does not start."""
    with pytest.raises(HostError, match=words):
        parse_kernel_list(text.encode())


def test_the_list_is_the_kernel_s_and_then_the_node_s():
    """Each entry is one line of ascii_runtime_measurements; entries of another log are refused."""
    entries = b"".join(entry.encode(10) for entry in ENTRIES)
    lines = measurement_list(["kernel"], entries).split("\n")
    assert lines == ["kernel", *(entry.ascii(10) for entry in ENTRIES), ""]
    assert measurement_list([], b"") == ""
    with pytest.raises(VerificationError, match="log-replay"):
        measurement_list([], ENTRIES[0].encode(14))


def test_a_runtime_policy_is_one_that_keylime_checks():
    """The generator is not one of those that stand for an empty list; digests are lists by path."""
    policy = runtime_policy({"b": frozenset({"22", "11"}), "a": frozenset({"33"})}, ("^x$",))
    assert policy["meta"] == {"version": 1, "generator": 2}
    assert policy["digests"] == {"a": ["33"], "b": ["11", "22"]}
    assert policy["excludes"] == ["^x$"]
