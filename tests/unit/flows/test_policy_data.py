"""The policy's data that the gateway enforces itself."""

import json
from pathlib import Path

import pytest
import yaml

from agent.errors import PolicyError
from agent.flows.policy_data import AREAS, PolicyData
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
