"""The policy's data that the gateway enforces itself."""

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from agent.errors import PolicyError
from agent.flows.policy_data import PolicyData
from agent.flows.policy_document import AREAS
from agent.inference.manifest import ImageModality, ModelManifest
from agent.records import Principal

POLICIES = Path(__file__).resolve().parents[3] / "policies"


def shipped(**limits):
    data = {area: yaml.safe_load((POLICIES / area / "data.yaml").read_text()) for area in AREAS}
    data["limits"] |= limits
    return json.dumps(data).encode()


def test_a_subjects_own_limit_holds_for_its_kind_of_proof_only():
    """A limit under `subjects` is found by the kind of proof and the id, as the Rego code finds it; everyone else gets the default."""
    data = PolicyData.parse(shipped(subjects={"mtls": {"loader": "bulk"}}))
    assert data.limit_for(Principal(id="loader", kind="mtls")) == "bulk"
    assert data.limit_for(Principal(id="loader", kind="jwt")) == "standard"
    assert data.limit_for(Principal(id="press", kind="mtls")) == "standard"


@pytest.mark.parametrize(
    "subjects", [{"mtls": {"loader": "unheard-of"}}, {"loader": "bulk"}, {"mtls": {"loader": 1}}, []]
)
def test_a_subjects_limit_that_can_not_be_enforced_refuses_the_data(subjects):
    """A limit that does not exist, or that does not stand under a kind of proof, is no policy data."""
    with pytest.raises(PolicyError):
        PolicyData.parse(shipped(subjects=subjects))


def test_a_models_limit_comes_before_the_default():
    """The subject's own limit, else the model's, else the most generous that any role may have: never narrower than the decision's."""
    document = json.loads(shipped(subjects={"mtls": {"loader": "standard"}}))
    document["models"]["models"] = {"copied": {"limit": "metered"}}
    data = PolicyData.parse(json.dumps(document).encode())
    press, loader = Principal(id="press", kind="mtls"), Principal(id="loader", kind="mtls")
    assert data.limit_for(press, "copied") == "metered"
    assert data.limit_for(press, "other") == "standard"
    assert data.limit_for(loader, "copied") == "standard"
    generous = PolicyData.parse(shipped(roles={"operator": "metered", "feeder": "bulk"}))
    assert generous.limit_for(press) == "bulk"
    with pytest.raises(PolicyError, match="there is no limit 'none'"):
        PolicyData.parse(shipped(roles={"operator": "none"}))


def test_profiles_are_chosen_in_order():
    """The decision's profile, else the manifest's, else the default; a name that there is not is an error."""
    data = PolicyData.parse(shipped())
    plain = ModelManifest("m", "1", (), ())
    stated = ModelManifest("m", "1", (), (), sanitizer="none", output_profile="top-1")
    picture = ModelManifest("m", "1", (), (), modality=ImageModality("x", "NCHW"))
    assert data.sanitizer("image-dct", stated).name == "image-dct"
    assert data.sanitizer(None, stated).name == "none"
    assert data.sanitizer(None, plain).name == "tensor-default"
    assert data.sanitizer(None, picture).name == "image-default"
    assert data.output("top-5", stated).name == "top-5"
    assert data.output(None, stated).name == "top-1"
    assert data.output(None, plain).name == "full"
    with pytest.raises(PolicyError):
        data.sanitizer("unheard-of", plain)
    with pytest.raises(PolicyError):
        data.output("unheard-of", plain)


def test_before_the_first_activation_nobody_is_admitted():
    """Empty data names no limit and explains nothing."""
    assert PolicyData().limit_for(Principal(id="a", kind="mtls")) == ""
    assert PolicyData().explain_denials is False


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
PLACES = [
    ("limits",),
    ("limits", "limits"),
    ("limits", "limits", "standard"),
    ("limits", "limits", "standard", "burst"),
    ("limits", "default"),
    ("limits", "subjects"),
    ("limits", "roles"),
    ("models",),
    ("models", "models"),
    ("sanitizers",),
    ("sanitizers", "profiles"),
    ("sanitizers", "profiles", "image-default"),
    ("sanitizers", "profiles", "image-default", "steps"),
    ("outputs",),
    ("outputs", "profiles"),
    ("outputs", "profiles", "top-5"),
    ("node",),
    ("node", "explain_denials"),
]  # fmt: skip -- a table of paths


@given(st.sampled_from(PLACES), JSON)
def test_data_of_any_shape_compiles_or_is_refused(place, value):
    """Whatever stands at a place of the data, it compiles or it is a PolicyError; nothing else ever comes out."""
    document = json.loads(shipped())
    inner = document
    for name in place[:-1]:
        inner = inner[name]
    inner[place[-1]] = value
    try:
        data = PolicyData.parse(json.dumps(document).encode())
    except PolicyError:
        return
    assert data.default_limit in data.limits


@given(st.binary(max_size=100) | st.integers(1000, 30_000).map(lambda depth: b'{"limits":' + b"[" * depth))
def test_bytes_that_are_no_data_are_refused(document):
    """Anything but the areas as JSON is a PolicyError."""
    with pytest.raises(PolicyError):
        PolicyData.parse(document)
