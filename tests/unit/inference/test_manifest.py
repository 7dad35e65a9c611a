"""``model.yaml``: what it may say."""

from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from agent.errors import VerificationError
from agent.inference.manifest import (
    MAX_MANIFEST_BYTES,
    ImageModality,
    ModelManifest,
    parse_manifest,
    version_key,
)
from agent.strict_yaml import MAX_DEPTH

TENSOR: dict[str, Any] = {
    "name": "m",
    "version": "1.0",
    "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}],
    "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 2]}],
}
IMAGE: dict[str, Any] = {
    **TENSOR,
    "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 3, 8, 10]}],
    "modality": {"kind": "image", "input": "x", "layout": "NCHW"},
}


def _parse(document):
    return parse_manifest(yaml.safe_dump(document).encode())


def test_a_short_manifest_has_safe_defaults():
    """What is not said: internal, finite values only, no profile of its own."""
    manifest = _parse(TENSOR)
    assert (manifest.sensitivity, manifest.sanitizer, manifest.output_profile) == ("internal", "", "")
    assert manifest.modality.allow_nonfinite is False


def test_image_takes_its_size_from_the_input():
    """Height and width need not be said twice."""
    image = _parse(IMAGE).image
    assert isinstance(image, ImageModality)
    assert (image.height, image.width, image.channels) == (8, 10, 3)


def _image(**changes):
    return {**IMAGE, "modality": {**IMAGE["modality"], **changes}}


def _input(**changes):
    return {**IMAGE, "inputs": [{**IMAGE["inputs"][0], **changes}]}


@pytest.mark.parametrize(
    ("document", "where"),
    [
        ([], r"\$"),
        (None, r"\$"),
        ({**TENSOR, "name": "../up"}, r"\$\.name"),
        ({**TENSOR, "name": ""}, r"\$\.name"),
        ({**TENSOR, "name": "m\n"}, r"\$\.name"),
        ({**TENSOR, "version": 1.0}, r"\$\.version"),
        ({**TENSOR, "version": "../1"}, r"\$\.version"),
        ({**TENSOR, "extra": 1}, "extra"),
        ({**TENSOR, "sensitivity": "secret"}, r"\$\.sensitivity"),
        ({**TENSOR, "inputs": []}, r"\$\.inputs"),
        ({**TENSOR, "inputs": [*TENSOR["inputs"], dict(TENSOR["inputs"][0], shape=[3])]}, "occurs twice"),
        ({**TENSOR, "outputs": [*TENSOR["outputs"], dict(TENSOR["outputs"][0], shape=[3])]}, "occurs twice"),
        ({**TENSOR, "inputs": [{"name": "x", "datatype": "BF16", "shape": [1]}]}, "datatype"),
        ({**TENSOR, "inputs": [{"name": "x", "datatype": "FP32", "shape": [-2]}]}, "shape"),
        ({**TENSOR, "modality": {"kind": "audio"}}, "modality"),
        ({**TENSOR, "modality": {"kind": "tensor", "ranges": {"z": {"low": 0, "high": 1}}}}, "no input 'z'"),
        ({**TENSOR, "modality": {"kind": "tensor", "ranges": {"x": {"low": 1, "high": 1}}}}, "less than"),
        ({**TENSOR, "modality": {"kind": "tensor", "ranges": {"x": {"low": 0, "high": float("inf")}}}}, "finite"),
        ({**TENSOR, "modality": {"kind": "tensor", "ranges": {"x": {"low": float("nan"), "high": 1}}}}, "finite"),
        ({**TENSOR, "modality": {"kind": "tensor", "ranges": {1: {"low": 0, "high": 1}}}}, "ranges"),
        (_image(input="z"), "no input 'z'"),
        (_image(color="GRAY"), "channels"),
        (_image(mean=[0.1, 0.2]), "mean"),
        (_image(mean=[float("nan")]), "mean"),
        (_image(std=[0.0]), "std"),
        (_image(std=[-1.0]), "std"),
        (_image(low=1, high=0), "less than"),
        (_image(height=9), "height"),
        (_image(resize_short=9), "resize_short"),
        (_input(shape=[-1, 3, -1, 10]), "height"),
        (_input(shape=[3, 8, 10]), "4 dimensions"),
        (_input(datatype="INT64"), "FP16, FP32"),
        (_input(datatype="UINT8"), "plain pixels"),
    ],
)
def test_what_a_manifest_may_not_say(document, where):
    """Each mistake is refused, and the text says where it stands."""
    with pytest.raises(VerificationError, match=where) as caught:
        _parse(document)
    assert caught.value.check == "manifest"


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "aliases are not allowed"),
        ("a: &a {x: *a}", "aliases are not allowed"),
        ("[" * (MAX_DEPTH + 1), "nested deeper"),
        ("[" * 60_000, "nested deeper"),
        ("- " * 30_000, "nested deeper"),
        ("a: 1\na: 2", "twice"),
        ("!!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("a: 2020-13-45", "month"),
        ("a: 1" + "0" * 5000, "digit"),
        ("\x00", "special characters"),
        ("a: b: c", "mapping values"),
        ("x" * (MAX_MANIFEST_BYTES + 1), "more than"),
        ("? [a]\n: b", "not a scalar"),
        ("a: *nobody", "aliases"),
    ],
)
def test_yaml_tricks_are_refused(text, message):
    """Bombs, tags, duplicates and deep nesting end as one named error, quickly."""
    with pytest.raises(VerificationError, match=message) as caught:
        parse_manifest(text.encode())
    assert caught.value.check == "manifest"


def test_undecodable_text_is_refused():
    """Bytes that are no UTF-8 are refused by name."""
    with pytest.raises(VerificationError, match="manifest"):
        parse_manifest(b"name: \xff\xfe")


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


@given(base=st.sampled_from([TENSOR, IMAGE]), key=st.sampled_from(sorted(IMAGE)), value=_VALUES)
def test_any_value_in_any_field_parses_or_is_refused_by_name(base, key, value):
    """Nothing but a manifest or a VerificationError comes out."""
    try:
        assert isinstance(_parse({**base, key: value}), ModelManifest)
    except VerificationError as error:
        assert error.check == "manifest"  # noqa: PT017 -- either outcome is right


@given(st.text(max_size=200) | st.text(alphabet="[]{}:,-?!&*|>'\"%@`#\n\t a1~<=.", max_size=60))
def test_any_text_is_refused_by_name(text):
    """Random YAML and YAML's own signs in any order raise nothing else."""
    with pytest.raises(VerificationError):
        parse_manifest(text.encode("utf-8", "surrogatepass"))


def test_versions_order_by_number():
    """1.10 is above 1.9, a word below a number, a longer one above its beginning."""
    ordered = ["1.0rc1", "1.0", "1.0.1", "1.9", "1.10", "2", "10"]
    assert sorted(ordered, key=version_key) == ordered
