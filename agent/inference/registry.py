"""The models that a gateway serves: name -> version -> loaded model.

Rules:

1. A model is added or removed as a whole; a request that already holds one keeps it to its end.
2. Without a version, the highest that is ready answers (:func:`agent.inference.manifest.version_key`).
3. Readiness is honest: the registry is ready when every model that it was told to expect is.
"""

import enum
from dataclasses import dataclass

from agent.errors import PeerError
from agent.inference.manifest import ModelManifest, version_key
from agent.inference.session import Session

__all__ = ["LoadedModel", "ModelState", "Registry"]


class ModelState(enum.Enum):
    """Where a model stands."""

    LOADING = "LOADING"
    READY = "READY"
    UNAVAILABLE = "UNAVAILABLE"


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that answers.

    Attributes:
        session: runs it.
        manifest: what it says of itself.
        sha256: digest of its package.
        signer: SHA-256 of the SubjectPublicKeyInfo that signed it.
        labels: of its classes, in order; may be empty.
        resource: JSON of what the policy is told about it.
    """

    session: Session
    manifest: ModelManifest
    sha256: str
    signer: str
    labels: tuple[str, ...] = ()
    resource: bytes = b""


@dataclass(frozen=True, slots=True)
class _Entry:
    state: ModelState
    model: LoadedModel | None = None
    reason: str = ""


class Registry:
    """What is loaded, what is on its way, and what failed."""

    def __init__(self) -> None:
        self._entries: dict[str, dict[str, _Entry]] = {}
        self._unversioned: dict[str, LoadedModel] = {}  # what answers without a version; found again after a change

    def expect(self, name: str, version: str) -> None:
        """Note that a model is being loaded; one that already answers goes on answering."""
        versions = self._entries.setdefault(name, {})
        if version not in versions or versions[version].state is not ModelState.READY:
            versions[version] = _Entry(ModelState.LOADING)

    def add(self, model: LoadedModel) -> None:
        """Let a model answer, in the place of any of the same name and version."""
        self._unversioned.pop(model.manifest.name, None)
        versions = self._entries.setdefault(model.manifest.name, {})
        versions[model.manifest.version] = _Entry(ModelState.READY, model)

    def fail(self, name: str, version: str, reason: str) -> None:
        """Note that a model could not be loaded; it does not answer any more."""
        self._unversioned.pop(name, None)
        self._entries.setdefault(name, {})[version] = _Entry(ModelState.UNAVAILABLE, reason=reason)

    def remove(self, name: str, version: str) -> None:
        """Forget a model; unknown ones are no error."""
        self._unversioned.pop(name, None)
        versions = self._entries.get(name, {})
        versions.pop(version, None)
        if not versions:
            self._entries.pop(name, None)

    def get(self, name: str, version: str = "") -> LoadedModel:
        """Return the model that answers.

        Raises:
            PeerError: 404 for an unknown one, 503 for one that is not ready.
        """
        if not version and (known := self._unversioned.get(name)) is not None:
            return known
        versions = self._entries.get(name, {})
        if version:
            entry = versions.get(version)
        else:
            ready = [known for known, entry in versions.items() if entry.model is not None]
            entry = versions[_highest(ready or list(versions))] if versions else None
        if entry is None:
            raise PeerError(
                404, "unknown_model", f"no model {name[:64]!r}" + (f" version {version[:32]!r}" * bool(version))
            )
        if entry.model is None:
            raise PeerError(503, "model_not_ready", f"model {name} is {entry.state.value.lower()}", retry_after_s=1.0)
        if not version:
            self._unversioned[name] = entry.model
        return entry.model

    def versions(self, name: str) -> tuple[str, ...]:
        """Return the versions that answer, the lowest first."""
        ready = (known for known, entry in self._entries.get(name, {}).items() if entry.model is not None)
        return tuple(sorted(ready, key=_order))

    def states(self) -> dict[tuple[str, str], tuple[ModelState, str]]:
        """Return (name, version) -> (state, reason) of all that is known."""
        return {
            (name, version): (entry.state, entry.reason)
            for name, versions in sorted(self._entries.items())
            for version, entry in sorted(versions.items(), key=lambda item: _order(item[0]))
        }

    @property
    def ready(self) -> bool:
        """Whether every expected model answers."""
        return all(state is ModelState.READY for state, _ in self.states().values())


def _order(version: str) -> tuple[tuple[tuple[int, int, str], ...], str]:
    return version_key(version), version


def _highest(versions: list[str]) -> str:
    return max(versions, key=_order)
