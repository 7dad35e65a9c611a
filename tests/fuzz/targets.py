"""What is fuzzed: each target takes any bytes, and whatever leaves it but a VerificationError is a crash.

``python -m tests.fuzz.targets FOLDER`` writes the seeds: honest structures, and one broken in each way that a parser names.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from agent.attest.appraisal import appraise
from agent.attest.evidence import Evidence
from agent.attest.log_state import LogState
from agent.attest.measurement import parse_entries, replay, replay_log
from agent.attest.structures import (
    AK_TEMPLATE,
    RSA_AK_TEMPLATE,
    parse_ak_public,
    parse_quote,
    parse_rsa_ak_public,
    parse_signature,
)
from tests.support.attest import ENTRIES, PCR, Attester, expectation

__all__ = ["CORPUS", "SEEDS", "TARGETS"]

CORPUS = Path(__file__).resolve().parent / "corpus"
_HONEST = Attester()
_EVIDENCE, _LATER, _BARE = _HONEST.evidence(), _HONEST.evidence(start=4), _HONEST.evidence(posture={})
_SIGNED_CLAIMS = (_EVIDENCE.claims, _BARE.claims)
_ASKED = expectation()
_RSA_KEY = RSA_AK_TEMPLATE + b"\1\0" + b"\xff" * 256


def _attest(data: bytes) -> None:
    quote = parse_quote(data)
    assert len(quote.qualified_signer) + len(quote.extra_data) + len(quote.pcr_digest) < len(data)


def _signature(data: bytes) -> None:
    signature = parse_signature(data)
    assert max(signature.r, signature.s) < 1 << 256


def _public(data: bytes) -> None:
    if data[:2] == RSA_AK_TEMPLATE[:2]:
        assert parse_rsa_ak_public(data) == data
    else:
        assert parse_ak_public(data).marshaled.startswith(AK_TEMPLATE)


def _log(data: bytes) -> None:
    entries, value = replay_log(data, PCR)
    assert b"".join(entry.encode(PCR) for entry in entries) == data
    assert entries == list(parse_entries(data, PCR))
    assert value == replay(entries)
    LogState().after(entries, at_start=True)


def _evidence(data: bytes) -> None:
    result = appraise(data, _ASKED)  # raises nothing, not even a VerificationError
    if result.status != "none":
        assert Evidence.decode(data).claims in _SIGNED_CLAIMS
    Evidence.decode(data).claims.canonical()


TARGETS: Mapping[str, Callable[[bytes], None]] = {
    "attest": _attest,
    "signature": _signature,
    "public": _public,
    "log": _log,
    "evidence": _evidence,
}

SEEDS: Mapping[str, Mapping[str, bytes]] = {
    "attest": {
        "quote": _EVIDENCE.attest,
        "no-pcrs": Attester(selected=()).evidence().attest,
        "certify": Attester(kind=0x8017).evidence().attest,
        "cut": _EVIDENCE.attest[:-1],
    },
    "signature": {
        "ecdsa": _EVIDENCE.signature,
        "rsassa": b"\x00\x14\x00\x0b\x01\x00" + b"\x5a" * 256,
        "long": _EVIDENCE.signature + b"\0",
    },
    "public": {
        "ecc": _HONEST.ak_public,
        "ecc-2b": len(_HONEST.ak_public).to_bytes(2) + _HONEST.ak_public,
        "off-curve": _HONEST.ak_public[:-1] + bytes([_HONEST.ak_public[-1] ^ 1]),
        "rsa": _RSA_KEY,
    },
    "log": {
        "whole": _EVIDENCE.entries,
        "boot": ENTRIES[0].encode(PCR),
        "kernel": ENTRIES[0].encode(10),
        "cut": _EVIDENCE.entries[:-1],
        "empty": b"",
    },
    "evidence": {
        "honest": _EVIDENCE.encode(),
        "later": _LATER.encode(),
        "bare": _BARE.encode(),
        "huge-number": _EVIDENCE.encode().replace(b'"from":0', b'"from":1e400'),
        "lone-surrogate": _EVIDENCE.encode().replace(b"node-1", b"\\ud800"),
    },
}


def _write(folder: Path) -> None:
    for target, seeds in SEEDS.items():
        (folder / target).mkdir(parents=True, exist_ok=True)
        for name, data in seeds.items():
            (folder / target / name).write_bytes(data)


if __name__ == "__main__":
    _write(Path(sys.argv[1]))
