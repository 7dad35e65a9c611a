"""The segment's format: pure functions of bytes."""

from zlib import crc32

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from agent.audit.merkle import Frontier, leaf_hash
from agent.audit.record import MAX_RECORD_BYTES
from agent.audit.segment import (
    FRAME_OVERHEAD_BYTES,
    MAX_HEADER_BYTES,
    Ending,
    Header,
    frames,
    how_it_ends,
    pack_frame,
    segment_name,
)
from agent.errors import VerificationError


def tree_of(size):
    tree = Frontier()
    for n in range(size):
        tree.append(leaf_hash(str(n).encode()))
    return tree


@given(st.integers(0, 200), st.data())
def test_a_header_survives_its_encoding(size, data):
    """A header reads back as it was written, wherever in the log it stands."""
    header = Header(tree_of(size), data.draw(st.integers(0, size)))
    again = Header.unpack(header.pack() + b"\0" * 10)
    assert (again.first, again.previous, again.frontier.peaks) == (header.first, header.previous, header.frontier.peaks)
    assert header.size == len(header.pack()) <= MAX_HEADER_BYTES


def test_every_bit_of_a_header_counts():
    """Whatever bit of a header is flipped, it is refused."""
    packed = Header(tree_of(5), 3).pack()
    for bit in range(len(packed) * 8):
        flipped = bytearray(packed)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(VerificationError) as caught:
            Header.unpack(bytes(flipped))
        assert caught.value.check == "segment-header"


@given(st.binary(max_size=400))
@example(Header(tree_of(5), 3).pack()[:-1])
def test_no_bytes_leak_another_error_from_a_header(data):
    """Any bytes are a header or a VerificationError."""
    with pytest.raises(VerificationError):
        Header.unpack(data)


def resealed(data):
    """Give a changed header a right checksum."""
    return data[:-4] + crc32(data[:-4]).to_bytes(4, "little")


def test_a_header_with_a_right_checksum_must_still_make_sense():
    """A header of another version, with peaks that fit no tree, or after a later segment, is refused though undamaged."""
    packed = Header(tree_of(5), 3).pack()
    for offset, value in ((8, 2), (12, 7), (12, 2), (20, 6)):
        changed = bytearray(packed)
        changed[offset] = value
        with pytest.raises(VerificationError) as caught:
            Header.unpack(resealed(bytes(changed)))
        assert caught.value.check == "segment-header"


@given(st.lists(st.binary(min_size=1, max_size=60), max_size=6), st.binary(max_size=40))
def test_frames_read_back_up_to_the_first_that_is_none(records, garbage):
    """Records come back in order and byte for byte, whatever stands behind them."""
    data = b"".join(pack_frame(record, n) for n, record in enumerate(records))
    read = list(frames(b"head" + data + garbage, 4))
    assert [frame.record for frame in read] == records
    assert [frame.durable for frame in read] == list(range(len(records)))
    end = read[-1].end if read else 4
    assert end == 4 + len(data)
    expected = Ending.CLEAN if not garbage else Ending.OPEN if not garbage.strip(b"\0") else Ending.TORN
    assert how_it_ends(b"head" + data + garbage, end, len(records)) is expected


@given(st.binary(max_size=300), st.integers(0, 300))
def test_no_bytes_leak_an_error_from_frames(data, start):
    """Any bytes, from any offset, can be read for frames."""
    read = list(frames(data, start))
    how_it_ends(data, read[-1].end if read else start, 0)


def test_a_record_that_is_too_large_or_empty_is_no_frame():
    """A length of zero or past the limit is not followed, also with a right checksum."""
    assert list(frames(pack_frame(b"", 0), 0)) == []
    assert list(frames(pack_frame(b"x" * (MAX_RECORD_BYTES + 1), 0), 0)) == []
    assert len(list(frames(pack_frame(b"x" * MAX_RECORD_BYTES, 0), 0))) == 1


def test_torn_and_damaged_are_told_apart():
    """An unreadable record is torn while nothing says otherwise, and damaged once a later frame calls it durable."""
    hole = b"\x01" * 30
    same_commit = pack_frame(b"later", 3) + pack_frame(b"again", 3)
    next_commit = pack_frame(b"next", 4)
    assert how_it_ends(hole + same_commit, 0, 3) is Ending.TORN
    assert how_it_ends(hole + same_commit + next_commit, 0, 3) is Ending.DAMAGED
    assert how_it_ends(b"\0" * 30 + next_commit, 0, 3) is Ending.DAMAGED
    assert how_it_ends(hole + b"\xecWR\x01" + next_commit, 0, 3) is Ending.DAMAGED


def test_names_sort_as_numbers():
    """The order of the file names is the order of the segments."""
    assert segment_name(9) < segment_name(10) < segment_name(2**53)
    assert len(pack_frame(b"x", 0)) - 1 == FRAME_OVERHEAD_BYTES
