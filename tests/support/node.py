"""A whole node for tests: prepared once in each test process, started as an operator starts it, with a software TPM of its own.

``node_home`` (session) holds keys, signed packages and a signed policy; :func:`start_node` copies it, so that a test may break what it likes.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml
from onnx import TensorProto, helper

from agent.audit.reader import tail
from agent.policy.build import build, sign
from tests.support.models import sign_directory, write_tiny
from tools.demo_node import ROOT, DemoNode, SoftwareTpm
from tools.example_models import write_magika, write_orientation, write_package
from tools.pki import Authority

__all__ = [
    "MIXED_OUTPUTS",
    "Reply",
    "bearer",
    "binary_body",
    "build_policy",
    "call",
    "connection",
    "infer",
    "kill",
    "node_home",
    "processes",
    "records",
    "running_node",
    "sign_and_place",
    "start_node",
    "tls_context",
    "until",
    "write_mixed",
]

WAIT_S = 30.0  # for something that must happen; no test measures time
_ROOMY = {"evaluation_deadline_ms": 2_000, "total_deadline_ms": 10_000}  # the machine is busy with other tests
MIXED_OUTPUTS = ("doubled", "negated", "echo")


# --- preparation


def _key(home: Path, name: str) -> Any:
    from cryptography.hazmat.primitives import serialization  # noqa: PLC0415 -- a helper of one function

    return serialization.load_pem_private_key((home / "keys" / f"{name}.key").read_bytes(), None)


def write_mixed(directory: Path, *, version: str = "1") -> Path:
    """Write a model with several inputs and outputs, dynamic shapes and text: ``doubled = 2 a``, ``negated = -b``, ``echo = text``."""
    two = helper.make_tensor("two", TensorProto.FLOAT, [], [2.0])
    graph = helper.make_graph(
        [
            helper.make_node("Mul", ["a", "two"], ["doubled"]),
            helper.make_node("Neg", ["b"], ["negated"]),
            helper.make_node("Identity", ["text"], ["echo"]),
        ],
        "mixed",
        [
            helper.make_tensor_value_info("a", TensorProto.FLOAT, ["n", "m"]),
            helper.make_tensor_value_info("b", TensorProto.INT64, ["n"]),
            helper.make_tensor_value_info("text", TensorProto.STRING, ["n"]),
        ],
        [
            helper.make_tensor_value_info("doubled", TensorProto.FLOAT, ["n", "m"]),
            helper.make_tensor_value_info("negated", TensorProto.INT64, ["n"]),
            helper.make_tensor_value_info("echo", TensorProto.STRING, ["n"]),
        ],
        [two],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    manifest = {
        "name": "mixed",
        "version": version,
        "inputs": [
            {"name": "a", "datatype": "FP32", "shape": [-1, -1]},
            {"name": "b", "datatype": "INT64", "shape": [-1]},
            {"name": "text", "datatype": "BYTES", "shape": [-1]},
        ],
        "outputs": [
            {"name": "doubled", "datatype": "FP32", "shape": [-1, -1]},
            {"name": "negated", "datatype": "INT64", "shape": [-1]},
            {"name": "echo", "datatype": "BYTES", "shape": [-1]},
        ],
        "modality": {"kind": "tensor"},
    }
    write_package(directory, model.SerializeToString(), manifest, [])
    return directory


def sign_and_place(node: DemoNode, package: Path, *, key: str = "models") -> Path:
    """Sign a package and put it into the store at once, as an installation does; returns where it lies."""
    signed = sign_directory(package, _key(node.root, key))
    name, version = (yaml.safe_load((signed / "model.yaml").read_text())[field] for field in ("name", "version"))
    target: Path = node.store / name / version
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = target.parent / f".{version}.staged"
    shutil.copytree(signed, staged)
    if target.exists():
        shutil.rmtree(target)
    staged.rename(target)
    return target


def build_policy(
    node: DemoNode,
    revision: str,
    data: Mapping[str, Mapping[str, Any]] | None = None,
    rego: Mapping[str, str] | None = None,
) -> bytes:
    """Build and sign the shipped policy with changes: ``data[area]`` is merged over an area, ``rego[path]`` replaces or adds a file."""
    work = node.root / f"policy-{revision}"
    shutil.copytree(ROOT / "rego", work / "rego", ignore=shutil.ignore_patterns("*_test.rego"))
    shutil.copytree(ROOT / "policies", work / "policies")
    for area, changes in (data or {}).items():
        path = work / "policies" / area / "data.yaml"
        path.write_text(yaml.safe_dump(_merged(yaml.safe_load(path.read_text()), changes)))
    for name, text in (rego or {}).items():
        (work / "rego" / name).parent.mkdir(parents=True, exist_ok=True)
        (work / "rego" / name).write_text(text)
    key = (node.root / "keys" / "policy.key").read_bytes()
    return sign(build(work / "rego", work / "policies", revision), key)


def _merged(base: Any, changes: Mapping[str, Any]) -> Any:
    merged = dict(base)
    for name, value in changes.items():
        known = merged.get(name)
        merged[name] = _merged(known, value) if isinstance(value, Mapping) and isinstance(known, dict) else value
    return merged


@pytest.fixture(scope="session")
def node_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that a node needs before its first start."""
    node = DemoNode(tmp_path_factory.mktemp("home"), "")
    node.prepare()
    authority = Authority.open(node.root / "pki")
    authority.client("bob", ("operator",))
    authority.client("ana", ("analyst",))
    Authority.create(node.root / "stranger-pki", "Another CA").client("mallory", ("operator", "admin"))
    drafts = node.root / "packages"
    for package in (
        write_orientation(drafts / "orientation" / "1.0.0"),
        write_magika(drafts / "magika" / "3.3.0"),
        write_tiny(drafts / "tiny" / "1", external=True),
        write_mixed(drafts / "mixed" / "1"),
    ):
        sign_and_place(node, package)
    (node.root / "policy.tar.gz").write_bytes(build_policy(node, "r1"))
    return node.root


# --- starting


@contextlib.contextmanager
def start_node(
    home: Path,
    root: Path,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    prepare: Callable[[DemoNode], None] | None = None,
    models: tuple[str, ...] | None = None,
    manufactured: bool = False,
) -> Iterator[DemoNode]:
    """Start a node of its own below ``root`` and stop it at the end.

    Args:
        home: ``node_home``.
        root: does not exist yet.
        overrides: sections of the configuration.
        prepare: changes what was copied, before the start.
        models: which packages the store holds; None for all.
        manufactured: whether its TPM has endorsement certificates; their CA then lies in ``root / "vendor"``.
    """
    shutil.copytree(home, root)
    tpm = SoftwareTpm(root / "tpm", vendor=root / "vendor" if manufactured else None)
    tpm.start()
    chosen = dict(overrides or {})
    node = DemoNode(root, tpm.tcti, {**chosen, "policy": {**_ROOMY, **chosen.get("policy", {})}})
    try:
        if models is not None:
            for directory in node.store.iterdir():
                if directory.name not in models:
                    shutil.rmtree(directory)
        node.configure()
        if prepare:
            prepare(node)
        node.start()
        yield node
    finally:
        node.stop()
        tpm.stop()


@pytest.fixture(scope="module")
def running_node(node_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DemoNode]:
    """One running node for a module; its tests leave it as it was."""
    with start_node(node_home, tmp_path_factory.mktemp("node") / "n") as node:
        yield node


# --- asking


@dataclass(frozen=True, slots=True)
class Reply:
    """What a client gets."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body's JSON part."""
        length = self.headers.get("Inference-Header-Content-Length")
        return json.loads(self.body[: int(length)] if length else self.body)

    @property
    def error(self) -> str:
        """The protocol's error text; it is the only member."""
        (text,) = self.json.values()
        assert set(self.json) == {"error"}
        assert isinstance(text, str)
        return text

    def outputs(self) -> dict[str, Any]:
        """The answer's tensors as arrays."""
        at = int(self.headers.get("Inference-Header-Content-Length", 0))
        found: dict[str, Any] = {}
        for output in self.json["outputs"]:
            size = output.get("parameters", {}).get("binary_data_size")
            if size is None:
                found[output["name"]] = np.array(output["data"]).reshape(output["shape"])
                continue
            dtype = {"FP32": "<f4", "INT64": "<i8"}[output["datatype"]]
            found[output["name"]] = np.frombuffer(self.body[at : at + size], dtype).reshape(output["shape"])
            at += size
        return found


def tls_context(node: DemoNode, who: str | None = "alice") -> ssl.SSLContext:
    """Return a client's TLS, with the certificate of ``who``."""
    files = node.client_files(who or "alice")
    context = ssl.create_default_context(cafile=str(node.root / "pki" / "ca.pem"))
    if who is not None:
        context.load_cert_chain(files["cert"], files["key"])
    return context


def connection(node: DemoNode, who: str | None = "alice") -> http.client.HTTPSConnection:
    """Return a connection that is not open yet."""
    return http.client.HTTPSConnection("127.0.0.1", node.port, timeout=WAIT_S, context=tls_context(node, who))


def call(
    node: DemoNode,
    method: str,
    path: str,
    body: Any = None,
    headers: Mapping[str, str] | None = None,
    *,
    who: str | None = "alice",
) -> Reply:
    """Send one request on a connection of its own; a body that is no bytes is JSON."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    client = connection(node, who)
    try:
        client.request(method, path, data, dict(headers or {}))
        response = client.getresponse()
        return Reply(response.status, dict(response.headers), response.read())
    finally:
        client.close()


def infer(
    node: DemoNode,
    model: str,
    inputs: list[dict[str, Any]],
    *,
    who: str | None = "alice",
    headers: Mapping[str, str] | None = None,
    **members: Any,
) -> Reply:
    """Ask a model with JSON tensors."""
    body = {"inputs": inputs, **members}
    return call(node, "POST", f"/v2/models/{model}/infer", body, headers, who=who)


def binary_body(inputs: Mapping[str, Any], **members: Any) -> tuple[bytes, dict[str, str]]:
    """Encode tensors (arrays, or lists of bytes) by the binary extension; returns body and headers."""
    described, parts = [], []
    for name, value in inputs.items():
        if isinstance(value, list):
            data = b"".join(len(element).to_bytes(4, "little") + element for element in value)
            datatype, shape = "BYTES", [len(value)]
        else:
            data, shape = value.tobytes(), list(value.shape)
            datatype = {"float32": "FP32", "int32": "INT32", "int64": "INT64"}[value.dtype.name]
        described.append(
            {"name": name, "datatype": datatype, "shape": shape, "parameters": {"binary_data_size": len(data)}}
        )
        parts.append(data)
    header = json.dumps({"inputs": described, **members}).encode()
    length = {"Inference-Header-Content-Length": str(len(header)), "Content-Type": "application/octet-stream"}
    return b"".join([header, *parts]), length


def bearer(token: str) -> dict[str, str]:
    """Return the header that carries a token."""
    return {"Authorization": f"Bearer {token}"}


# --- looking


def records(node: DemoNode, count: int = 1000, **fields: Any) -> list[dict[str, Any]]:
    """Return the newest records of the audit log that have these fields, oldest first."""
    found = [json.loads(record) for record in tail(node.root / "state" / "audit", count)]
    return [record for record in found if all(record.get(name) == value for name, value in fields.items())]


def until(what: Callable[[], Any]) -> Any:
    """Wait until something holds and return it."""
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        if found := what():
            return found
        time.sleep(0.02)
    raise AssertionError("it did not come to pass")


def processes(node: DemoNode, name: str = "") -> dict[int, str]:
    """Return the agent's descendants, pid to name, those whose name begins so."""
    assert node.process is not None
    found: dict[int, str] = {}
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(node.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if child.name().startswith(name) and child.status() != psutil.STATUS_ZOMBIE:
                    found[child.pid] = child.name()
    return found


def kill(node: DemoNode, pid: int) -> None:
    """Kill one process of a node, and nothing else."""
    assert pid in processes(node)
    os.kill(pid, signal.SIGKILL)
