"""Profiles of the policy's data, validated strictly."""

import pytest

from agent.errors import PolicyError
from agent.guard.profiles import MAX_TOP_K, Clamp, Dct, Finite, Jpeg, Median, validate_outputs, validate_sanitizers


def test_the_shipped_profiles_are_valid():
    """The vocabulary of the policy's data is all here."""
    profiles = validate_sanitizers(
        {
            "image-default": {"steps": [{"step": "jpeg", "quality": 75}, {"step": "median", "size": 3}]},
            "image-randomized-jpeg": {"steps": [{"step": "jpeg", "quality_min": 60, "quality_max": 90}]},
            "image-dct": {"description": "x", "steps": [{"step": "dct", "keep": 6}, {"step": "jpeg", "quality": 75}]},
            "tensor-default": {"steps": [{"step": "finite"}, {"step": "clamp", "low": None, "high": None}]},
            "none": {"steps": []},
        }
    )
    assert profiles["image-default"].name == "image-default"
    assert profiles["image-default"].picture_steps == (Jpeg(75, 75), Median())
    assert profiles["image-randomized-jpeg"].picture_steps == (Jpeg(60, 90),)
    assert profiles["image-dct"].picture_steps == (Dct(6), Jpeg(75, 75))
    assert profiles["tensor-default"].tensor_steps == (Finite(), Clamp(None, None))


@pytest.mark.parametrize(
    "steps",
    [
        None,
        "jpeg",
        {},
        [1],
        ["jpeg"],
        [{}],
        [{"step": None}],
        [{"step": "blur"}],
        [{"step": ["jpeg"]}],
        [{"step": "finite", "low": 1}],
        [{"step": "jpeg"}],
        [{"step": "jpeg", "quality": 0}],
        [{"step": "jpeg", "quality": 101}],
        [{"step": "jpeg", "quality": 75.0}],
        [{"step": "jpeg", "quality": True}],
        [{"step": "jpeg", "quality": 75, "quality_min": 60}],
        [{"step": "jpeg", "quality_min": 60}],
        [{"step": "jpeg", "quality_min": 60, "quality_max": 59}],
        [{"step": "median"}],
        [{"step": "median", "size": 5}],
        [{"step": "dct", "keep": 0}],
        [{"step": "dct", "keep": 9}],
        [{"step": "dct", "keep": "6"}],
        [{"step": "clamp"}],
        [{"step": "clamp", "low": 0}],
        [{"step": "clamp", "low": 1, "high": 0}],
        [{"step": "clamp", "low": "0", "high": 1}],
        [{"step": "clamp", "low": float("nan"), "high": 1}],
        [{"step": "clamp", "low": True, "high": 1}],
        [{"step": "median", "size": 3}, {"step": "finite"}],
        [{"step": "finite"}] * 17,
    ],
)
def test_a_sanitizer_that_is_not_exactly_right_is_a_policy_error(steps):
    """The policy is refused when it is activated, with the profile's name."""
    with pytest.raises(PolicyError, match="'bad'"):
        validate_sanitizers({"bad": {"steps": steps}})


@pytest.mark.parametrize("profile", [None, [], {}, {"description": "x"}, {"steps": [], "extra": 1}])
def test_a_sanitizer_has_steps_and_nothing_unknown(profile):
    """So that a misspelt member is not silently without effect."""
    with pytest.raises(PolicyError, match="'bad'"):
        validate_sanitizers({"bad": profile})


@pytest.mark.parametrize(
    "profile",
    [
        None,
        [],
        {"softmax": True},
        {"top_k": 0},
        {"top_k": MAX_TOP_K + 1},
        {"top_k": True},
        {"top_k": None},
        {"top_k": 1.0},
        {"decimals": -1},
        {"decimals": 16},
        {"decimals": "2"},
        {"labels_only": 1},
    ],
)
def test_an_output_profile_that_is_not_exactly_right_is_a_policy_error(profile):
    """The policy is refused when it is activated, with the profile's name."""
    with pytest.raises(PolicyError, match="'bad'"):
        validate_outputs({"bad": profile})
