"""The Rego code passes its own tests, covers itself, and is tidy by OPA's tools."""

import json

import pytest

from tests.support.rego import POLICIES, REGO, opa

pytestmark = pytest.mark.integration

MIN_COVERAGE_PERCENT = 95


def test_rego_tests_pass_and_cover_the_code():
    """Every Rego test passes, and together they cover the code."""
    done = opa("test", "--coverage", "--format=json", "-b", str(REGO), str(POLICIES))
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["coverage"] >= MIN_COVERAGE_PERCENT


def test_each_package_has_tests():
    """No file of rules stands without a file of tests."""
    code = {path for path in REGO.rglob("*.rego") if not path.name.endswith("_test.rego")}
    assert len(code) >= 9
    assert not [path.name for path in code if not path.with_name(f"{path.stem}_test.rego").is_file()]


def test_rego_is_strict():
    """OPA's strict compiler finds nothing, with the folders as bundles and the rules alone."""
    for arguments in (["-b", str(REGO), str(POLICIES)], [str(REGO)]):
        done = opa("check", "--strict", *arguments)
        assert done.returncode == 0, done.stderr


def test_rego_is_formatted():
    """The code is as ``opa fmt`` writes it."""
    done = opa("fmt", "--list", str(REGO))
    assert (done.returncode, done.stdout) == (0, "")


def test_the_folders_build_one_bundle(tmp_path):
    """OPA builds one bundle of both folders, and the entry point is found by its annotation."""
    bundle = tmp_path / "bundle.tar.gz"
    done = opa("build", "-b", str(REGO), "-b", str(POLICIES), "-o", str(bundle))
    assert done.returncode == 0, done.stderr
    answer = opa("eval", "-b", str(bundle), "-I", "data.edgewarden.authz.decision.reasons", "--format=raw", stdin="{}")
    assert "action_unknown" in json.loads(answer.stdout)
