"""In the gateway: from the sealed files that the agent handed over to a model that answers.

The agent hands over the model, its manifest, its labels and the external data that the inspector found in the graph, nothing else.
"""

from collections.abc import Mapping

import msgspec

from agent.errors import VerificationError
from agent.inference.manifest import MANIFEST_FILE, ModelManifest, parse_labels, parse_manifest
from agent.inference.package import MODEL_FILE
from agent.inference.registry import LoadedModel
from agent.inference.session import Session
from agent.isolation.memfd import map_sealed

__all__ = ["load_model"]


def load_model(fds: Mapping[str, int], *, digest: str, signer: str, threads: int) -> LoadedModel:
    """Build the session.

    Args:
        fds: a sealed descriptor for each file.
        digest: of the package, as the agent measured it.
        signer: SHA-256 of the signer's public key.
        threads: of the session.

    Raises:
        VerificationError: the manifest is malformed, or onnxruntime refuses the model.
        IsolationError: a descriptor is not completely sealed.
    """
    files = {path: map_sealed(fd) for path, fd in fds.items()}
    for required in (MODEL_FILE, MANIFEST_FILE):
        if required not in files:
            raise VerificationError("missing-file", f"the package has no {required}")
    manifest = parse_manifest(bytes(files[MANIFEST_FILE]))
    labels: tuple[str, ...] = ()
    if manifest.labels is not None:
        if manifest.labels not in files:
            raise VerificationError("missing-file", f"the package has no {manifest.labels}")
        labels = parse_labels(bytes(files[manifest.labels]))
    externals = {path: data for path, data in files.items() if path not in {MODEL_FILE, MANIFEST_FILE, manifest.labels}}
    session = Session(bytes(files[MODEL_FILE]), externals, manifest, threads)
    return LoadedModel(session, manifest, digest, signer, labels, _resource(manifest, digest, signer))


def _resource(manifest: ModelManifest, digest: str, signer: str) -> bytes:
    """Return the policy input's ``resource`` (contract §4): what is loaded was measured before it was handed over."""
    return msgspec.json.encode(
        {
            "model": manifest.name,
            "version": manifest.version,
            "digest": digest,
            "signer": signer,
            "measured": True,
            "sensitivity": manifest.sensitivity,
        }
    )
