"""The measurement log's format, replay and meaning."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.attest import measurement
from agent.attest.log_state import LogState
from agent.attest.measurement import (
    BOOT_AGGREGATE,
    MAX_ENTRY_BYTES,
    MAX_LOG_BYTES,
    MAX_PATH_BYTES,
    Entry,
    boot_aggregate,
    config_entry,
    known_models,
    model_entry,
    parse_entries,
    policy_entry,
    read_entry,
    refused_entry,
    replay,
    replay_log,
    unload_entry,
)
from agent.errors import VerificationError
from tests.support.attest import CONFIG, ENTRIES, MODEL, PCR, POLICY, digest, state_of

LOG = b"".join(entry.encode(PCR) for entry in ENTRIES)
FIRST = ENTRIES[0]
_digests = st.binary(min_size=32, max_size=32)
_words = st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._+-]{0,20}\Z")
_entries = st.builds(model_entry, _words, _words, _words, _digests) | st.builds(policy_entry, _words, _digests)


def _parsed(data):
    return list(parse_entries(data, PCR))


@given(st.lists(_entries, max_size=8))
def test_entries_come_back_as_written(entries):
    """Parsing is the inverse of encoding."""
    assert _parsed(b"".join(entry.encode(PCR) for entry in entries)) == entries


@given(st.data())
def test_what_is_known_beforehand_reads_as_it_would_anyway(data):
    """Knowing any models, whatever the bytes: the same entries, the same PCR and the same state, or the same refusal."""
    models = {"m/1/a": ["11" * 32, "22" * 32], "m/2/b": ["33" * 32]}
    makers = [Entry(f"edgewarden/models/{key}", bytes.fromhex(one)) for key, ones in models.items() for one in ones]
    entries = data.draw(st.lists(st.sampled_from([*makers, *ENTRIES[1:]]), max_size=6))
    mangled = bytearray(b"".join(entry.encode(PCR) for entry in (FIRST, *entries)))
    for at, value in data.draw(st.lists(st.tuples(st.integers(0, len(mangled) - 1), st.integers(0, 255)), max_size=1)):
        mangled[at] = value
    known = known_models(models, data.draw(st.sampled_from([PCR, 15])))
    assert _outcome(bytes(mangled), known) == _outcome(bytes(mangled), None)


def _outcome(log, known):
    try:
        entries, value = replay_log(log, PCR, known=known)
        return [(entry.path, entry.digest) for entry in entries], value, LogState().after(entries, at_start=True)
    except VerificationError as error:
        return error.check, error.message


@pytest.mark.parametrize("key", ["m/1", "m/1/a b", "m/1/" + "a" * MAX_PATH_BYTES])
def test_a_key_that_no_entry_can_hold_is_not_known(key):
    """Reference Values may name what no log can: it is left out, and nothing is taken for it."""
    assert known_models({key: ["11" * 32]}, PCR) == {}


@given(st.data())
def test_nothing_but_a_verification_error_leaves_the_parser(data):
    """Whatever the bytes, the parser yields entries that encode to them or raises a VerificationError."""
    mangled = bytearray(LOG[: data.draw(st.integers(0, len(LOG)))] + data.draw(st.binary(max_size=8)))
    for at, value in data.draw(st.lists(st.tuples(st.integers(0, len(LOG)), st.integers(0, 255)), max_size=3)):
        if at < len(mangled):
            mangled[at] = value
    try:
        entries = _parsed(bytes(mangled))
    except VerificationError as error:
        assert error.check == "log-replay"  # noqa: PT017 -- both ends of the claim
    else:
        assert b"".join(entry.encode(PCR) for entry in entries) == mangled


@pytest.mark.parametrize("at", range(len(FIRST.encode(PCR))))
def test_no_byte_of_an_entry_may_change(at):
    """One changed byte anywhere either breaks the entry or the PCR that it replays to."""
    data = bytearray(FIRST.encode(PCR))
    data[at] ^= 1
    with pytest.raises(VerificationError):
        _parsed(bytes(data))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (LOG[:-1], "cut short"),
        (LOG[:10], "cut short"),
        (FIRST.encode(10), "PCR 10"),
        (FIRST.encode(PCR).replace(b"ima-ng", b"ima-xx"), "template"),
        (FIRST.encode(PCR).replace(b"sha256:", b"sha1:\0\0"), "SHA-256 digest"),
        (FIRST.encode(PCR).replace(b"boot_agg", b"boot\xffagg"), "printable"),
        (FIRST.encode(PCR)[:34] + b"\xff\xff\xff\xff", "over"),
        (Entry("", bytes(32)).encode(PCR), "printable path"),
        (Entry("a b", bytes(32)).encode(PCR), "printable path"),
        (Entry("a\x1b[2J", bytes(32)).encode(PCR), "printable path"),
        (Entry("a\n", bytes(32)).encode(PCR), "printable path"),
        (bytes(MAX_LOG_BYTES + 1), "over"),
    ],
)
def test_a_malformed_log_names_its_fault(data, words):
    """Each fault of a log has its words."""
    with pytest.raises(VerificationError, match=words) as raised:
        _parsed(data)
    assert raised.value.check == "log-replay"


def test_a_log_has_a_greatest_length(monkeypatch):
    """One entry more than the limit is refused."""
    monkeypatch.setattr(measurement, "MAX_LOG_ENTRIES", len(ENTRIES) - 1)
    with pytest.raises(VerificationError, match="more than"):
        _parsed(LOG)


def test_an_entry_looks_as_the_kernel_writes_it():
    """The binary and ASCII forms of a known entry are those of Linux's ima-ng."""
    entry = Entry("boot_aggregate", b"\x01" * 32)
    data = b"\x28\0\0\0sha256:\0" + b"\x01" * 32 + b"\x0f\0\0\0boot_aggregate\0"
    sha1 = "6876d06f288b76854ffe76d68aecca8dc832fef7"  # as evmctl prints it
    assert entry.encode(14) == b"\x0e\0\0\0" + bytes.fromhex(sha1) + b"\x06\0\0\0ima-ng\x3f\0\0\0" + data
    assert entry.ascii(14) == f"14 {sha1} ima-ng sha256:{'01' * 32} boot_aggregate"
    assert entry.ascii(9).startswith(" 9 ")


def test_replay_can_be_continued():
    """Replaying in two parts gives what replaying at once gives, and the first step is the TPM's extend."""
    whole = replay(ENTRIES)
    assert replay(ENTRIES[2:], replay(ENTRIES[:2])) == whole
    template = hashlib.sha256(FIRST.template_data()).digest()
    assert replay([FIRST]) == hashlib.sha256(bytes(32) + template).digest()
    assert replay([]) == bytes(32)


@pytest.mark.parametrize(
    "make",
    [
        lambda: model_entry("a b", "1", "f", MODEL),
        lambda: model_entry("m", "1", "a b", MODEL),
        lambda: model_entry("m", "1", "../f", MODEL),
        lambda: model_entry("m", "1", "a/./f", MODEL),
        lambda: model_entry("m", "1", "/f", MODEL),
        lambda: model_entry("m", "1", "a//f", MODEL),
        lambda: model_entry("m", "1", "", MODEL),
        lambda: model_entry("m/x", "1", "f", MODEL),
        lambda: model_entry("m", "..", "f", MODEL),
        lambda: model_entry("m", "1\n", "f", MODEL),
        lambda: refused_entry("m", "1", "fä", MODEL),
        lambda: model_entry("m", "1", "f" * MAX_PATH_BYTES, MODEL),
        lambda: policy_entry("r 1", POLICY),
        lambda: unload_entry("m", ""),
        lambda: config_entry(b"short"),
    ],
)
def test_a_name_that_could_mean_two_things_is_refused(make):
    """What can't stand in a log without doubt is not measured, so it does not load."""
    with pytest.raises(VerificationError) as raised:
        make()
    assert raised.value.check == "measurement-path"


def test_the_longest_entry_fits_its_limit():
    """The limit that the log keeps free for one entry is that of the longest possible one."""
    path = "edgewarden/models/m/1/"
    entry = model_entry("m", "1", "f" * (MAX_PATH_BYTES - len(path)), MODEL)
    assert len(entry.encode(PCR)) == MAX_ENTRY_BYTES
    assert _parsed(entry.encode(PCR)) == [entry]


def test_the_state_holds_what_is_in_force():
    """Boot, settings, policy and models are read from the log."""
    state = state_of(*ENTRIES)
    assert state == LogState(
        boot_aggregate=FIRST.digest.hex(),
        config=CONFIG.hex(),
        policy_revision="r1",
        policy=POLICY.hex(),
        models={"m/1/model.onnx": MODEL.hex()},
        seen=frozenset({("config", CONFIG.hex()), ("policy", POLICY.hex()), ("m/1/model.onnx", MODEL.hex())}),
    )


def test_the_state_can_be_continued():
    """The state after two parts is the state after the whole."""
    assert state_of(*ENTRIES[:2]).after(ENTRIES[2:]) == state_of(*ENTRIES)


def test_unloading_takes_a_version_out_of_force_but_not_out_of_memory():
    """An unloaded version leaves the models in force; that it was in force stays known."""
    other = model_entry("m", "10", "model.onnx", MODEL)
    state = state_of(*ENTRIES, other, unload_entry("m", "1"))
    assert state.models == {"m/10/model.onnx": MODEL.hex()}
    assert ("m/1/model.onnx", MODEL.hex()) in state.seen


def test_a_refusal_stays_until_the_path_is_handed_over():
    """Unloading does not close a refusal, handing over the same path does."""
    refused = state_of(FIRST, refused_entry("m", "1", "model.onnx", digest("bad")), unload_entry("m", "1"))
    assert refused.refused == {"m/1/model.onnx": digest("bad").hex()}
    assert refused.after([model_entry("m", "1", "model.onnx", MODEL)]).refused == {}


def test_a_new_policy_and_new_settings_replace_the_old():
    """The last measured policy and settings are in force; all stay in memory."""
    state = state_of(*ENTRIES, policy_entry("r2", digest("p2")), config_entry(digest("c2")))
    assert (state.policy_revision, state.policy, state.config) == ("r2", digest("p2").hex(), digest("c2").hex())
    assert {("policy", POLICY.hex()), ("config", CONFIG.hex())} < state.seen


@pytest.mark.parametrize(
    "entries",
    [
        [config_entry(CONFIG)],
        [FIRST, boot_aggregate([b""])],
        [FIRST, Entry("/usr/bin/true", MODEL)],
        [FIRST, Entry("edgewarden/models/m/1", MODEL)],
        [FIRST, Entry(f"{BOOT_AGGREGATE}/x", MODEL)],
    ],
)
def test_a_log_of_other_things_has_no_state(entries):
    """A path that the agent never measures, or boot_aggregate in another place, is refused."""
    with pytest.raises(VerificationError) as raised:
        state_of(*entries)
    assert raised.value.check == "log-replay"


def test_an_entry_is_read_at_its_offset():
    """The entry and where the next one begins; nothing when the bytes end before it does."""
    at = len(FIRST.encode(PCR))
    assert read_entry(LOG, 0, PCR) == (FIRST, at)
    assert read_entry(LOG, at, PCR) == (ENTRIES[1], at + len(ENTRIES[1].encode(PCR)))
    assert read_entry(LOG[: at - 1], 0, PCR) is None


@pytest.mark.parametrize("data", [b"", b"\0" * 48, FIRST.template_data()[:-1]])
def test_template_data_that_is_too_short_is_refused(data):
    """A right template digest does not help data that holds no digest and path."""
    header = FIRST.encode(PCR)[:34]
    sha1 = hashlib.sha1(data, usedforsecurity=False).digest()
    entry = header[:4] + sha1 + header[24:34] + len(data).to_bytes(4, "little") + data
    with pytest.raises(VerificationError, match="not a SHA-256 digest") as raised:
        _parsed(entry)
    assert raised.value.check == "log-replay"


@given(st.lists(_entries, max_size=8))
def test_one_pass_is_parsing_and_replaying(entries):
    """The entries and the PCR of one pass are those of two."""
    data = b"".join(entry.encode(PCR) for entry in entries)
    assert replay_log(data, PCR) == (entries, replay(entries))
