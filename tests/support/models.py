"""Model packages for tests: two real ones and a tiny one, signed with throw-away keys."""

import datetime as dt
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from agent.certificate import begin_certificate, key_usage
from tools.example_models import ASSETS, write_magika, write_orientation, write_package

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # noqa: TID251 -- stands for the parent process that sets it

__all__ = [
    "ASSETS",
    "DIGITAL_SIGNATURE",
    "EPOCH",
    "CertificateMaker",
    "magika_features",
    "new_key",
    "page",
    "private_pem",
    "public_pem",
    "sign_directory",
    "tiny_graph",
    "write_magika",
    "write_orientation",
    "write_tiny",
]

EPOCH = dt.datetime(2020, 1, 1, tzinfo=dt.UTC)


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def private_pem(key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def public_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def sign_directory(directory: Path, key: ec.EllipticCurvePrivateKey, chain: tuple[x509.Certificate, ...] = ()) -> Path:
    """Sign a package in place, as ``edgewarden model sign`` does."""
    from agent.inference.package import SIGNATURE_FILE, read_package  # noqa: PLC0415 -- after the environment is set
    from agent.inference.signing import sign  # noqa: PLC0415 -- as above

    package = read_package(directory)
    (directory / SIGNATURE_FILE).write_bytes(sign(directory.parent.name, package.digests(), key, chain))
    package.close()
    return directory


def tiny_graph(seed: int = 7, location: str | None = None) -> tuple[onnx.ModelProto, bytes]:
    """Return a multi-layer perceptron, 64 floats to 10, and the bytes of its external data (``location`` given)."""
    random = np.random.default_rng(seed)
    arrays = {
        "w1": random.standard_normal((64, 32)).astype(np.float32),
        "b1": random.standard_normal(32).astype(np.float32),
        "w2": random.standard_normal((32, 10)).astype(np.float32),
        "b2": random.standard_normal(10).astype(np.float32),
    }
    initializers, data = [], b""
    for name, array in arrays.items():
        tensor = numpy_helper.from_array(array, name)
        if location is not None:
            raw = tensor.raw_data
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", location), ("offset", len(data)), ("length", len(raw))):
                tensor.external_data.add(key=key, value=str(value))
            data += raw
        initializers.append(tensor)
    graph = helper.make_graph(
        [
            helper.make_node("Gemm", ["x", "w1", "b1"], ["h"]),
            helper.make_node("Relu", ["h"], ["r"]),
            helper.make_node("Gemm", ["r", "w2", "b2"], ["y"]),
        ],
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 10])],
        initializers,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), data


def write_tiny(
    directory: Path, *, external: bool = False, version: str = "1", seed: int = 7, name: str = "tiny", **manifest: Any
) -> Path:
    """Write the tiny model's package, unsigned; ``manifest`` overrides fields of ``model.yaml``."""
    model, data = tiny_graph(seed, "weights/data.bin" if external else None)
    stated = {
        "name": name,
        "version": version,
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 64]}],
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 10]}],
        "modality": {"kind": "tensor"},
        **manifest,
    }
    write_package(directory, model.SerializeToString(), stated, [])
    if external:
        (directory / "weights").mkdir()
        (directory / "weights" / "data.bin").write_bytes(data)
    return directory


def page(turns: int = 0) -> np.ndarray[Any, Any]:
    """Return a scanned page, HWC RGB, turned counter-clockwise by quarter turns."""
    with Image.open(ASSETS / "skimage" / "data" / "page.png") as image:
        return np.ascontiguousarray(np.rot90(np.asarray(image.convert("RGB")), turns))


def magika_features(content: bytes) -> np.ndarray[Any, Any]:
    """Return the input of the magika model for one file: int32[1, 2048]."""
    head, tail = content[:4096].lstrip()[:1024], content[-4096:].rstrip()[-1024:]
    features = np.full((1, 2048), 256, dtype=np.int32)
    features[0, : len(head)] = np.frombuffer(head, np.uint8)
    if tail:
        features[0, -len(tail) :] = np.frombuffer(tail, np.uint8)
    return features


DIGITAL_SIGNATURE = key_usage("digital_signature")


class CertificateMaker:
    """A certificate with its key, that can issue others."""

    def __init__(self, subject: str, certificate: x509.Certificate, key: Any) -> None:
        self.subject = subject
        self.certificate = certificate
        self.key = key

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @classmethod
    def root(cls, subject: str = "Root", **options: Any) -> "CertificateMaker":
        return cls._make(subject, None, ca=True, **options)

    def issue(self, subject: str, *, ca: bool = False, **options: Any) -> "CertificateMaker":
        return self._make(subject, self, ca=ca, **options)

    @classmethod
    def _make(
        cls,
        subject: str,
        issuer: "CertificateMaker | None",
        *,
        ca: bool,
        path_length: int | None = None,
        usages: tuple[x509.ObjectIdentifier, ...] = (ExtendedKeyUsageOID.CODE_SIGNING,),
        key_usage: x509.KeyUsage | None = None,
        start: dt.datetime = EPOCH,
        days: int = 365 * 50,
        key: Any = None,
        basic_constraints: bool = True,
    ) -> "CertificateMaker":
        key = key or new_key()
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)])
        parent = issuer.certificate.subject if issuer else name
        signing_key = issuer.key if issuer else key
        builder = begin_certificate(
            name, parent, key.public_key(), start, start + dt.timedelta(days=days)
        ).add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signing_key.public_key()), critical=False)
        if basic_constraints:
            builder = builder.add_extension(x509.BasicConstraints(ca, path_length if ca else None), critical=True)
        if key_usage is not None:
            builder = builder.add_extension(key_usage, critical=True)
        if not ca and usages:
            builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        return cls(subject, builder.sign(signing_key, hashes.SHA256()), key)
