"""Bundles, keys, archives and a worker thread for tests of policy."""

import asyncio
import functools
import gzip
import io
import json
import socket
import tarfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from agent.errors import IsolationError, PolicyError
from agent.isolation.channel import Channel, channel_pair
from agent.policy.build import archive
from agent.policy.bundle import Bundle
from agent.policy.messages import Endpoint, Stamp, stamp_memory
from agent.policy.worker import serve

ROOT = Path(__file__).parents[2]
OPA = ROOT / ".cache/bin/opa"

# One policy that does, by its input's action, all that a policy must not be able to harm the node with.
HOSTILE = """package edgewarden.authz

decision := {"allow": true} if input.action == "infer"
decision := {"allow": false, "reasons": ["not today"]} if input.action == "open"
decision := {"allow": "yes"} if input.action == "wrong type"
decision := {"allow": true, "surprise": 1} if input.action == "unknown field"
decision := {"allow": true} if { input.action == "builtin error"; not blocked }
blocked if net.cidr_contains("no network", input.request.source_ip)
decision := {"allow": count(long(0)) > 0} if input.action == "loop"
long(n) := [1 | some a in numbers.range(1, 20000); some b in numbers.range(1, 20000); a * b == n]
decision := {"allow": true, "reasons": many} if input.action == "giant output"
many := [sprintf("reason number %d", [i]) | some i in numbers.range(1, 20000)]
"""
RECURSION = """
decision := {"allow": deep(1) == 0} if input.action == "recursion"
deep(n) := deep(n + 1)
"""
MEMORY = """
decision := {"allow": count(numbers.range(1, 2000000000)) > 0} if input.action == "memory"
"""
SAMPLES = {"infer": {"action": "infer"}}


async def until(condition: Callable[[], object]) -> None:
    """Wait for something that another process does; the test's own time limit bounds it."""
    while not condition():  # noqa: ASYNC110 -- another process sets no event of this loop
        await asyncio.sleep(0.01)


def document(action: str) -> dict[str, object]:
    """Return an input that triggers one rule of :data:`HOSTILE`."""
    return {"action": action, "request": {"source_ip": "127.0.0.1"}}


def bundle(*modules: str, data: object = None, manifest: Mapping[str, object] | None = None, **files: bytes) -> bytes:
    """Return a bundle of these modules."""
    manifest = {"revision": "test", "roots": ["edgewarden", "other", "roles"]} if manifest is None else manifest
    content = {f"rego/m{number}.rego": module.encode() for number, module in enumerate(modules)}
    content[".manifest"] = json.dumps(manifest).encode()
    if data is not None:
        content["data.json"] = json.dumps(data).encode()
    return archive({**content, **files})


def loaded(*modules: str, **more) -> Bundle:
    """Return the same, read."""
    return Bundle.from_bytes(bundle(*modules, **more))


def tar(*members: tuple[tarfile.TarInfo | str, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    """Return a ``.tar.gz`` of exactly these members, however wrong they are."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=form) as packed:
        for member, content in members:
            info = tarfile.TarInfo(member) if isinstance(member, str) else member
            if info.type in (tarfile.REGTYPE, tarfile.AREGTYPE):
                info.size = len(content)
            packed.addfile(info, io.BytesIO(content))
    return gzip.compress(raw.getvalue(), mtime=0)


@functools.cache
def keypair(which: int = 0) -> tuple[bytes, bytes]:
    """Return (private, public) PEM of an EC P-256 key; ``which`` tells keys apart."""
    key = ec.derive_private_key(0xED6E + which, ec.SECP256R1())
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return private, key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)


class Script:
    """An engine that does what the input says; ``release`` ends the evaluations that hang."""

    request_reads: tuple[str, ...] | None = None

    def __init__(self) -> None:
        self.seen: list[dict[str, object]] = []
        self.release = threading.Event()
        self.resume = threading.Event()

    def evaluate(self, input_json: bytes) -> bytes:
        value = json.loads(input_json)
        self.seen.append(value)
        value = value.get("request", value)
        match value.get("do"):
            case "hang":
                self.release.wait(30)
            case "die":
                raise SystemExit
            case "pause":
                self.resume.wait(30)
            case "swell":
                return json.dumps({"allow": True, "reasons": ["x" * 20_000]}).encode()
            case "fail":
                raise PolicyError("it failed")
            case _:
                pass
        return json.dumps(value.get("answer", {"allow": True})).encode()

    def check(self) -> None:
        """Nothing hides."""


class WorkerThread:
    """A real worker's loop over a real channel, in a thread, so that tests see inside it."""

    _number = 100

    def __init__(
        self,
        engine: Script | None = None,
        sha256: str = "a" * 64,
        revision: str = "r1",
        request_reads: tuple[str, ...] | None = None,
    ) -> None:
        self.engine = engine or Script()
        ours, self._theirs = channel_pair()
        stamp_fd = stamp_memory()
        self.stamp = Stamp(stamp_fd, write=True)
        WorkerThread._number += 1
        self.number = WorkerThread._number
        self.endpoint = Endpoint(self.number, ours, stamp_fd, sha256, revision, request_reads)
        self._thread = threading.Thread(target=self._run)

    def start(self) -> Endpoint:
        """Run it and return what its asker gets."""
        self._thread.start()
        return self.endpoint

    def _run(self) -> None:
        try:
            serve(self.engine, Channel(self._theirs), self.stamp)
        except (SystemExit, IsolationError):
            return  # as a process that ends
        finally:
            self._theirs.close()

    def send_raw(self, frame: bytes) -> None:
        """Say something as the worker that the worker would not say."""
        Channel(self._theirs).send(frame)

    def kill(self) -> None:
        """Close its socket, as the kernel does for a dead process."""
        self._theirs.shutdown(socket.SHUT_RDWR)

    def join(self) -> None:
        """Wait for its end."""
        self.engine.release.set()
        if self._thread.ident is not None:
            self._thread.join(30)
        else:
            self._theirs.close()
