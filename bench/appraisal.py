"""Appraisal of Evidence beside Keylime's library code, in one run: ``python -m bench.appraisal`` (after ``make keylime``).

Rules:

1. The same bytes: one TPMS_ATTEST, one TPMT_SIGNATURE, one key, one ima-ng list, one allowlist. Keylime gets the list in the ASCII form and
   the PCR values in the form that it reads; its IMA PCR is set to the measurement PCR.
2. The same work: parse, verify the signature, nonce, PCR digest and clock, replay the list, compare every entry with what is approved.
   Here besides: the claims and the boot PCRs. Both sides hold their allowlist ready for use: Keylime decoded, here with the entries that it
   approves; what that takes, once for each version of the Reference Values, stands below the table.
3. Rounds alternate; each ratio is taken within a round.

A stock Keylime agent signs with RSA-2048. Both sides verify ECDSA P-256 here, through the same OpenSSL binding; verifying RSA is cheaper by some
tens of microseconds, which shows in the rows of one entry and of a steady poll alone.
"""

from __future__ import annotations

import base64
import json
import statistics
import subprocess
import tempfile
import time
import timeit
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.attest.appraisal import Expectation, Verified, appraise
from agent.attest.evidence import Evidence
from agent.attest.keylime import quote_string
from agent.attest.measurement import Entry, known_models, model_entry, parse_entries
from agent.attest.structures import parse_ak_public, parse_signature
from tests.support.attest import ENTRIES, PCR, Attester, digest, expectation, with_reference

__all__ = ["SIZES", "Figures", "measure"]

ROOT = Path(__file__).resolve().parents[1]
KEYLIME_PYTHON = ROOT / ".cache" / "keylime" / "bin" / "python"
SIZES = (1, 100, 10_000)
FULL_BAR, STEADY_BAR = 5.0, 3.0
_PREFIX = "edgewarden/models/"
_FILES_A_MODEL = 100


@dataclass(frozen=True, slots=True)
class Figures:
    """One row: microseconds a poll here and in Keylime, and how many times faster, a ratio for each round."""

    kind: str
    entries: int
    here_us: float
    keylime_us: float
    ratios: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class _Case:
    kind: str
    entries: int
    calls: int
    evidence: bytes
    expect: Expectation
    for_keylime: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.entries}"

    def call(self) -> float:
        begin = time.perf_counter()
        result = appraise(self.evidence, self.expect)
        taken = time.perf_counter() - begin
        assert result.status == "affirming", result.failed
        return taken


def _log(size: int) -> tuple[Entry, ...]:
    """Return the start of a boot and then model files, ``size`` entries beyond the boot in all."""
    files = (
        model_entry(f"m{at // _FILES_A_MODEL}", "1", f"weights-{at:05}.bin", digest(str(at))) for at in range(size)
    )
    return (*ENTRIES[:3], *files)


def _cases(size: int) -> tuple[_Case, _Case]:
    """Return the appraisal of a whole log, and of a poll after it that brings nothing new."""
    log = _log(size)
    attester = Attester()
    approved = {entry.path.removeprefix(_PREFIX): frozenset({entry.digest.hex()}) for entry in log[3:]}
    reference = with_reference(models=approved)
    whole = attester.evidence(log)
    asked = expectation(reference=reference)
    verified = appraise(whole.encode(), asked).require()
    steady = attester.evidence(log, start=len(log))
    asked_on = expectation(reference=reference, verified=verified)
    calls = max(1, 2000 // size)
    return (
        _Case("full", size, calls, whole.encode(), asked, _for_keylime(attester, whole, size, None)),
        _Case("steady", size, 200, steady.encode(), asked_on, _for_keylime(attester, steady, size, verified)),
    )


def _for_keylime(attester: Attester, evidence: Evidence, size: int, verified: Verified | None) -> dict[str, Any]:
    values = {index: bytes.fromhex(value) for index, value in evidence.pcrs.sha256.items()}
    key = attester.ak_public
    return {
        "quote": quote_string(evidence.attest, evidence.signature, values),
        "list": "".join(f"{entry.ascii(PCR)}\n" for entry in parse_entries(evidence.entries, PCR)),
        # extraData is Evidence's digest: Keylime takes a nonce in base64 too.
        "nonce": base64.b64encode(_extra_data(evidence.attest)).decode(),
        "key": base64.b64encode(len(key).to_bytes(2) + key).decode(),
        "policy": str(size),
        "verified": verified.pcr if verified is not None else "",
        "count": verified.index if verified is not None else 0,
    }


def _extra_data(attest: bytes) -> bytes:
    at = 6 + 2 + int.from_bytes(attest[6:8])
    return attest[at + 2 : at + 2 + int.from_bytes(attest[at : at + 2])]


class _Keylime:
    """The process that runs Keylime's half."""

    def __init__(self, cases: Sequence[_Case], folder: Path) -> None:
        policies = {str(size): {e.path: [e.digest.hex()] for e in _log(size)} for size in SIZES}
        asked = folder / "cases.json"
        asked.write_text(
            json.dumps({"pcr": PCR, "policies": policies, "cases": {case.name: case.for_keylime for case in cases}})
        )
        self._errors = (folder / "errors").open("w+")
        self._process = subprocess.Popen(
            [str(KEYLIME_PYTHON), str(ROOT / "bench" / "keylime_half.py"), str(asked)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={"PATH": "/usr/bin:/bin", "KEYLIME_DIR": str(folder), "HOME": str(folder)},
        )

    def call(self, case: _Case) -> float:
        """Return seconds a call."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{case.name} {case.calls}\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            raise RuntimeError(f"Keylime's half has ended: {self._errors.read()}")
        return float(line)

    def stop(self) -> None:
        self._process.communicate(timeout=30)
        self._errors.close()


def measure(rounds: int) -> list[Figures]:
    """Run both halves in alternating rounds."""
    cases = [case for size in SIZES for case in _cases(size)]
    with tempfile.TemporaryDirectory() as folder:
        keylime = _Keylime(cases, Path(folder))
        try:
            return [_row(case, keylime, rounds) for case in cases]
        finally:
            keylime.stop()


def _row(case: _Case, keylime: _Keylime, rounds: int) -> Figures:
    here, there = [], []
    for number in range(rounds + 1):
        mine = sum(case.call() for _ in range(case.calls)) / case.calls
        its = keylime.call(case)
        if number:  # the first round is not counted: caches, specialised bytecode
            here.append(mine)
            there.append(its)
    ratios = tuple(its / mine for mine, its in zip(here, there, strict=True))
    return Figures(case.kind, case.entries, 1e6 * statistics.median(here), 1e6 * statistics.median(there), ratios)


def _verification_us() -> float:
    """Return microseconds of what both sides do alike: one ECDSA P-256 verification of a quote."""
    attester = Attester()
    evidence = attester.evidence()
    key, signature = parse_ak_public(attester.ak_public), parse_signature(evidence.signature)
    return 1e6 * min(timeit.repeat(lambda: key.verify(signature, evidence.attest), number=500, repeat=5)) / 500


def _preparation_us(size: int) -> float:
    models = {entry.path.removeprefix(_PREFIX): [entry.digest.hex()] for entry in _log(size)[3:]}
    return 1e6 * min(timeit.repeat(lambda: known_models(models, PCR), number=1, repeat=5))


def report(rounds: int) -> None:
    """Print the table and its bars."""
    print("\n## Appraisal beside Keylime's library\n")
    print("| poll | entries | here, µs | Keylime, µs | times faster |\n| --- | --- | --- | --- | --- |")
    found = measure(rounds)
    for row in found:
        spread = f"{statistics.median(row.ratios):.1f} ({min(row.ratios):.1f} to {max(row.ratios):.1f})"
        print(f"| {row.kind} | {row.entries} | {row.here_us:.0f} | {row.keylime_us:.0f} | {spread} |")
    alike = _verification_us()
    print(f"\nOne ECDSA verification, which both sides do in the same library: {alike:.0f} µs. Without it:\n")
    print("| poll | entries | times faster |\n| --- | --- | --- |")
    for row in found:
        print(f"| {row.kind} | {row.entries} | {(row.keylime_us - alike) / (row.here_us - alike):.1f} |")
    print(f"\nMaking {SIZES[-1]} approved files ready, once a version: {_preparation_us(SIZES[-1]) / 1000:.0f} ms.")
    for kind, bar in (("full", FULL_BAR), ("steady", STEADY_BAR)):
        (row,) = (row for row in found if (row.kind, row.entries) == (kind, SIZES[-1]))
        word = "holds" if statistics.median(row.ratios) >= bar else "MISSED"
        print(f"\nBar: {kind}, {SIZES[-1]} entries, at least {bar:.0f} times as fast: **{word}**.")


if __name__ == "__main__":
    report(rounds=7)
