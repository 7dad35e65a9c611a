"""The inspector's work by direct call, and how files and reports travel."""

import os
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.errors import IsolationError, PeerError, VerificationError
from agent.inference.handover import FILES_A_FRAME, IncomingFiles, handover_frames
from agent.inference.inspection import MAX_REPORT_BYTES, _Answer
from agent.inference.inspector import inspect_files
from agent.inference.manifest import MAX_LABELS_BYTES
from agent.inference.package import read_package
from agent.isolation.channel import Frame
from agent.isolation.memfd import seal_bytes
from tests.support.models import write_orientation, write_tiny


def _fds(package):
    return {path: sealed.fd for path, sealed in package.files.items()}


def _refusal(directory):
    package = read_package(directory)
    with pytest.raises(VerificationError) as caught:
        inspect_files(_fds(package))
    package.close()
    return caught.value.check


def test_a_good_package_passes_with_its_figures(tmp_path):
    """The report says what was seen, and which files the session needs."""
    package = read_package(write_tiny(tmp_path / "1", external=True))
    report = inspect_files(_fds(package))
    assert report.gate.external == ("weights/data.bin",)
    assert report.outputs[0].shape == (1, 10)


def test_an_image_model_is_tried_at_its_own_size(tmp_path):
    """Open dimensions of an image are the manifest's, not one pixel."""
    assert inspect_files(_fds(read_package(write_orientation(tmp_path / "1")))).outputs[0].shape == (1, 4)


@pytest.mark.parametrize("name", ["model.onnx", "model.yaml", "labels.txt"])
def test_a_file_that_is_not_there_is_missed(tmp_path, name):
    """Graph, manifest and label file are needed."""
    directory = write_orientation(tmp_path / "1")
    (directory / name).unlink()
    assert _refusal(directory) == "missing-file"


@pytest.mark.parametrize("labels", [b"\xff", b"x" * (MAX_LABELS_BYTES + 1)])
def test_label_files_have_limits(tmp_path, labels):
    """Labels are UTF-8 text of limited size."""
    directory = write_tiny(tmp_path / "1", labels="labels.txt")
    (directory / "labels.txt").write_bytes(labels)
    assert _refusal(directory) == "labels"


def test_the_trial_keeps_to_the_manifests_ranges(tmp_path):
    """Where zero is out of range, the trial takes the value next to it."""
    ranges = {"kind": "tensor", "ranges": {"x": {"low": 2, "high": 3}}}
    assert inspect_files(_fds(read_package(write_tiny(tmp_path / "1", modality=ranges)))).run_us >= 0


def test_a_manifest_that_promises_other_outputs_is_refused(tmp_path):
    """The gate compares before anything runs."""
    outputs = [{"name": "y", "datatype": "FP32", "shape": [-1, 11]}]
    assert _refusal(write_tiny(tmp_path / "1", outputs=outputs)) == "model-outputs"


def test_a_model_that_cannot_compute_its_smallest_input_is_refused(tmp_path):
    """A fixed batch that the graph can't take shows in the trial."""
    directory = write_tiny(tmp_path / "1", inputs=[{"name": "x", "datatype": "FP32", "shape": [0, 64]}])
    with pytest.raises(PeerError):
        inspect_files(_fds(read_package(directory)))


def test_all_files_arrive_in_few_frames(tmp_path):
    """More files than fit a message go in several, the last of which says so."""
    directory = write_tiny(tmp_path / "1")
    for index in range(200):
        (directory / f"data{index}").write_bytes(struct.pack("<I", index))
    package = read_package(directory)
    incoming = IncomingFiles()
    frames = list(handover_frames(package))
    done = [incoming.add(Frame(data, tuple(map(os.dup, fds)))) for data, fds in frames]
    assert done == [False, True]
    assert len(frames[0][1]) == FILES_A_FRAME
    assert list(incoming.files) == list(package.files)
    assert os.pread(incoming.files["data77"], 4, 0) == struct.pack("<I", 77)


def _sealed():
    return seal_bytes("x", b"x").fd


def _unsealed():
    return os.memfd_create("x", os.MFD_ALLOW_SEALING)


def _plain_file():
    return os.open(__file__, os.O_RDONLY)


@pytest.mark.parametrize(
    ("data", "make"),
    [
        (b'{"names":["a"],"last":true}', _unsealed),
        (b'{"names":["a"],"last":true}', _plain_file),
        (b'{"names":["a","b"],"last":true}', _sealed),
        (b'{"names":[],"last":true}', _sealed),
        (b'{"names":["a"]}', _sealed),
        (b"", _sealed),
    ],
)
def test_a_handover_that_does_not_hold_is_refused_and_closed(data, make):
    """Files that could still change, or that have no name each, are not taken, and not kept open."""
    fd = make()
    with pytest.raises(IsolationError):
        IncomingFiles().add(Frame(data, (fd,)))
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_a_file_cannot_arrive_twice():
    """A later frame does not replace what came before."""
    incoming = IncomingFiles()
    incoming.add(Frame(b'{"names":["a"],"last":false}', (_sealed(),)))
    with pytest.raises(IsolationError, match="match"):
        incoming.add(Frame(b'{"names":["a"],"last":true}', (_sealed(),)))


def _answer(*chunks):
    # decoded() is pure; the event that the class also holds needs no loop.
    answer = _Answer()
    for chunk in chunks:
        answer.take(Frame(chunk))
    return answer


@given(st.lists(st.binary(max_size=64), max_size=4))
def test_an_inspectors_nonsense_is_a_refusal(chunks):
    """Whatever a broken inspector says, it does not pass a model."""
    with pytest.raises(VerificationError, match="inspector"):
        _answer(*chunks).decoded()


def test_an_inspectors_refusal_is_cut_to_size():
    """A refusal keeps its name and a part of its text."""
    with pytest.raises(VerificationError) as caught:
        _answer(b'{"type":"refused","check":"%s","message":"%s"}' % (b"c" * 900, b"m" * 9000)).decoded()
    assert len(str(caught.value)) < 1100


def test_an_inspector_that_floods_is_not_listened_to():
    """What is over the limit is dropped, and then is no report."""
    answer = _answer(*[b"x" * 65_000] * 40)
    assert len(answer.data) <= MAX_REPORT_BYTES + 65_000
    with pytest.raises(VerificationError):
        answer.decoded()
