"""One target under atheris: ``python -m tests.fuzz.run TARGET [libFuzzer's options] [folders]``.

libFuzzer writes what it finds into the first folder and reads the others, so the corpus that is kept comes last.
"""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["agent.attest", "agent.records", "msgspec"]):
    from tests.fuzz.targets import TARGETS

from agent.errors import VerificationError

__all__ = ["main"]


def main() -> None:
    """Fuzz until libFuzzer ends the process: with 0 after its time or runs, otherwise with a crash."""
    target = TARGETS[sys.argv[1]]

    def one(data: bytes) -> None:
        try:
            target(data)
        except VerificationError:
            return

    atheris.Setup([sys.argv[0], *sys.argv[2:]], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
