"""Bundles: what is read, and each way of being refused."""

import gzip
import hashlib
import io
import json
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.errors import ConfigError, VerificationError
from agent.policy import bundle as rules
from agent.policy.build import archive
from agent.policy.bundle import Bundle, read_archive, read_manifest
from tests.support.policy import bundle, tar


def member(name: str, kind: bytes = tarfile.REGTYPE, **more) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    for key, value in more.items():
        setattr(info, key, value)
    return info


def refused(data: bytes, check: str) -> str:
    with pytest.raises(VerificationError) as caught:
        Bundle.from_bytes(data)
    assert caught.value.check == check
    return caught.value.message


def test_a_bundle_is_read_whole() -> None:
    """Modules, data at their paths, revision, roots and digest come out; other files stay out."""
    data = archive(
        {
            ".manifest": b'{"revision":"7","roots":["a","roles"],"metadata":{"x":1}}',
            "rego/a.rego": b"package a\n",
            "roles/data.yaml": b"ml: [infer]\n",
            "data.json": b'{"a":{"b":{"c":1}}}',
            "a/b/data.json": b'{"d":2}',
            "README.md": b"x",
            "other.json": b"not json",
        }
    )
    read = Bundle.from_bytes(data)
    assert read.modules == {"rego/a.rego": "package a\n"}
    assert read.data == {"roles": {"ml": ["infer"]}, "a": {"b": {"c": 1, "d": 2}}}
    assert (read.revision, read.roots) == ("7", ("a", "roles"))
    assert read.sha256 == hashlib.sha256(data).hexdigest()


def test_leading_dots_and_slashes_are_as_opa_writes_them() -> None:
    """``./x``, ``/x`` and folders are accepted: tar and OPA write them."""
    files = read_archive(tar((member("rego", tarfile.DIRTYPE), b""), ("./rego/a.rego", b"1"), ("/data.json", b"2")))
    assert files == {"rego/a.rego": b"1", "data.json": b"2"}


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "a/../b",
        "a//b",
        "a/./b",
        "",
        "/",
        "a\\b",
        "a\nb",
        "a/",
        "x" * 256,
        "/".join("a" * 17),
        "//etc",
        "a\x7fb",
    ],
)
def test_paths_that_are_not_plain_are_refused(name) -> None:
    """A path that could leave its folder, or hide, is refused."""
    refused(tar((name, b"x")), "bundle-archive")


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.CONTTYPE, b"S", b"Z"]
)
def test_only_regular_files_are_accepted(kind) -> None:
    """Links, devices, sparse and unknown members are refused."""
    refused(tar((member("x", kind, linkname="data.json"), b"")), "bundle-archive")


def test_a_path_stands_once() -> None:
    """Two members of one name are refused, also when they are written differently."""
    assert "twice" in refused(tar(("a", b"1"), ("./a", b"2")), "bundle-archive")


def test_a_sparse_file_is_refused() -> None:
    """A PAX header that makes a file sparse, so that its size grows from nothing, is refused."""
    info = member("x")
    info.pax_headers = {
        "GNU.sparse.major": "0",
        "GNU.sparse.minor": "1",
        "GNU.sparse.map": "0,1",
        "GNU.sparse.size": "99",
    }
    refused(tar((info, b"1")), "bundle-archive")


def test_the_number_of_files_is_bounded(monkeypatch) -> None:
    """One file over the limit refuses the bundle."""
    monkeypatch.setattr(rules, "MAX_FILES", 3)
    assert len(read_archive(tar(*((str(n), b"") for n in range(3))))) == 3
    refused(tar(*((str(n), b"") for n in range(4))), "bundle-archive")


def test_sizes_are_bounded(monkeypatch) -> None:
    """Compressed and unpacked bytes have limits; a gzip bomb is not unpacked past its own."""
    bomb = gzip.compress(bytes(rules.MAX_UNPACKED_BYTES + 1), 9)
    assert len(bomb) < 100_000
    assert "unpacked" in refused(bomb, "bundle-archive")
    monkeypatch.setattr(rules, "MAX_BUNDLE_BYTES", 10)
    refused(bundle("package a"), "bundle-archive")


def test_a_module_has_a_size_limit(monkeypatch) -> None:
    """A module over its limit refuses the bundle."""
    monkeypatch.setattr(rules, "MAX_MODULE_BYTES", 20)
    refused(bundle("package edgewarden\n#" + "x" * 20), "bundle-content")


def test_the_archive_is_exactly_one() -> None:
    """Anything behind the gzip member or the tar's end, or a member cut short, refuses the bundle."""
    good = bundle("package edgewarden.authz")
    raw = gzip.decompress(good)
    for bad in (
        b"",
        b"no gzip",
        good[:-1],
        good + b"x",
        good + good,
        gzip.compress(b""),
        gzip.compress(b"x" * 1024),
        gzip.compress(raw + b"x" * 512),
        gzip.compress(raw[:600]),
        gzip.compress(raw[:512]),
        gzip.compress(raw[:1024] + b"\x01" * 512 + raw[1024:]),
    ):
        refused(bad, "bundle-archive")


@given(st.binary(max_size=2000))
def test_any_bytes_give_a_bundle_or_our_error(data) -> None:
    """No bytes make the reader leak another error, packed or not."""
    for candidate in (data, gzip.compress(data)):
        try:
            Bundle.from_bytes(candidate)
        except VerificationError:
            continue


@given(st.data())
def test_a_damaged_tar_gives_a_bundle_or_our_error(data) -> None:
    """Flipping bytes of a real archive never leaks another error."""
    raw = bytearray(gzip.decompress(bundle("package edgewarden", data={"edgewarden": {"x": [1, 2]}})))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, min(len(raw), 3000) - 1))] = data.draw(st.integers(0, 255))
    try:
        Bundle.from_bytes(gzip.compress(bytes(raw)))
    except VerificationError:
        return


@given(st.dictionaries(st.sampled_from(["size", "path", "GNU.sparse.size", "GNU.sparse.map", "mtime", "GNU.sparse.name",
                                        "GNU.sparse.major", "GNU.sparse.minor", "GNU.sparse.realsize", "hdrcharset"]),
                       st.text(max_size=12) | st.integers(-5, 1 << 40).map(str), min_size=1))  # fmt: skip
def test_hostile_pax_headers_give_a_bundle_or_our_error(headers) -> None:
    """PAX records, which override size and name, never leak another error."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.PAX_FORMAT) as packed:
        info = member("data.json", size=2)
        info.pax_headers = headers
        packed.addfile(info, io.BytesIO(b"{}"))
    try:
        Bundle.from_bytes(gzip.compress(raw.getvalue()))
    except VerificationError:
        return


@pytest.mark.parametrize(
    "manifest",
    [
        {"revision": 1},
        {"revision": "x" * 129},
        {"revision": "a b"},
        {"revision": "a\nb"},
        {"roots": "a"},
        {"roots": ["a", "a"]},
        {"roots": ["a", "a/b"]},
        {"roots": ["", "a"]},
        {"wasm": [{"entrypoint": "x", "module": "policy.wasm"}]},
        {"rego_version": 0},
        {"file_rego_versions": {"/x.rego": 0}},
        [],
    ],
)
def test_manifests_that_cannot_be_honoured_are_refused(manifest) -> None:
    """Overlapping roots, WebAssembly, Rego v0 and malformed members refuse the bundle."""
    refused(bundle("package edgewarden", manifest=manifest), "bundle-manifest")


def test_roots_are_paths() -> None:
    """Slashes around a root do not matter; a name that another only begins with is not covered by it."""
    assert read_manifest(b'{"roots":["/a/","ab"]}').roots == ("a", "ab")
    assert rules.covers("a", "a/b")
    assert not rules.covers("a", "ab")
    assert rules.covers("", "anything")


@pytest.mark.parametrize(
    "path", ["a/.manifest", "a/.signatures.json", "policy.wasm", "plan.json", "patch.json", "a/data.yml"]
)
def test_kinds_that_are_not_supported_are_refused(path) -> None:
    """WebAssembly, plans, patches and stray manifests refuse the bundle."""
    refused(archive({path: b"{}"}), "bundle-content")


def test_modules_are_text() -> None:
    """A module that is not UTF-8 refuses the bundle."""
    refused(archive({"a.rego": b"package a\xff"}), "bundle-content")


def test_data_outside_the_roots_is_refused() -> None:
    """Data may only stand where the manifest says."""
    assert "outside" in refused(bundle(data={"stray": {}}), "bundle-data")


def test_two_files_cannot_give_one_value() -> None:
    """Data merges as objects only."""
    refused(archive({"data.json": b'{"a":{"b":1}}', "a/data.json": b'{"b":2}'}), "bundle-data")
    refused(archive({"data.json": b"[]"}), "bundle-data")


def test_data_is_validated_against_the_schema_beside_it() -> None:
    """A schema decides over its folder's data, which is empty when there is none."""
    schema = json.dumps({"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}}).encode()
    Bundle.from_bytes(archive({"x/data.json": b'{"a":1}', "x/schema.json": schema}))
    assert "$.a" in refused(archive({"x/data.json": b'{"a":"1"}', "x/schema.json": schema}), "bundle-schema")
    refused(archive({"x/schema.json": schema}), "bundle-schema")
    refused(archive({"data.json": b'{"x":1}', "x/y/schema.json": schema}), "bundle-schema")


@pytest.mark.parametrize(
    "schema",
    [b"[]", b'{"type":7}', b'{"$ref":"http://127.0.0.1:1/x"}', b'{"$ref":"file:///etc/passwd"}', b'{"$ref":"#"}',
     b'{"$ref":"#/nowhere"}', b'{"$dynamicRef":"x:y"}', b'{"pattern":"("}', b'{"patternProperties":{"(":{}}}'],
)  # fmt: skip
def test_a_schema_that_cannot_decide_refuses_the_bundle(schema) -> None:
    """No schema, a wrong one, one that fetches and one that never ends are refused."""
    refused(archive({"x/data.json": b'{"a":{}}', "x/schema.json": schema}), "bundle-schema")


def test_a_trusted_key_that_is_none_is_the_operators_error() -> None:
    """The blame for a bad trusted key is configuration's."""
    with pytest.raises(ConfigError, match="trusted policy key"):
        Bundle.from_bytes(archive({".signatures.json": b"{}"}), [b"no key"])
