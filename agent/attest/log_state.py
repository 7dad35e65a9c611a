"""What a measurement log says is in force: entries folded into a state, by the node and by its appraiser alike.

Rules:

1. Handed over: the model file is in force, whatever was refused at its path before. Refused: open until the same path is handed over.
   Unloaded: all files of that version are out of force.
2. What was ever in force since the log began stays in ``seen``: no later entry takes it back.
3. A path that the agent does not write is a VerificationError of the check ``log-replay``.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from agent.attest.measurement import BOOT_AGGREGATE, KEY_SLASHES, Entry, KnownEntry
from agent.errors import VerificationError

__all__ = ["LogState"]


class LogState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a log says is in force. Digests are lower-case hex.

    Attributes:
        boot_aggregate: digest of the first entry, if that is what it was.
        config: settings in force.
        policy_revision: revision of the policy in force.
        policy: digest of that bundle.
        models: files in force, by ``name/version/file``.
        refused: open refusals, by ``name/version/file``.
        seen: every (``config``, ``policy`` or ``name/version/file``; digest) that was in force since the log began.
    """

    boot_aggregate: str | None = None
    config: str | None = None
    policy_revision: str | None = None
    policy: str | None = None
    models: dict[str, str] = {}
    refused: dict[str, str] = {}
    seen: frozenset[tuple[str, str]] = frozenset()

    def after(self, entries: Iterable[Entry], *, at_start: bool = False) -> LogState:
        """Return the state after further entries; ``at_start`` when the first of them is the log's first.

        Raises:
            VerificationError: ``log-replay``: an entry's path is none of those that the agent writes.
        """
        fold = _Fold(self)
        for index, entry in enumerate(entries):
            fold.apply(entry, first=at_start and index == 0)
        return fold.state()


class _Fold:
    """A LogState in the making."""

    def __init__(self, state: LogState) -> None:
        self._fields = {name: getattr(state, name) for name in state.__struct_fields__}
        self._models = dict(state.models)
        self._refused = dict(state.refused)
        self._seen = set(state.seen)

    def state(self) -> LogState:
        return LogState(
            **self._fields | {"models": self._models, "refused": self._refused, "seen": frozenset(self._seen)}
        )

    def _hand_over(self, file: tuple[str, str]) -> None:
        key, digest = file
        self._models[key] = digest
        self._refused.pop(key, None)
        self._seen.add(file)

    def apply(self, entry: Entry, *, first: bool) -> None:
        if isinstance(entry, KnownEntry) and not first:
            self._hand_over(entry.file)
            return
        digest = entry.digest.hex()
        if first != (entry.path == BOOT_AGGREGATE):
            raise VerificationError("log-replay", f"{BOOT_AGGREGATE} is the first entry and no other")
        match entry.path.split("/", 2):
            case ["edgewarden", "models", key] if key.count("/") >= KEY_SLASHES:
                self._hand_over((key, digest))
            case ["edgewarden", "refused", key] if key.count("/") >= KEY_SLASHES:
                self._refused[key] = digest
            case ["edgewarden", "unload", version] if version.count("/") == 1:
                gone = f"{version}/"
                self._models = {key: value for key, value in self._models.items() if not key.startswith(gone)}
            case ["edgewarden", "policy", revision] if "/" not in revision:
                self._fields |= {"policy_revision": revision, "policy": digest}
                self._seen.add(("policy", digest))
            case ["edgewarden", "config"]:
                self._fields["config"] = digest
                self._seen.add(("config", digest))
            case ["boot_aggregate"]:
                self._fields["boot_aggregate"] = digest
            case _:
                raise VerificationError("log-replay", f"{entry.path!r} is no path that the agent measures")
