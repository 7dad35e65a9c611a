"""A narrated tour of a node: ``make demo``. Every step shows the real command and its real answer; ``make run`` keeps the node serving."""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

from PIL import Image

from tools.demo_controller import DemoController
from tools.demo_node import ROOT, DemoNode, SoftwareTpm

HOME = ROOT / ".cache" / "demo"
ASSETS = ROOT / ".cache" / "assets"
PAGE = ASSETS / "skimage" / "data" / "page.png"
REACTION_S = 30.0
LOOP = """package edgewarden.authz

# Looks through a million million pairs before it says anything.
decision := {"allow": count([1 | some x in row; some y in row; x * y < 0]) > 0, "reasons": []}

row := numbers.range(1, 1000000)
"""
_failures: list[str] = []


def title(text: str) -> None:
    """Begin a chapter of the tour."""
    print(f"\n\033[1m== {text}\033[0m" if sys.stdout.isatty() else f"\n== {text}", flush=True)


def say(text: str) -> None:
    """Narrate."""
    print(textwrap.fill(text, 110, initial_indent="   ", subsequent_indent="   "), flush=True)


def show(
    command: list[str], *, expect: int | None = 0, lines: int = 14, width: int = 150
) -> subprocess.CompletedProcess[str]:
    """Run a command as it would be typed, and print what it answers; another exit status than expected fails the tour."""
    typed = " ".join(part.replace(str(ROOT) + "/", "") for part in command)
    print(f"   $ {typed}", flush=True)
    if command[0] == "edgewarden":
        command = [sys.executable, "-m", "agent.cli", *command[1:]]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, stdin=subprocess.DEVNULL)
    output = (done.stdout + done.stderr).replace(str(ROOT) + "/", "").splitlines()
    for line in output[:lines]:
        print(f"     {line[:width]}", flush=True)
    if len(output) > lines:
        print(f"     … {len(output) - lines} more lines", flush=True)
    if expect is not None and done.returncode != expect:
        _failures.append(f"{typed}: exit status {done.returncode}, expected {expect}")
    return done


def curl(node: DemoNode, who: str | None, path: str, *options: str, status: int) -> None:
    """Call the inference API with curl as a client would."""
    files = node.client_files(who) if who else node.client_files("alice")
    identity = ["--cert", files["cert"], "--key", files["key"]] if who else []
    command = ["curl", "-sS", "-D", "-", "--cacert", files["ca"], *identity, *options, node.url(path)]
    done = show(command, expect=None, lines=12, width=320)
    seen = done.stdout.split(" ", 2)[1] if done.stdout.startswith("HTTP/") else "no answer"
    wanted = str(status) if status else "no answer"
    if seen != wanted:
        _failures.append(f"{path}: {seen}, expected {wanted}")


def wait_for(node: DemoNode, what: str, holds: Any) -> None:  # noqa: ANN401 -- a predicate over the status
    """Wait until the node's status is as expected."""
    deadline = time.monotonic() + REACTION_S
    begin = time.monotonic()
    while time.monotonic() < deadline:
        if holds(node.local("GET", "/admin/v1/status")[1]):
            say(f"{what} after {time.monotonic() - begin:.2f} s")
            return
        time.sleep(0.02)
    _failures.append(f"{what}: not within {REACTION_S:.0f} s")


def page_request(node: DemoNode) -> tuple[Path, int]:
    """Write a request with a real document page, turned by 90 degrees, as JPEG; returns the file and its header's length."""
    picture = io.BytesIO()
    Image.open(PAGE).convert("RGB").rotate(90, expand=True).save(picture, "JPEG", quality=92)
    jpeg = picture.getvalue()
    header = json.dumps(
        {
            "inputs": [
                {
                    "name": "x",
                    "datatype": "BYTES",
                    "shape": [1],
                    "parameters": {"binary_data_size": len(jpeg) + 4},
                }
            ]
        }
    ).encode()
    path = node.root / "page.request"
    path.write_bytes(header + len(jpeg).to_bytes(4, "little") + jpeg)
    return path, len(header)


def state_of(status: dict[str, Any], name: str) -> str:
    """Return the state of a model in a status document."""
    return next((model["state"] for model in status["models"] if model["name"] == name), "absent")


def prepare(node: DemoNode) -> None:
    """Chapter 1."""
    title("1. Sign and install two real model packages, build and sign the policy")
    say("A document-orientation classifier (image) and a file-type classifier (bytes), both out of wheels on PyPI.")
    keys = node.root / "keys"
    for package in node.write_packages():
        show(["edgewarden", "model", "sign", str(package), "--key", str(keys / "models.key")])
        show(
            [
                *("edgewarden", "model", "install", str(package)),
                *("--store", str(node.store), "--trust", str(keys / "models.pub")),
            ]
        )
    bundle = str(node.root / "policy.tar.gz")
    show(["edgewarden", "policy", "build", "rego", "policies", "--revision", "r1", "--output", bundle])
    show(["edgewarden", "policy", "sign", bundle, "--key", str(keys / "policy.key")])


def start(node: DemoNode) -> None:
    """Chapter 2."""
    title("2. Start the node: measure, verify, inspect, authorize, load")
    print(f"   $ edgewarden run --config {node.config.relative_to(ROOT)}", flush=True)
    node.start()
    for event in node.events():
        if event.get("event") in {"policy_activated", "model_loaded", "serving"}:
            facts = {
                key: event[key] for key in ("revision", "model", "version", "digest", "address", "port") if key in event
            }
            print(f"     {event['event']}: {facts}", flush=True)


def infer(node: DemoNode) -> None:
    """Chapter 3."""
    title("3. Infer as alice (role operator) on a scanned page that lies on its side")
    request, length = page_request(node)
    curl(
        node,
        "alice",
        "/v2/models/orientation/infer",
        *("-H", "Content-Type: application/octet-stream", "-H", f"Inference-Header-Content-Length: {length}"),
        *("--data-binary", f"@{request}"),
        status=200,
    )
    say(
        "The four scores are for 0, 90, 180 and 270 degrees. Server-Timing is the latency split in milliseconds; the decision id stands in the audit log."
    )


def refusals(node: DemoNode) -> None:
    """Chapter 4."""
    title("4. Be refused, five ways")
    request = node.root / "magika.json"
    body = {"inputs": [{"name": "bytes", "datatype": "INT32", "shape": [1, 2048], "data": [256] * 2048}]}
    request.write_text(json.dumps(body))
    options = ("-H", "Content-Type: application/json", "-d", f"@{request}")
    say("a) without a certificate: TLS ends it")
    curl(node, None, "/v2/models/magika/infer", *options, status=0)
    say("b) eve has a certificate, and a role that may not")
    curl(node, "eve", "/v2/models/magika/infer", *options, status=403)
    say("c) a package that a stranger signed")
    stranger = node.root / "packages" / "stranger" / "1.0.0"
    shutil.copytree(node.root / "packages" / "magika" / "3.3.0", stranger)
    manifest = (stranger / "model.yaml").read_text().replace("magika", "stranger").replace("3.3.0", "1.0.0")
    (stranger / "model.yaml").write_text(manifest)
    keys = node.root / "keys"
    show(["edgewarden", "model", "sign", str(stranger), "--key", str(keys / "stranger.key")])
    install = ["edgewarden", "model", "install", str(stranger), "--store", str(node.store)]
    show([*install, "--trust", str(keys / "models.pub")], expect=1)
    say("   …and when it is copied past the installer, the node refuses it by itself:")
    shutil.copytree(stranger, node.store / "stranger" / "1.0.0")
    wait_for(node, "refused", lambda status: state_of(status, "stranger") == "refused")
    shutil.rmtree(node.store / "stranger")
    say("d) one byte of an installed model flips while the node runs")
    target = node.store / "magika" / "3.3.0" / "model.onnx"
    content = bytearray(target.read_bytes())
    content[len(content) // 2] ^= 1
    target.write_bytes(content)
    wait_for(node, "unloaded and measured as refused", lambda status: state_of(status, "magika") == "refused")
    curl(node, "alice", "/v2/models/magika/infer", *options, status=404)
    say("e) a policy that loops for ever")
    rego = node.root / "loop"
    shutil.copytree(ROOT / "rego", rego, ignore=shutil.ignore_patterns("authz.rego", "*_test.rego"))
    (rego / "edgewarden" / "authz.rego").write_text(LOOP)
    bundle = str(node.root / "loop.tar.gz")
    show(["edgewarden", "policy", "build", str(rego), "policies", "--revision", "loop", "--output", bundle])
    show(["edgewarden", "policy", "sign", bundle, "--key", str(keys / "policy.key")], lines=0)
    admin = str(node.root / "run" / "admin.sock")
    show(["edgewarden", "policy", "activate", bundle, "--socket", admin], expect=1)
    show(["edgewarden", "policy", "show", "--socket", admin])


def attest(node: DemoNode) -> None:
    """Chapter 5."""
    title("5. Prove it from outside: Evidence for a fresh nonce, appraised offline")
    reference = node.root / "reference.json"
    packages = [str(node.root / "packages" / name) for name in ("orientation/1.0.0", "magika/3.3.0")]
    show(
        [
            *("edgewarden", "attest", "reference", "--config", str(node.config)),
            *("--policy", str(node.root / "policy.tar.gz"), "--out", str(reference)),
            *(part for package in packages for part in ("--package", package)),
        ]
    )
    say("The flipped byte is in the log of the TPM; the appraisal finds it:")
    appraise(node, reference)
    say("Repair the model, and appraise again:")
    shutil.copyfile(Path(packages[1]) / "model.onnx", node.store / "magika" / "3.3.0" / "model.onnx")
    wait_for(node, "verified, measured and loaded again", lambda status: state_of(status, "magika") == "loaded")
    appraise(node, reference)


def appraise(node: DemoNode, reference: Path) -> None:
    """Fetch Evidence and appraise it."""
    evidence, ak = node.root / "evidence.json", node.root / "ak.tpmt"
    nonce = os.urandom(32).hex()
    show(
        [
            *("edgewarden", "attest", "evidence", "--socket", str(node.root / "run" / "admin.sock")),
            *("--nonce", nonce, "--out", str(evidence), "--ak-out", str(ak)),
        ]
    )
    verify = ["edgewarden", "attest", "verify", "--evidence", str(evidence), "--nonce", nonce]
    show([*verify, "--ak", str(ak), "--reference", str(reference)], expect=None, lines=40)


def log(node: DemoNode) -> None:
    """Chapter 7."""
    title("7. The audit log")
    directory = str(node.root / "state" / "audit")
    show(["edgewarden", "log", "tail", directory, "-n", "8"])
    show(["edgewarden", "log", "verify", directory])


def fleet(node: DemoNode) -> None:
    """Chapter 6."""
    title("6. Join a controller: enrolment, trust, and what follows from it")
    if not (node.root / "vendor").exists():
        say("Left out with a real TPM: the controller of this tour trusts the software TPM's vendor alone.")
        return
    controller = DemoController(node.root / "controller", node.root / "vendor")
    controller.prepare()
    controller.start()
    try:
        joined(node, controller)
    finally:
        controller.stop()


def joined(node: DemoNode, controller: DemoController) -> None:
    """The chapter, with the controller running."""
    admin = ["--admin", str(controller.admin)]
    agent = ["--socket", str(node.root / "run" / "admin.sock")]
    packages = [word for path in sorted(node.store.glob("*/*")) for word in ("--package", str(path))]
    say("An approver hands over what may run; each thing is verified and digested, not copied as a number:")
    policy = ["--policy", str(node.root / "policy.tar.gz")]
    show(["edgewarden", "reference", "approve", "--config", str(node.config), *policy, *packages, *admin])
    say("A join token serves once, and pins the controller's key. The TPM proves itself by its vendor's certificate:")
    token = show(["edgewarden", "token", "create", *admin, "--json"], lines=0)
    path = node.root / "join.token"
    path.touch(mode=0o600)
    path.write_text(json.loads(token.stdout)["token"])
    show(["edgewarden", "attest", "enrol", "--token-file", str(path), "--mode", "push", *agent])
    show(["edgewarden", "node", "list", *admin])
    say("Tamper with a model; the result names the entry:")
    model = node.store / "magika" / "3.3.0" / "model.onnx"
    whole = model.read_bytes()
    model.write_bytes(whole[:1000] + bytes([whole[1000] ^ 1]) + whole[1001:])
    expect_result(controller, "warning")
    show(["edgewarden", "node", "show", "edge-0001", "--history", "0", *admin], lines=30)
    say("Repair it:")
    model.write_bytes(whole)
    expect_result(controller, "affirming")
    say(
        "Withdraw a version that is loaded. The node loses its trust, drops its models, and does not load this one again:"
    )
    show(["edgewarden", "reference", "withdraw", "model", "magika/3.3.0", "-m", "found to be poisoned", *admin])
    wait_for(node, "dropped", lambda status: state_of(status, "magika") != "loaded")
    expect_result(controller, "affirming")
    show(["edgewarden", "node", "show", "edge-0001", *admin], lines=30)


def expect_result(controller: DemoController, status: str) -> None:
    """Wait until the controller thinks so of the node."""
    command = [
        sys.executable,
        "-m",
        "agent.cli",
        "node",
        "show",
        "edge-0001",
        "--json",
        "--admin",
        str(controller.admin),
    ]
    begin = time.monotonic()
    while time.monotonic() < begin + REACTION_S:
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
        if json.loads(done.stdout)["status"] == status:
            say(f"{status} after {time.monotonic() - begin:.1f} s")
            return
    _failures.append(f"the controller's result is not {status} within {REACTION_S:.0f} s")


def tour(node: DemoNode) -> None:
    """All chapters, in order."""
    for chapter in (prepare, start, infer, refusals, attest, fleet, log):
        chapter(node)


def serve(node: DemoNode) -> None:
    """Start the node in the foreground and say how to reach it."""
    prepare(node)
    start(node)
    alice = node.client_files("alice")
    title("The node serves until you press Ctrl-C")
    print(f"   curl --cacert {alice['ca']} --cert {alice['cert']} --key {alice['key']} {node.url('/v2')}")
    print(f"   curl --unix-socket {node.root / 'run' / 'health.sock'} http://localhost/health", flush=True)
    if node.process is not None:
        node.process.wait()


def main() -> int:
    """Run the tour or the node."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", action="store_true", help="start the node and keep serving")
    parser.add_argument("--tpm", default="", help="TCTI of a real TPM; default: a software TPM of its own")
    parser.add_argument("--yes", action="store_true", help="with --tpm: extend its PCR without asking")
    arguments = parser.parse_args()
    shutil.rmtree(HOME, ignore_errors=True)
    HOME.mkdir(parents=True)
    software = None
    if arguments.tpm:
        confirm(arguments.tpm, yes=arguments.yes)
        tcti = arguments.tpm
    else:
        software = SoftwareTpm(HOME / "tpm", vendor=HOME / "vendor")
        software.start()
        tcti = software.tcti
    node = DemoNode(HOME, tcti)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        node.prepare()
        (serve if arguments.serve else tour)(node)
    except KeyboardInterrupt:
        print()
    finally:
        node.stop()
        if software:
            software.stop()
    for failure in _failures:
        print(f"NOT AS EXPECTED: {failure}")
    if not arguments.serve:
        print(f"\nEverything of this tour lies below {HOME.relative_to(ROOT)}.")
    return 1 if _failures else 0


def confirm(tcti: str, *, yes: bool) -> None:
    """Ask before a real TPM is extended: what is extended can't be taken back before the next reboot."""
    print(f"This extends PCR 14 of the TPM at {tcti!r} with the demo's measurements; only a reboot resets it.")
    if not yes and (not sys.stdin.isatty() or input("Type 'extend PCR 14' to go on: ") != "extend PCR 14"):
        sys.exit("nothing was extended")


if __name__ == "__main__":
    sys.exit(main())
