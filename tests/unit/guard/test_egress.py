"""Output profiles: what leaves, and what is withheld."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from agent.errors import PolicyError
from agent.guard.egress import OutputProfile
from agent.guard.profiles import validate_output

_SCORES = np.array([[0.125, 0.5, 0.0, 0.375], [0.25, 0.25, 0.25, 0.25]], np.float32)
_LABELS = ["cat", "dog", "owl", "a:b"]


def _apply(profile, outputs, labels=None):
    return OutputProfile(validate_output("test", profile)).apply(outputs, labels)


def test_a_full_profile_lets_everything_out_as_it_is():
    """Same arrays, same names."""
    outputs = {"y": _SCORES, "n": np.array([1]), "t": np.array([b"x"], object)}
    assert all(_apply({"description": "all"}, outputs)[name] is tensor for name, tensor in outputs.items())


def test_rounding_keeps_names_shapes_and_types():
    """Floats are rounded; integers and texts are as they were."""
    outputs = {"y": np.array([[0.123456, -7.5559]], np.float32), "n": np.array([123])}
    rounded = _apply({"decimals": 2}, outputs)
    assert rounded["y"].dtype == np.float32
    assert rounded["y"].tolist() == [[np.float32(0.12), np.float32(-7.56)]]
    assert rounded["n"] is outputs["n"]


@given(hnp.arrays(st.sampled_from([np.float16, np.float32, np.float64]), st.integers(0, 5)), st.integers(0, 15))
def test_rounding_never_leaves_the_type_and_is_near(tensor, decimals):
    """No value moves by more than half a unit of the last place kept, or of its own precision."""
    rounded = _apply({"decimals": decimals}, {"y": tensor})["y"]
    assert (rounded.dtype, rounded.shape) == (tensor.dtype, tensor.shape)
    for before, after in zip(tensor.tolist(), rounded.tolist(), strict=True):
        if np.isfinite(before):
            assert abs(after - before) <= 0.5 * 10.0**-decimals + 2 * abs(before) * float(np.finfo(tensor.dtype).eps)
        else:
            assert repr(after) == repr(before)


def test_the_best_classes_leave_as_texts():
    """score:index:label, best first, ties by index, in the batch's shape."""
    best = _apply({"top_k": 2}, {"y": _SCORES}, _LABELS)["y"]
    assert best.tolist() == [[b"0.5:1:dog", b"0.375:3:a:b"], [b"0.25:0:cat", b"0.25:1:dog"]]
    assert _apply({"top_k": 1, "decimals": 1}, {"y": _SCORES})["y"].tolist() == [[b"0.5:1"], [b"0.2:0"]]


def test_labels_alone_show_no_score():
    """Neither a number nor an index leaves where the model has labels."""
    assert _apply({"labels_only": True}, {"y": _SCORES}, _LABELS)["y"].tolist() == [[b"dog"], [b"cat"]]
    assert _apply({"labels_only": True, "top_k": 2}, {"y": _SCORES})["y"].tolist() == [[b"1", b"3"], [b"0", b"1"]]


def test_more_classes_than_there_are_gives_them_all():
    """More than there are is no error."""
    assert _apply({"top_k": 99, "labels_only": True}, {"y": _SCORES[:1]}, _LABELS)["y"].shape == (1, 4)


def test_outputs_that_are_no_class_scores_are_withheld():
    """Embeddings and counts do not leave under a profile that allows classes only."""
    outputs = {
        "y": _SCORES,
        "embedding": np.zeros((2, 128), np.float32),
        "n": np.array([3]),
        "s": np.float32(1).reshape(()),
    }
    assert list(_apply({"top_k": 1}, outputs, _LABELS)) == ["y"]


def test_a_profile_that_fits_no_output_is_a_denial():
    """Nothing leaves rather than everything."""
    with pytest.raises(PolicyError, match="class scores"):
        _apply({"top_k": 1}, {"n": np.array([3])})


@given(hnp.arrays(np.float32, hnp.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=6)), st.integers(1, 7))
def test_the_best_are_the_best(scores, count):
    """For any scores, NaN included, no score that stayed is higher than one that left, and NaN is last."""
    best = _apply({"top_k": count}, {"y": scores})["y"]
    assert best.shape == (*scores.shape[:-1], min(count, scores.shape[-1]))
    for row, chosen in zip(scores.reshape(-1, scores.shape[-1]), best.reshape(-1, best.shape[-1]), strict=True):
        ranked = np.where(np.isnan(row), -np.inf, row)
        indices = [int(text.split(b":")[1]) for text in chosen]
        assert len(set(indices)) == len(indices)
        assert sorted(ranked[indices], reverse=True) == sorted(ranked, reverse=True)[: len(indices)]
