"""The configuration: what is accepted, what is refused with which words, what is measured."""

import json
from typing import Any

import jsonschema
import pytest
import yaml

from agent.config import json_schema, keylime_contact, load, read_environment, split_listen
from agent.errors import ConfigError

GOOD: dict[str, Any] = {
    "node": {"id": "edge-1", "state_dir": "state"},
    "inference": {"certificate": "tls/cert.pem", "key": "tls/key.pem", "client_ca": "/ca.pem"},
    "models": {"trusted_keys": ["keys/a.pem"]},
    "policy": {"require_signature": False},
}


def write(tmp_path, document):
    path = tmp_path / "edgewarden.yaml"
    path.write_text(document if isinstance(document, str) else yaml.safe_dump(document))
    return path


def changed(section, **values):
    return {**GOOD, section: {**GOOD.get(section, {}), **values}}


def keylime(**values):
    """Settings of the Keylime mode that are in order, but for these."""
    good = {"enabled": True, "uuid": "node-1", "registrar": "http://192.0.2.1:8890", "verifier_ca": "cv.crt"}
    return changed("attest", keylime={**good, **values})


def test_the_keylime_mode_is_read_where_it_is_enabled(tmp_path):
    """Its file is relative to the configuration, its contact defaults to the listener, and what is off is not asked for."""
    settings = load(write(tmp_path, keylime())).attest.keylime
    assert settings.verifier_ca == str(tmp_path / "cv.crt")
    assert keylime_contact(settings) == ("127.0.0.1", 9002)
    settings = load(write(tmp_path, keylime(listen="0.0.0.0:9002", contact="192.0.2.7:19002"))).attest.keylime
    assert keylime_contact(settings) == ("192.0.2.7", 19002)
    off = load(write(tmp_path, changed("attest", keylime={"uuid": "node-1"}))).attest.keylime
    assert (off.enabled, off.verifier_ca) == (False, None)


def test_relative_paths_belong_to_the_file(tmp_path):
    """A relative path is taken from the directory of the configuration, an absolute one stays."""
    settings = load(write(tmp_path, GOOD))
    assert settings.inference.key == str(tmp_path / "tls/key.pem")
    assert settings.inference.client_ca == "/ca.pem"
    assert settings.models.trusted_keys == [str(tmp_path / "keys/a.pem")]


@pytest.mark.parametrize(
    ("document", "words"),
    [
        (changed("node", colour="red"), "colour"),
        (changed("tpm", pcr=16), r"tpm\.pcr"),
        (changed("tpm", pcr=10), "IMA"),
        (changed("tpm", timeout_ms="soon"), r"timeout_ms"),
        (changed("inference", listen="everywhere"), r"inference\.listen"),
        (changed("inference", listen="127.0.0.1:70000"), "range"),
        (changed("metrics", listen="192.0.2.1:9000"), "loopback"),
        (changed("policy", require_signature=True), r"policy\.trusted_keys"),
        (changed("models", trusted_keys=[]), r"models\.trusted_keys"),
        (changed("node", id="with space"), r"node\.id"),
        (keylime(uuid=None), r"attest\.keylime\.uuid: is needed"),
        (keylime(registrar=None), r"attest\.keylime\.registrar: is needed"),
        (keylime(verifier_ca=None), r"attest\.keylime\.verifier_ca: is needed"),
        (keylime(uuid="a/b"), r"attest\.keylime\.uuid"),
        (keylime(registrar="https://registrar:8890"), r"attest\.keylime\.registrar"),
        (keylime(registrar="http://registrar:8890/x"), r"attest\.keylime\.registrar"),
        (keylime(registrar="http://user@registrar:8890"), r"attest\.keylime\.registrar"),
        (keylime(registrar="http://registrar"), r"attest\.keylime\.registrar"),
        (keylime(listen="somewhere"), r"attest\.keylime\.listen"),
        (keylime(listen="0.0.0.0:9002"), r"attest\.keylime\.contact.*of a machine"),
        (keylime(listen="127.0.0.1:0"), r"attest\.keylime\.contact.*port 0"),
        (keylime(contact="[::1]:9002"), r"attest\.keylime\.contact.*IPv4"),
        (keylime(contact="node.example:9002"), r"attest\.keylime\.contact"),
        ({"node": {"id": "x"}}, "inference"),
        ("node: [", "flow"),
        ("a: &x 1\nb: *x\n", "aliases"),
        ("node: {id: a, id: b}\n", "twice: 'id'"),
        ("- 1\n", "array"),
        ("x" * (256 * 1024 + 1), "larger"),
        ("[" * 5000, "nested deeper"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path, document, words):
    """Whatever is wrong, the error names the setting or the place."""
    with pytest.raises(ConfigError, match=words):
        load(write(tmp_path, document))


def test_a_missing_file_is_a_configuration_error(tmp_path):
    """No file: the path and the reason, not a traceback."""
    with pytest.raises(ConfigError, match="No such file"):
        load(tmp_path / "none.yaml")


def test_only_security_settings_are_measured(tmp_path):
    """The measured bytes change with what is enforced, and not with names, paths or addresses."""
    base = load(write(tmp_path, GOOD)).measured()
    for section, harmless in (
        ("node", {"id": "other"}),
        ("inference", {"listen": "127.0.0.1:1"}),
        ("tpm", {"tcti": "x"}),
    ):
        assert load(write(tmp_path, changed(section, **harmless))).measured() == base
    for section, weaker in (
        ("audit", {"durability": "buffered"}),
        ("sandbox", {"required": False}),
        ("attest", keylime()["attest"]),
        ("tpm", {"pcr": 15}),
        ("inference", {"max_body_bytes": 2048}),
        ("inference", {"tokens": {"jwks": "j", "audience": "a"}}),
    ):
        assert load(write(tmp_path, changed(section, **weaker))).measured() != base
    assert b"edge-1" not in base


def test_the_schema_accepts_what_the_parser_accepts():
    """The published JSON Schema is valid and takes the example."""
    schema = json.loads(json.dumps(json_schema()))
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.Draft202012Validator(schema).validate(GOOD)


def test_ipv6_listeners_stand_in_brackets():
    """An IPv6 address is split from its port."""
    assert split_listen("[::1]:8443") == ("::1", 8443)


def test_the_environment_is_read_in_one_place(monkeypatch):
    """Variables of systemd arrive as values; nonsense in them is ignored."""
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/x")
    monkeypatch.setenv("WATCHDOG_USEC", "nonsense")
    assert (read_environment().notify_socket, read_environment().watchdog_usec) == ("/run/x", None)
