"""What the guide to the policies shows is true: its examples are valid, its rule runs, and no reason is missing."""

import json
import re
import shutil

import jsonschema
import pytest
import yaml

from tests.support.rego import POLICIES, REGO, ROOT, opa, policy_data

GUIDE = (ROOT / "docs/policies.md").read_text()
AREAS = dict(re.findall(r"^### (\w+)\n(.*?)(?=^##)", GUIDE, re.DOTALL | re.MULTILINE))


def test_every_area_is_explained():
    """The guide has a section for each area of data."""
    assert sorted(AREAS) == sorted(policy_data())


@pytest.mark.parametrize("area", sorted(AREAS))
def test_examples_are_valid(area):
    """Each section shows data that its area's schema accepts, laid over the shipped data."""
    schema = json.loads((POLICIES / area / "schema.json").read_text())
    examples = re.findall(r"```yaml\n(.*?)```", AREAS[area], re.DOTALL)
    assert examples or area == "sanitizers"
    for example in examples:
        data = policy_data()[area]
        for member, value in yaml.safe_load(example).items():
            data[member] = {**data[member], **value} if isinstance(value, dict) and member != "serves" else value
        jsonschema.Draft202012Validator(schema).validate(data)


def test_every_reason_is_explained():
    """Each reason that a rule gives stands in the guide, and each that stands there is given by a rule."""
    code = "".join(path.read_text() for path in REGO.rglob("*.rego") if not path.name.endswith("_test.rego"))
    given = set(re.findall(r'reasons contains "(\w+)"', code)) | set(re.findall(r'"(role_may_not_\w+)"', code))
    table = GUIDE.split("## Reasons")[1].split("## ")[0]
    first_cells = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    named = {word.replace("…", "role_may_not") for cell in first_cells for word in re.findall(r"`([\w…]+)`", cell)}
    assert named == given


@pytest.mark.integration
def test_the_rule_of_ones_own_runs(tmp_path):
    """The guide's own rule and its test pass OPA's strict compiler, formatter and test runner."""
    rule, test = re.findall(r"```rego\n(.*?)```", GUIDE, re.DOTALL)
    folder = tmp_path / "rego"
    shutil.copytree(REGO, folder)
    (folder / "edgewarden/site.rego").write_text(rule)
    (folder / "edgewarden/site_test.rego").write_text(test)
    assert opa("check", "--strict", "-b", str(folder), str(POLICIES)).returncode == 0
    assert opa("fmt", "--list", str(folder)).stdout == ""
    done = opa("test", "-b", str(folder), str(POLICIES), "--run", "site_test")
    assert (done.returncode, done.stdout.strip()) == (0, "PASS: 1/1")
    fixtures = folder / "edgewarden/fixtures_test.rego"
    fixtures.write_text(fixtures.read_text().replace('"posture": {}', '"posture": {"enclosure": "closed"}'))
    decision = opa(
        "eval",
        "-b",
        str(folder),
        "-b",
        str(POLICIES),
        "--format=raw",
        "data.edgewarden.authz.decision.allow with input as data.edgewarden.fixtures.infer",
    )
    assert decision.stdout.strip() == "true", decision.stdout
