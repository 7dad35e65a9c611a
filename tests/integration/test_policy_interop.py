"""Bundles and signatures, both ways with the real OPA."""

import gzip
import io
import json
import subprocess
import tarfile

import pytest

from agent.errors import VerificationError
from agent.policy.build import archive, build, sign
from agent.policy.bundle import Bundle, read_archive
from tests.support.policy import HOSTILE, OPA, ROOT, bundle, keypair

pytestmark = pytest.mark.integration
PRIVATE, PUBLIC = keypair()
# Text, numbers and nesting that encoders write in different ways.
ODD = {
    "roles": {
        "text": 'é<&>\u2028\u2029\x7f\x00\b\f"\\/ \U0001f512',
        "number": [1.0, 1e-7, 12345678901234567890, -0.0, 1e21, 0.1],
        "é": {"z": None, "a": [True, [], {}]},
        "\U0001f512": 1,
        "\uffee": 2,
    }
}


def opa(*arguments: str, cwd=None) -> str:
    done = subprocess.run([str(OPA), *arguments], capture_output=True, text=True, check=False, cwd=cwd, timeout=60)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


@pytest.fixture
def keys(tmp_path):
    (tmp_path / "key.pem").write_bytes(PRIVATE)
    (tmp_path / "pub.pem").write_bytes(PUBLIC)
    return tmp_path


def folder(path, data: bytes):
    for name, content in read_archive(data).items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def test_opa_reads_what_we_build(tmp_path):
    """``opa eval -b`` takes the shipped bundle and decides by it."""
    (tmp_path / "bundle.tar.gz").write_bytes(build(ROOT / "rego", ROOT / "policies", "r7"))
    decision = json.loads(
        opa("eval", "-b", str(tmp_path / "bundle.tar.gz"), "-f", "values", "data.edgewarden.authz.decision")
    )
    assert decision[0]["allow"] is False
    shown = opa("inspect", str(tmp_path / "bundle.tar.gz"), "-f", "json")
    assert json.loads(shown)["manifest"]["revision"] == "r7"


def test_opa_verifies_what_we_sign(keys):
    """``opa build --verification-key`` accepts our signature over odd text and numbers, and refuses a changed file."""
    signed = sign(bundle(HOSTILE, data=ODD), PRIVATE, "default")
    (keys / "b.tar.gz").write_bytes(signed)
    verify = ("--verification-key", str(keys / "pub.pem"), "--signing-alg", "ES256", "-o", str(keys / "out.tar.gz"))
    opa("build", "-b", str(keys / "b.tar.gz"), *verify)
    files = read_archive(signed)
    (keys / "b.tar.gz").write_bytes(archive({**files, "rego/m0.rego": files["rego/m0.rego"] + b"\n"}))
    with pytest.raises(AssertionError, match="digest mismatch"):
        opa("build", "-b", str(keys / "b.tar.gz"), *verify)


def test_we_verify_what_opa_signs(keys):
    """``opa sign`` over our folder, ``.signatures.json`` added, verifies; with a byte changed it does not."""
    work = keys / "bundle"
    work.mkdir()
    folder(work, bundle(HOSTILE, data=ODD))
    (work / "notes.txt").write_text("any file counts")
    opa("sign", "--signing-alg", "ES256", "--signing-key", str(keys / "key.pem"), "-b", ".", "-o", ".", cwd=work)
    files = {path.relative_to(work).as_posix(): path.read_bytes() for path in work.rglob("*") if path.is_file()}
    assert Bundle.from_bytes(archive(files), [PUBLIC]).data == json.loads(json.dumps(ODD))
    for name in ("notes.txt", "rego/m0.rego", "data.json"):
        changed = {**files, name: files[name].replace(b"a", b"b", 1)}
        with pytest.raises(VerificationError, match="bundle-signature"):
            Bundle.from_bytes(archive(changed), [PUBLIC])
    assert files["data.json"] != files["data.json"].replace(b"a", b"b", 1)


def test_we_take_what_opa_builds_and_signs(keys):
    """``opa build --signing-key`` makes a bundle, with absolute names and merged data, that loads and verifies."""
    work = keys / "bundle"
    work.mkdir()
    folder(work, bundle(HOSTILE, data={"roles": {"ml": ["infer"]}}))
    opa("build", "-b", ".", "-r", "from-opa", "--signing-alg", "ES256", "--signing-key", str(keys / "key.pem"),
        "-o", str(keys / "built.tar.gz"), cwd=work)  # fmt: skip
    read = Bundle.from_bytes((keys / "built.tar.gz").read_bytes(), [PUBLIC])
    assert (read.revision, read.data) == ("from-opa", {"roles": {"ml": ["infer"]}})
    assert next(iter(read.modules.values())).startswith("package edgewarden.authz")


def test_a_bundle_signed_by_opa_with_another_algorithm_is_refused(keys):
    """HMAC with a shared secret is OPA's to offer and not ours to take."""
    work = keys / "bundle"
    work.mkdir()
    folder(work, bundle(HOSTILE))
    opa("sign", "--signing-alg", "HS256", "--signing-key", "s" * 40, "-b", ".", "-o", ".", cwd=work)
    files = {path.relative_to(work).as_posix(): path.read_bytes() for path in work.rglob("*") if path.is_file()}
    with pytest.raises(VerificationError, match="bundle-signature"):
        Bundle.from_bytes(archive(files), [PUBLIC])


def test_yaml_means_the_same_to_opa(tmp_path):
    """What the strict YAML reader accepts, OPA reads as the same value."""
    text = "a: 1\nb: [x, true, -1.5, '2020-01-01', ~, \"yes\", 12345678901]\nc: {d: text, 'e f': \"é\"}\nt: |\n  two\n  lines\n"
    data = archive({".manifest": b'{"roots":["roles"]}', "roles/data.yaml": text.encode()})
    (tmp_path / "b.tar.gz").write_bytes(data)
    theirs = json.loads(opa("eval", "-b", str(tmp_path / "b.tar.gz"), "-f", "values", "data.roles"))[0]
    assert theirs == Bundle.from_bytes(data).data["roles"]


def test_gnu_tar_makes_bundles_too(tmp_path):
    """A bundle packed by tar, with folders and GNU headers, is read."""
    work = tmp_path / "bundle"
    work.mkdir()
    folder(work, bundle(HOSTILE))
    subprocess.run(["tar", "czf", "../b.tar.gz", "."], cwd=work, check=True, timeout=30)
    raw = (tmp_path / "b.tar.gz").read_bytes()
    with tarfile.open(fileobj=io.BytesIO(gzip.decompress(raw))) as packed:
        assert any(member.isdir() for member in packed)
    assert Bundle.from_bytes(raw).revision == "test"
