"""Each fuzz target over its corpus, and a short run under atheris that finds the same on every machine."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from agent.errors import VerificationError
from tests.fuzz.targets import CORPUS, SEEDS, TARGETS

ROOT = Path(__file__).resolve().parents[2]
RUNS = 3000
TIMEOUT_S = 100
pytestmark = pytest.mark.fuzz
HONEST = {
    "attest": {"quote", "no-pcrs"},
    "signature": {"ecdsa"},
    "public": {"ecc", "ecc-2b", "rsa"},
    "log": {"whole", "boot", "empty"},
    "evidence": {"honest", "later", "bare"},
}


def _fuzz(target, *options):
    command = [sys.executable, "-m", "tests.fuzz.run", target, *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


@pytest.mark.parametrize("target", TARGETS)
def test_the_corpus_is_taken_or_refused_in_order(target):
    """Of the seeds exactly the honest ones are taken; everything else is a VerificationError."""
    taken = set()
    for seed in sorted((CORPUS / target).iterdir()):
        try:
            TARGETS[target](seed.read_bytes())
        except VerificationError:
            continue
        taken.add(seed.name)
    assert taken == HONEST[target]


@pytest.mark.parametrize("target", TARGETS)
def test_the_corpus_is_what_the_seeds_are(target):
    """The files that are kept are those that the seeds of today make; none is missing."""
    kept = {seed.name: seed.read_bytes() for seed in (CORPUS / target).iterdir()}
    assert SEEDS[target].items() <= kept.items()


@pytest.mark.skipif(find_spec("atheris") is None, reason="atheris has wheels for x86-64 alone")
@pytest.mark.parametrize("target", TARGETS)
def test_a_short_run_finds_no_crash(target, tmp_path):
    """A bounded run from the corpus with a fixed seed ends by itself."""
    done = _fuzz(
        target, f"-runs={RUNS}", "-seed=1", f"-artifact_prefix={tmp_path}/", str(tmp_path), str(CORPUS / target)
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert f"Done {RUNS} runs" in done.stderr
