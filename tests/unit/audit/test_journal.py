"""The log on disk: recovery, damage, retention, and failures of the file system."""

import errno
import os
import random  # noqa: TID251 -- seeded below
import resource
import shutil

import msgspec
import pytest

from agent.audit import journal as journal_module
from agent.audit.journal import BALLAST_NAME, Journal, Space
from agent.audit.merkle import leaf_hash, tree_root
from agent.audit.reader import LOCK_NAME, list_segments, tail, verify_log
from agent.audit.segment import Header, frames, pack_frame, segment_name
from agent.audit.segment_file import NEXT_NAME, SegmentFile
from agent.errors import AuditError, ConfigError
from tests.support.audit import SMALL, event, head_of, write_log

PAD = 20_000  # twelve of these fill one segment


def records(directory):
    return list(tail(directory, 10**6))


def heads(directory):
    return [head_of(record) for record in records(directory)]


def reopen(directory, **options):
    return Journal.open(directory, "node-1", SMALL, **({"strict": True} | options))


def checks(directory):
    return [finding.check for finding in verify_log(directory).findings]


@pytest.fixture(scope="module")
def long_log(tmp_path_factory):
    """Five segments of records."""
    directory = tmp_path_factory.mktemp("audit") / "log"
    write_log(directory, [5] * 11, pad=PAD)
    assert len(list_segments(directory)) == 5
    return directory


@pytest.fixture
def log_copy(long_log, tmp_path):
    return shutil.copytree(long_log, tmp_path / "copy")


def test_records_come_back_in_order_and_the_tree_is_theirs(long_log):
    """Across segments, every record is there once, in order, and the root is the RFC 6962 root over their bytes."""
    report = verify_log(long_log)
    assert report.ok
    assert (report.first, report.size, report.segments, report.gaps, report.in_use) == (0, 55, 5, (), False)
    assert [head.seq for head in heads(long_log)] == list(range(55))
    assert report.root == tree_root(map(leaf_hash, records(long_log))).hex()


def test_the_log_goes_on_where_it_stopped(tmp_path):
    """Reopened again and again, sequence and tree continue; files are private and no unused space stays behind a clean end."""
    for n in range(4):
        journal = reopen(tmp_path / "log")
        assert journal.commit([event(), event()]) == [2 * n, 2 * n + 1]
        assert journal.durable.size == 2 * n + 2
        journal.close()
    assert verify_log(tmp_path / "log").ok
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "log").iterdir()} == {0o600}
    assert list_segments(tmp_path / "log")[0].stat().st_size < 10_000


def test_a_torn_end_is_cut_at_every_byte(tmp_path):
    """Cut the newest record after any of its bytes: all records before it stay, a record says what was cut, the log verifies."""
    write_log(tmp_path / "log", [3, 1])
    path = list_segments(tmp_path / "log")[0]
    whole = path.read_bytes()
    last = len(pack_frame(records(tmp_path / "log")[-1], 0))
    before = records(tmp_path / "log")[:3]
    for cut in range(len(whole) - last, len(whole)):
        path.write_bytes(whole[:cut])
        assert checks(tmp_path / "log") == (["torn-end"] if cut > len(whole) - last else [])
        reopen(tmp_path / "log").close()
        after = records(tmp_path / "log")
        assert after[:3] == before
        recovered = heads(tmp_path / "log")[3:]
        if cut > len(whole) - last:
            assert [head.kind for head in recovered] == ["log.recovered"]
            assert recovered[0].detail["bytes"] <= cut - (len(whole) - last)
            assert recovered[0].detail["segment"] == path.name
        else:
            assert recovered == []
        assert verify_log(tmp_path / "log").ok


def test_a_torn_end_in_allocated_space_is_cut(tmp_path):
    """A write of which only some pages arrived, with zeros around them, is cut, and so is a torn commit of several records."""
    write_log(tmp_path / "log", [3, 3])
    path = list_segments(tmp_path / "log")[0]
    whole = path.read_bytes()
    ends = len(b"".join(pack_frame(record, 0) for record in records(tmp_path / "log")[3:]))
    torn = whole[: -ends + 10] + b"\0" * 200 + whole[-ends + 210 :] + b"\0" * 5000
    path.write_bytes(torn)
    assert checks(tmp_path / "log") == ["torn-end"]
    reopen(tmp_path / "log").close()
    assert [head.kind for head in heads(tmp_path / "log")] == ["infer"] * 3 + ["log.recovered"]
    assert verify_log(tmp_path / "log").ok


def test_every_flipped_byte_is_found(tmp_path):
    """Flip a bit of any byte of the log, allocated space included: verification names it, at or before that byte."""
    write_log(tmp_path / "log", [1, 2, 1])
    path = list_segments(tmp_path / "log")[0]
    whole = path.read_bytes() + b"\0" * 64
    for at in range(len(whole)):
        changed = bytearray(whole)
        changed[at] ^= 1 << at % 8
        path.write_bytes(changed)
        report = verify_log(tmp_path / "log")
        assert not report.ok
        assert report.findings[0].offset <= at


def test_flipped_bits_in_a_long_log_are_found(log_copy):
    """The same across segments, at random places (seeded)."""
    chance = random.Random(1)  # noqa: S311 -- a seeded choice of places, nothing secret
    for path in list_segments(log_copy):
        whole = path.read_bytes()
        for _ in range(8):
            at = chance.randrange(len(whole))
            changed = bytearray(whole)
            changed[at] ^= 1 << chance.randrange(8)
            path.write_bytes(changed)
            report = verify_log(log_copy)
            assert report.findings[0].segment == path.name
        path.write_bytes(whole)
    assert verify_log(log_copy).ok


def test_a_damaged_record_in_the_middle_refuses_the_start(tmp_path):
    """A record that had been durable and can't be read is never cut: the start fails and verification names the record."""
    write_log(tmp_path / "log", [2, 2, 2])
    path = list_segments(tmp_path / "log")[0]
    whole = bytearray(path.read_bytes())
    whole[whole.index(b"decision-1")] ^= 1
    path.write_bytes(whole)
    with pytest.raises(AuditError, match=r"damaged.*record 1.*log verify"):
        reopen(tmp_path / "log")
    assert path.read_bytes() == whole
    finding = verify_log(tmp_path / "log").findings[0]
    assert (finding.check, finding.seq) == ("record", 1)
    assert "record 1" in str(finding)


def rewritten(path, change):
    """Rewrite a segment's records with right checksums."""
    data = path.read_bytes()
    header = Header.unpack(data)
    size = verify_log(path.parent).size
    found = [frame.record for frame in frames(data, header.size)]
    path.write_bytes(header.pack() + b"".join(pack_frame(record, size) for record in change(found)))


@pytest.mark.parametrize(
    ("change", "check"),
    [
        (lambda found: [*found[:3], found[4], found[3], *found[5:]], "sequence"),
        (lambda found: [*found[:3], *found[4:]], "sequence"),
        (lambda found: [found[0], *found], "sequence"),
        (lambda found: found[:-1], "segment-link"),
        (lambda found: [found[0].replace(b"decision-", b"decisi0n-"), *found[1:]], "root"),
        (lambda found: [b"{}", *found[1:]], "sequence"),
    ],
)
def test_records_that_were_moved_removed_repeated_or_changed_are_found(log_copy, change, check):
    """Also with right checksums, records in another order, fewer, more, or different are named by the check that sees it."""
    rewritten(list_segments(log_copy)[1], change)
    assert checks(log_copy)[0] == check


def test_a_removed_segment_is_found(log_copy):
    """Without a segment in the middle the log does not verify, and the start is refused."""
    list_segments(log_copy)[2].unlink()
    assert checks(log_copy) == ["segment-link"]
    with pytest.raises(AuditError, match="segment-link"):
        reopen(log_copy)


def test_a_missing_start_is_found(log_copy):
    """Without its oldest segments, and no gap record that names them, the log does not verify."""
    list_segments(log_copy)[0].unlink()
    assert checks(log_copy) == ["missing-start"]


def test_swapped_segments_are_found(log_copy):
    """Two segments that change places do not verify, and the start is refused."""
    paths = list_segments(log_copy)
    paths[1].rename(log_copy / "x")
    paths[2].rename(paths[1])
    (log_copy / "x").rename(paths[2])
    assert checks(log_copy)[:2] == ["segment-name", "segment-name"]
    with pytest.raises(AuditError, match="segment-name"):
        reopen(log_copy)


def test_a_segment_of_another_log_is_found(log_copy, tmp_path):
    """A segment from another log that begins at the same record does not fit the tree."""
    write_log(tmp_path / "other", [5] * 11, pad=PAD + 1)
    shutil.copy(list_segments(tmp_path / "other")[2], list_segments(log_copy)[2])
    assert "root" in checks(log_copy)


def test_a_finished_segment_must_end_with_its_record(log_copy):
    """Bytes behind the last record of a finished segment are found."""
    path = list_segments(log_copy)[1]
    path.write_bytes(path.read_bytes() + b"\0" * 8)
    assert checks(log_copy) == ["segment-end"]


def test_a_header_that_is_damaged_is_found_and_reading_goes_on(log_copy):
    """A segment whose header can't be read is one finding; the others are still checked."""
    path = list_segments(log_copy)[1]
    path.write_bytes(b"x" + path.read_bytes()[1:])
    assert checks(log_copy) == ["segment-header"]
    path.write_bytes(b"")
    assert checks(log_copy) == ["segment-header"]
    with pytest.raises(AuditError, match="segment-header"):
        reopen(log_copy)


def test_an_oversized_segment_is_not_read(log_copy):
    """A file larger than any segment is a finding, not an exhausted memory."""
    os.truncate(list_segments(log_copy)[1], 2**40)
    assert checks(log_copy)[0] == "segment-header"


def test_one_writer_a_directory(tmp_path, monkeypatch):
    """A second writer is refused; a reader sees that the log is in use and takes an unfinished write for what it is."""
    monkeypatch.setattr(journal_module, "LOCK_ATTEMPTS", 2)
    first = reopen(tmp_path / "log")
    with pytest.raises(AuditError, match="another process"):
        reopen(tmp_path / "log")
    first.commit([event()])
    path = list_segments(tmp_path / "log")[0]
    with path.open("r+b") as file:
        file.seek(first._active.end)
        file.write(b"half a record")
    report = verify_log(tmp_path / "log")
    assert report.in_use
    assert report.ok
    first.close()
    assert not verify_log(tmp_path / "log").in_use


def test_buffered_writes_become_durable_with_the_sync(tmp_path):
    """Without strict, the durable tree follows the sync, not the write."""
    journal = reopen(tmp_path / "log", strict=False)
    journal.commit([event(), event()])
    assert (journal.durable.size, journal.unsynced) == (0, True)
    journal.sync_or_fail()
    assert (journal.durable.size, journal.unsynced, journal.failure) == (2, False, None)
    journal.commit([event()])
    journal.close()
    assert verify_log(tmp_path / "log").size == 3


TIGHT = Space(segment_bytes=256 * 1024, budget_bytes=4 * 256 * 1024 + 512 * 1024, ballast_bytes=512 * 1024)


def test_the_budget_is_kept_and_what_goes_is_named(tmp_path):
    """Over many segments the log stays within its budget; gap records name range and root of what went, and it verifies."""
    journal = Journal.open(tmp_path / "log", "node-1", TIGHT, strict=True)
    leaves: dict[int, bytes] = {}
    for n in range(120):
        assert journal.commit([event(n, pad=PAD)])
        leaves |= {head_of(record).seq: leaf_hash(record) for record in tail(tmp_path / "log", 3)}
        used = sum(path.stat().st_size for path in (tmp_path / "log").iterdir())
        assert used <= TIGHT.budget_bytes

    def root_before(size):
        return tree_root(leaves[seq] for seq in range(size)).hex()

    report = verify_log(tmp_path / "log")
    assert report.ok
    assert report.first > 50
    gaps = [head for head in heads(tmp_path / "log") if head.kind == "log.gap"]
    assert len(gaps) >= 2
    assert report.gaps == tuple((gap.detail["first"], gap.detail["last"]) for gap in gaps)
    assert gaps[-1].detail["last"] + 1 == report.first
    assert all(gap.detail["root"] == root_before(gap.detail["last"] + 1) for gap in gaps)
    journal.close()
    Journal.open(tmp_path / "log", "node-1", TIGHT, strict=True).close()
    # More than was named is missing: found. A gap record that names another root: found.
    kept = list_segments(tmp_path / "log")
    kept[0].rename(tmp_path / "aside")
    assert checks(tmp_path / "log") == ["missing-start"]
    (tmp_path / "aside").rename(kept[0])
    rewritten(kept[-1], lambda found: [r.replace(gaps[-1].detail["root"].encode(), b"0" * 64) for r in found])
    rewritten(kept[-2], lambda found: [r.replace(gaps[-1].detail["root"].encode(), b"0" * 64) for r in found])
    assert "gap" in checks(tmp_path / "log")


def test_a_gap_record_that_names_no_range_is_found(tmp_path):
    """A gap record without a range before itself is a finding of its own."""
    journal = reopen(tmp_path / "log")
    journal.commit([msgspec.structs.replace(event(), kind="log.gap", detail={"last": last}) for last in ("x", 99)])
    journal.close()
    assert checks(tmp_path / "log") == ["gap", "gap"]


@pytest.mark.parametrize(
    "sizes",
    [
        {"segment_bytes": 1000},
        {"segment_bytes": 2**40},
        {"ballast_bytes": 1000},
        {"segment_bytes": 2**20, "budget_bytes": 4 * 2**20},
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes):
    """A budget that could not hold a log is a configuration error."""
    with pytest.raises(ConfigError, match="audit: "):
        Space(**sizes)


def test_a_directory_that_can_not_be_used_is_an_audit_error(tmp_path):
    """A file in the directory's place, a missing directory and an empty one are told in our own words."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(AuditError, match="can't use"):
        reopen(tmp_path / "file")
    with pytest.raises(AuditError, match="can't read the log directory"):
        verify_log(tmp_path / "missing")
    for read in (verify_log, lambda directory: list(tail(directory, 1))):
        with pytest.raises(AuditError, match="no log"):
            read(tmp_path)
    (tmp_path / "log" / segment_name(0)).mkdir(parents=True)
    with pytest.raises(AuditError, match="can't open"):
        reopen(tmp_path / "log")
    for read in (verify_log, lambda directory: list(tail(directory, 1))):
        with pytest.raises(AuditError, match="can't read"):
            read(tmp_path / "log")


def test_the_rest_of_an_interrupted_rotation_goes(tmp_path):
    """A segment that was being made when the power went is removed at the next start."""
    write_log(tmp_path / "log", [2])
    (tmp_path / "log" / NEXT_NAME).write_bytes(b"half")
    reopen(tmp_path / "log").close()
    assert not (tmp_path / "log" / NEXT_NAME).exists()
    assert verify_log(tmp_path / "log").size == 2


class Faults:
    """A file system that fails when told: real calls below, an OSError in front of the n-th one of a name."""

    def __init__(self, monkeypatch):
        self._monkeypatch = monkeypatch
        self.plan = {}
        for name in ("fdatasync", "fsync", "posix_fallocate", "ftruncate", "pwrite"):
            self._wrap(name)

    def _wrap(self, name):
        real = getattr(os, name)

        def call(*arguments):
            number = self.plan.get(name)
            if number is not None:
                raise OSError(number, os.strerror(number))
            return real(*arguments)

        self._monkeypatch.setattr(os, name, call)

    @staticmethod
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", ["fdatasync", "pwrite"])
def test_after_an_io_error_nothing_is_taken_until_it_is_over(tmp_path, monkeypatch, name, strict):
    """A failing disk: nothing is acknowledged, the tree stays where it is durable, and writing resumes with a record of it."""
    faults = Faults(monkeypatch)
    journal = reopen(tmp_path / "log", strict=strict)
    assert journal.commit([event(0)]) == [0]
    journal.sync_or_fail()
    faults.plan = {name: errno.EIO}
    written = journal.commit([event(1), event(2)])
    journal.sync_or_fail()
    assert journal.failure == "Input/output error (EIO)"
    assert written == ([1, 2] if name == "fdatasync" and not strict else [])
    assert journal.lost == len(written)
    assert journal.durable.size == 1
    assert journal.commit([event(3)]) == []
    assert not journal.resume()
    faults.plan = {}
    assert journal.resume()
    assert journal.commit([event(4)]) == [2]
    journal.close()
    assert [head.kind for head in heads(tmp_path / "log")] == ["infer", "log.resumed", "infer"]
    assert verify_log(tmp_path / "log").ok


@pytest.mark.parametrize("name", ["fsync", "ftruncate", "posix_fallocate"])
def test_a_rotation_that_fails_leaves_a_whole_log(tmp_path, monkeypatch, name):
    """Whatever step of a rotation fails, what was acknowledged is there, and the log goes on and verifies."""
    faults = Faults(monkeypatch)
    journal = reopen(tmp_path / "log")
    acknowledged = journal.commit([event(n, pad=PAD) for n in range(11)])
    faults.plan = {name: errno.EIO}
    acknowledged += journal.commit([event(n, pad=PAD) for n in range(11, 15)])
    assert journal.failure is not None
    faults.plan = {}
    assert journal.resume()
    acknowledged += journal.commit([event(n, pad=PAD) for n in range(15, 30)])
    journal.close()
    kept = {head.seq: head.kind for head in heads(tmp_path / "log")}
    assert all(kept[seq] == "infer" for seq in acknowledged)
    assert verify_log(tmp_path / "log").ok


def test_a_publish_that_fails_leaves_a_whole_log(tmp_path, monkeypatch):
    """The new segment can't get its name: the log goes on in another one once it can, gap records included."""
    journal = Journal.open(tmp_path / "log", "node-1", TIGHT, strict=True)
    acknowledged = []
    real = SegmentFile.publish

    def failing(_):
        raise OSError(errno.EIO, "no rename")

    for n in range(120):
        if n % 30 == 29:
            monkeypatch.setattr(SegmentFile, "publish", failing)
        acknowledged += journal.commit([event(n, pad=PAD)])
        if journal.failure is not None:
            monkeypatch.setattr(SegmentFile, "publish", real)
            assert journal.resume()
    journal.close()
    report = verify_log(tmp_path / "log")
    assert report.ok
    kept = {head.seq for head in heads(tmp_path / "log")}
    assert {seq for seq in acknowledged if seq >= report.first} <= kept


def test_a_full_disk_at_the_start_is_a_failure_not_a_refused_start(tmp_path, monkeypatch):
    """The agent must live to say that the disk is full: the log opens, refuses records, and resumes later."""
    write_log(tmp_path / "log", [2])
    (tmp_path / "log" / BALLAST_NAME).unlink()
    faults = Faults(monkeypatch)
    faults.plan = {"posix_fallocate": errno.ENOSPC}
    journal = reopen(tmp_path / "log")
    assert journal.failure == "No space left on device (ENOSPC)"
    assert journal.commit([event()]) == []
    assert not (tmp_path / "log" / BALLAST_NAME).exists()
    faults.plan = {}
    assert journal.resume()
    assert journal.commit([event()]) == [3]
    faults.plan = {"fdatasync": errno.EIO, "fsync": errno.EIO, "ftruncate": errno.EIO}
    journal.close()
    faults.plan = {}
    assert verify_log(tmp_path / "log").ok


def test_a_disk_that_is_full_for_good_takes_no_more(tmp_path, monkeypatch):
    """When not even the ballast's space can be had, nothing is written and nothing breaks; a second failure needs no ballast."""
    faults = Faults(monkeypatch)
    journal = reopen(tmp_path / "log")
    acknowledged = journal.commit([event(n, pad=PAD) for n in range(11)])
    faults.plan = {"posix_fallocate": errno.ENOSPC}
    acknowledged += journal.commit([event(n, pad=PAD) for n in range(11, 15)])
    assert acknowledged == list(range(len(acknowledged)))
    assert not journal.resume()
    faults.plan = {"posix_fallocate": errno.ENOSPC, "pwrite": errno.ENOSPC}
    journal._last_words([event()], [])
    assert journal.failure is not None
    monkeypatch.setattr(journal, "_free_bytes", lambda: 0)
    faults.plan = {}
    assert not journal.resume()
    journal.close()
    assert verify_log(tmp_path / "log").size >= len(acknowledged)


@pytest.mark.parametrize(("count", "written"), [(20, 20), (40, 24)])
def test_the_ballast_lets_what_is_under_way_be_written(tmp_path, monkeypatch, count, written):
    """A full disk in the middle of a commit: as much of the commit as the ballast holds is written, then that the disk is full."""
    journal = reopen(tmp_path / "log")
    real = os.posix_fallocate

    def full_but_for_the_ballast(fd, offset, length):
        if length > SMALL.ballast_bytes // 2 or (tmp_path / "log" / BALLAST_NAME).exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(fd, offset, length)

    monkeypatch.setattr(os, "posix_fallocate", full_but_for_the_ballast)
    acknowledged = journal.commit([event(n, pad=PAD) for n in range(count)])
    assert len(acknowledged) == written
    assert journal.failure == "No space left on device (ENOSPC)"
    assert heads(tmp_path / "log")[-1].kind == "log.full"
    assert journal.commit([event()]) == []
    monkeypatch.setattr(os, "posix_fallocate", real)
    assert journal.resume()
    assert (tmp_path / "log" / BALLAST_NAME).stat().st_size == SMALL.ballast_bytes
    journal.close()
    assert verify_log(tmp_path / "log").ok
    assert [head.seq for head in heads(tmp_path / "log") if head.kind == "infer"] == acknowledged


def test_a_log_without_its_lock_file_is_not_in_use(tmp_path):
    """A copy of a log needs no lock file to be verified."""
    write_log(tmp_path / "log", [1])
    (tmp_path / "log" / LOCK_NAME).unlink()
    assert not verify_log(tmp_path / "log").in_use


def test_a_file_size_limit_counts_as_a_full_disk(tmp_path):
    """With files limited by the kernel (EFBIG), no segment can be made: the log says that it is full, in the room it kept."""
    journal = reopen(tmp_path / "log")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL.segment_bytes - 1, hard))
    try:
        acknowledged = journal.commit([event(n, pad=PAD) for n in range(40)])
        assert journal.failure == "File too large (EFBIG)"
        assert not journal.resume()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert acknowledged == list(range(12))
    assert heads(tmp_path / "log")[-1].kind == "log.full"
    assert journal.resume()
    assert journal.commit([event()]) == [14]
    journal.close()
    assert verify_log(tmp_path / "log").ok


def test_failing_again_and_again_keeps_the_log_whole(tmp_path, monkeypatch):
    """Many failures use up the room for saying so: then nothing is said, nothing is removed without being named, and it goes on."""
    journal = reopen(tmp_path / "log")
    real = os.posix_fallocate
    journal.commit([event(n, pad=PAD) for n in range(60)])
    while journal._active.capacity - journal._active.end > 5000:
        journal.commit([event()])
    monkeypatch.setattr(os, "posix_fallocate", Faults.full)
    for n in range(40):
        assert journal.commit([event(n, pad=PAD)]) == []
        assert journal.failure is not None
        monkeypatch.setattr(journal, "failure", None)
    monkeypatch.setattr(os, "posix_fallocate", real)
    journal.close()
    assert heads(tmp_path / "log")[-1].kind == "log.full"
    journal = Journal.open(tmp_path / "log", "node-1", TIGHT, strict=True)
    assert journal.commit([event(n, pad=PAD) for n in range(2)])
    assert verify_log(tmp_path / "log").first == 0
    assert journal.commit([event(n, pad=PAD) for n in range(20)])
    journal.close()
    report = verify_log(tmp_path / "log")
    assert report.ok
    assert report.first > 0


def test_a_smaller_segment_size_takes_effect_with_the_next_segment(tmp_path):
    """A log whose newest segment is larger than the sizes now allow goes on in a new one."""
    large = Space(segment_bytes=512 * 1024, budget_bytes=8 * 1024 * 1024, ballast_bytes=512 * 1024)
    write_log(tmp_path / "log", [20], pad=PAD, space=large)
    journal = reopen(tmp_path / "log")
    assert journal.commit([event()]) == [20]
    journal.close()
    assert [path.name for path in list_segments(tmp_path / "log")] == [segment_name(0), segment_name(20)]
    assert verify_log(tmp_path / "log").ok
