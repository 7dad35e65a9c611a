"""Following a log from outside."""

import itertools
import threading

import pytest

from agent.audit import reader as reader_module
from agent.audit.journal import Journal
from agent.audit.reader import list_segments, tail, verify_log
from agent.errors import AuditError, VerificationError
from tests.support.audit import SMALL, event, head_of, write_log

PAD = 20_000


def seqs(found):
    return [head_of(record).seq for record in found]


@pytest.mark.parametrize("count", [0, 1, 3, 12, 13, 30, 55, 99])
def test_tail_gives_the_newest_records_in_order(tmp_path, count):
    """Any number of records comes from as many segments as it takes."""
    write_log(tmp_path / "log", [5] * 11, pad=PAD)
    assert seqs(tail(tmp_path / "log", count)) == list(range(max(0, 55 - count), 55))


def test_follow_yields_each_new_record_once_across_segments(tmp_path, monkeypatch):
    """A follower sees what is written after it started, over rotations, in order and once; clean closes do not disturb it."""
    monkeypatch.setattr(reader_module, "FOLLOW_INTERVAL_S", 0.002)
    write_log(tmp_path / "log", [3])
    following = tail(tmp_path / "log", 1, follow=True)
    assert seqs([next(following)]) == [2]

    def write():
        for _ in range(6):
            journal = Journal.open(tmp_path / "log", "node-1", SMALL, strict=True)
            for n in range(6):
                journal.commit([event(n, pad=PAD)])
            journal.close()

    writer = threading.Thread(target=write)
    writer.start()
    found = seqs(itertools.islice(following, 36))
    writer.join()
    assert found == list(range(3, 39))
    assert len(list_segments(tmp_path / "log")) > 2


def test_tail_stops_at_damage_with_an_error(tmp_path):
    """A damaged record is never passed over, in a finished segment or in the newest."""
    write_log(tmp_path / "log", [5] * 11, pad=PAD)
    paths = list_segments(tmp_path / "log")
    for path in (paths[1], paths[-1]):
        whole = path.read_bytes()
        at = whole.index(b"decision-")
        path.write_bytes(whole[:at] + b"x" + whole[at + 1 :])
        with pytest.raises(VerificationError, match=path.name):
            list(tail(tmp_path / "log", 99))
        path.write_bytes(whole)
    whole = paths[1].read_bytes()
    paths[1].write_bytes(whole[:-1])
    with pytest.raises(VerificationError):
        list(tail(tmp_path / "log", 99))


def test_a_read_that_overtakes_a_write_is_repeated(tmp_path, monkeypatch):
    """What looks like damage at the end of a log in use is read once more before it is called so."""
    journal = Journal.open(tmp_path / "log", "node-1", SMALL, strict=True)
    for n in range(3):
        journal.commit([event(n)])
    path = list_segments(tmp_path / "log")[0]
    whole = path.read_bytes()
    at = whole.index(b"decision-1")
    torn = whole[:at] + b"\0" * 10 + whole[at + 10 :]
    real = reader_module._read

    def overtaking():
        reads = itertools.count()
        return lambda target, start=0: torn[start:] if next(reads) == 0 else real(target, start)

    monkeypatch.setattr(reader_module, "_read", overtaking())
    assert seqs(tail(tmp_path / "log", 9)) == [0, 1, 2]
    monkeypatch.setattr(reader_module, "_read", overtaking())
    assert verify_log(tmp_path / "log").ok
    journal.close()


def test_a_segment_that_vanishes_while_it_is_read_starts_the_reading_again(tmp_path, monkeypatch):
    """A live log may drop its oldest segment under a reader, which then reads again; it gives up when that never ends."""
    write_log(tmp_path / "log", [5] * 11, pad=PAD)
    real = reader_module.list_segments
    stale = [*real(tmp_path / "log"), tmp_path / "log" / "99999999999999999999.seg"]
    answers = iter([stale, stale])
    monkeypatch.setattr(reader_module, "list_segments", lambda directory: next(answers, None) or real(directory))
    assert verify_log(tmp_path / "log").ok
    monkeypatch.setattr(reader_module, "list_segments", lambda _: stale)
    with pytest.raises(AuditError, match="keep vanishing"):
        verify_log(tmp_path / "log")
