"""kill -9 at any moment, over and over, for every process of a node; then the books must balance."""

import contextlib
import hashlib
import random  # noqa: TID251 -- seeded below
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Self

import psutil
import pytest

from agent.attest.measurement import parse_entries
from tests.support.chaos import FORGOTTEN_SOCKETS, ChaosNode, Client, prepare_template, running, subreaper, wait_until
from tests.support.models import write_tiny
from tools.demo_node import edgewarden

SEED = 20_261
EARLY_LIVES = 14  # killed somewhere between exec and the first answers
SERVING_LIVES = 10  # killed under load, after their children
CHILD_KILLS_A_LIFE = 9
START_S = 1.8
PCR = 14

pytestmark = [FORGOTTEN_SOCKETS, pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(400)]


class Load:
    """Clients that ask all the time and remember every answer that they were given."""

    def __init__(self, node: ChaosNode, clients: int) -> None:
        self._node = node
        self._stop = threading.Event()
        self.answered: list[str] = []
        self._threads = [threading.Thread(target=self._ask) for _ in range(clients)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask(self) -> None:
        client = Client(self._node, timeout_s=5.0)
        while not self._stop.is_set():
            try:
                reply = client.infer()
            except (OSError, HTTPException):
                time.sleep(0.01)
                continue
            if reply.status == 200:
                assert reply.decision_id
                self.answered.append(reply.decision_id)
            else:
                time.sleep(0.01)
        client.close()


class Changes:
    """Someone who administers the node meanwhile: flips and repairs a model, installs and removes one, changes the policy."""

    def __init__(self, node: ChaosNode, chance: random.Random, bundles: list[bytes], other: Path) -> None:
        self._node = node
        self._chance = chance
        self._bundles = bundles
        self._model = node.store / "tiny" / "1" / "model.onnx"
        self._good = self._model.read_bytes()
        self._other = other
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.activated: set[str] = set()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._replace(self._good)

    def _run(self) -> None:
        steps = [self._flip, self._repair, self._repair, self._install, self._remove, self._activate]
        while not self._stop.is_set():
            # The node may be dying under the call: that is what this is about.
            with contextlib.suppress(OSError, HTTPException):
                self._chance.choice(steps)()
            time.sleep(self._chance.uniform(0, 0.05))

    def _replace(self, content: bytes) -> None:
        fresh = self._model.with_name(".fresh")
        fresh.write_bytes(content)
        fresh.replace(self._model)

    def _flip(self) -> None:
        bad = bytearray(self._good)
        bad[self._chance.randrange(len(bad))] ^= 1
        self._replace(bytes(bad))

    def _repair(self) -> None:
        self._replace(self._good)

    def _install(self) -> None:
        target = self._node.store / "other" / "1"
        if not target.exists():
            shutil.copytree(self._other, self._node.store / ".other")
            target.parent.mkdir(exist_ok=True)
            (self._node.store / ".other").rename(target)

    def _remove(self) -> None:
        shutil.rmtree(self._node.store / "other", ignore_errors=True)

    def _activate(self) -> None:
        status, answer = self._node.local("PUT", "/admin/v1/policy", self._chance.choice(self._bundles))
        if status == 200:
            self.activated.add(str(answer["sha256"]))


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_template(tmp_path_factory.mktemp("template"))


def bundles_of(node: ChaosNode) -> list[bytes]:
    """Return two approved policies; the first stays the configured one."""
    first = (node.root / "policy.tar.gz").read_bytes()
    second = node.build_policy(revision="r2").read_bytes()
    (node.root / "policy.tar.gz").write_bytes(first)
    return [first, second]


def measured(node: ChaosNode) -> Iterator[tuple[str, str]]:
    """Yield kind/name/version/file and digest of everything that was ever handed over."""
    (log,) = (node.root / "state" / "measurements").glob("boot-*.ima")
    for entry in parse_entries(log.read_bytes(), PCR):
        yield entry.path, entry.digest.hex()


def test_a_node_that_is_killed_over_and_over_loses_nothing(template, tmp_path):  # noqa: PLR0915 -- one story, in order
    """After 100 kills and more: answers are on record, the PCR replays, only signed bytes were loaded, nothing is left running."""
    print("seed", SEED)  # noqa: T201 -- a simulation prints its seed
    chance = random.Random(SEED)  # noqa: S311 -- moments of a kill, nothing secret
    kills: Counter[str] = Counter()
    answered: list[str] = []
    activated: set[str] = set()
    with running(template, tmp_path, start=False) as (node, _), subreaper() as no_orphans:
        standing = {child.pid for child in psutil.Process().children()}
        bundles = bundles_of(node)
        other = write_tiny(node.root / "packages" / "other" / "1", name="other", seed=8)
        edgewarden("model", "sign", other, "--key", node.root / "keys" / "models.key")
        lives = ["early"] * EARLY_LIVES + ["serving"] * SERVING_LIVES
        chance.shuffle(lives)
        for life in lives:
            if life == "early":
                node.launch()
                time.sleep(chance.uniform(0.2, START_S))
            else:
                node.start()
                with Load(node, clients=2) as load, Changes(node, chance, bundles, other) as changes:
                    for _ in range(CHILD_KILLS_A_LIFE):
                        time.sleep(chance.uniform(0, 0.3))
                        victims = node.children()
                        if victims:
                            victim = chance.choice(victims)
                            with contextlib.suppress(psutil.NoSuchProcess):
                                kills[victim.name()] += 1
                                victim.kill()
                    time.sleep(chance.uniform(0, 0.3))
                    node.stop(signal.SIGKILL)
                answered += load.answered
                activated |= changes.activated
            assert node.stop(signal.SIGKILL) == (-signal.SIGKILL if life == "early" else 0)
            kills["agent"] += 1
            no_orphans(standing)

        # It starts clean again, and serves what is in the store.
        shutil.rmtree(node.store / "other", ignore_errors=True)
        node.start()
        assert wait_until("served again", lambda: node.models() == {"tiny/1": "loaded"})
        client = Client(node)
        assert client.infer().status == 200
        client.close()
        # Measured state: replays to the PCR, and holds nothing that nobody signed.
        active = (node.root / "state" / "policy" / "policy.tar.gz").read_bytes()
        (other_policy,) = [bundle for bundle in bundles if bundle != active]
        (node.root / "policy.tar.gz").write_bytes(active)
        packages = [node.root / "packages" / name / "1" for name in ("tiny", "other")]
        appraisal = node.appraise(packages, hashlib.sha256(other_policy).hexdigest())
        assert appraisal["status"] in {"affirming", "warning"}, appraisal["checks"]
        signed = {digest for _, digest in signed_files(node)}
        loaded = {digest for path, digest in measured(node) if path.startswith("edgewarden/models/")}
        assert loaded <= signed
        assert {path for path, _ in measured(node) if path.startswith("edgewarden/refused/")}
        assert node.stop() == 0
        no_orphans(standing)
        assert "Traceback" not in node.log.read_text()

        # The audit log: verified, and each answer that a client holds is in it, once.
        recorded = Counter(record["decision_id"] for record in node.records() if record["kind"] == "infer")
        assert len(set(answered)) == len(answered) > SERVING_LIVES
        assert [decision for decision in answered if recorded[decision] != 1] == []
        assert activated <= {digest for path, digest in measured(node) if path.startswith("edgewarden/policy/")}
    print(dict(kills), len(answered), "answers")  # noqa: T201 -- what the seed made of it
    assert kills.total() >= 100
    assert {"agent", "ew-gateway", "ew-zygote", "ew-policy-templ"} <= set(kills)


def signed_files(node: ChaosNode) -> Iterator[tuple[str, str]]:
    from agent.inference.package import read_package  # noqa: PLC0415 -- after the environment of onnxruntime is set

    for name in ("tiny", "other"):
        package = read_package(node.root / "packages" / name / "1")
        yield from package.digests().items()
        package.close()
