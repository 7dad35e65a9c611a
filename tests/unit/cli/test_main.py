"""The command line as a whole: verbs, help, exit codes, completion."""

import hashlib
import importlib
import json
import os
import subprocess
import sys
from importlib.metadata import EntryPoint
from typing import Any

import click
import pytest
from click.testing import CliRunner

from agent import __version__
from agent.cli import plugins
from agent.cli import run as run_cli
from agent.config import load
from agent.errors import AuditError, ConfigError, HostError, PolicyError, VerificationError
from tools.demo_node import ROOT, DemoNode
from tools.pki import write_signing_key

cli: Any = importlib.import_module("agent.cli.main")  # the package's `main` is the function


def _commands(command, path=()):
    """Yield every command below one, with the words that name it."""
    yield path
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            assert found is not None
            yield from _commands(found, (*path, name))


def _typed(*words, **options):
    return subprocess.run(
        [sys.executable, "-m", "agent.cli", *words],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        check=False,
        **options,
    )


@pytest.mark.parametrize("path", list(_commands(cli._edgewarden)), ids=" ".join)
def test_every_command_explains_itself(path):
    """--help of each command ends with 0, and says what it does and how it is called."""
    done = CliRunner().invoke(cli._edgewarden, [*path, "--help"], prog_name="edgewarden")
    assert done.exit_code == 0
    assert done.output.startswith(f"Usage: {' '.join(['edgewarden', *path])} ")
    said = done.output.split("\n\n")[1].strip()
    assert said.endswith((".", ":")), said
    undescribed = [
        line
        for line in done.output.splitlines()
        if line.startswith("  --") and len(line.split()) == 1 and "help" not in line
    ]
    assert undescribed == []


def test_every_verb_of_the_architecture_is_there():
    """The verbs are those that the documents name, each imported only when it is used."""
    assert set(cli.VERBS) == {"run", "attest", "model", "policy", "log", "doctor"}
    done = _typed("--help")
    assert all(f"\n  {verb} " in done.stdout for verb in cli.VERBS)
    loaded = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, agent.cli.main; print([m for m in sys.modules if 'tpm2' in m or 'onnx' in m])",
        ],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        check=True,
    )
    assert loaded.stdout == "[]\n"


def test_the_version_is_the_packages():
    """--version says the name and the version."""
    assert CliRunner().invoke(cli._edgewarden, ["--version"]).output == f"edgewarden, version {__version__}\n"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (VerificationError("pcr-digest", "differs"), 1),
        (PolicyError("denied"), 1),
        (ConfigError("wrong"), 3),
        (HostError("no disk"), 3),
        (AuditError("full"), 3),
    ],
)
def test_an_errors_blame_is_the_exit_code(monkeypatch, capsys, error, status):
    """No (1) for what does not verify, environment (3) for what is missing; one line of words, no traceback."""

    def fail(**_):
        raise error

    monkeypatch.setattr(cli, "_edgewarden", fail)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == status
    assert capsys.readouterr().err == f"edgewarden: {error}\n"


def test_wrong_usage_is_2():
    """An unknown verb or option is a usage error."""
    assert _typed("no-such-verb").returncode == 2
    assert _typed("log", "tail", "--no-such-option").returncode == 2


def test_a_plug_in_joins_by_its_entry_point(monkeypatch):
    """A verb of another distribution is listed and called; one that offers no command is a usage error."""
    points = {
        "fleet": EntryPoint("fleet", f"{__name__}:_fleet", "edgewarden.commands"),
        "broken": EntryPoint("broken", "json:dumps", "edgewarden.commands"),
    }

    def entry_points(*, group, name=None):
        assert group == "edgewarden.commands"
        return [point for key, point in points.items() if name in {None, key}]

    monkeypatch.setattr(plugins, "entry_points", entry_points)
    monkeypatch.setitem(sys.modules, __name__, sys.modules[__name__])
    run = CliRunner().invoke
    assert "fleet" in cli._edgewarden.list_commands(click.Context(cli._edgewarden))
    assert run(cli._edgewarden, ["fleet"]).output == "the fleet\n"
    assert run(cli._edgewarden, ["broken"]).exit_code == 2


@click.command("fleet")
def _fleet():
    click.echo("the fleet")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_offered(shell):
    """Each shell gets its completion script, and words are completed down to sub-commands."""
    environment = {"PATH": os.defpath, "PYTHONPATH": str(ROOT)}
    code = "import sys; sys.argv[0] = 'edgewarden'; from agent.cli import main; main()"

    def complete(**more):
        return subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
            env={**environment, **more},
        ).stdout

    assert "edgewarden" in complete(_EDGEWARDEN_COMPLETE=f"{shell}_source")
    if shell == "bash":
        words = complete(_EDGEWARDEN_COMPLETE="bash_complete", COMP_WORDS="edgewarden log ", COMP_CWORD="2")
        assert {line.partition(",")[2] for line in words.splitlines()} == {"tail", "verify"}


# --- edgewarden run


@pytest.fixture
def node(tmp_path):
    node = DemoNode(tmp_path, "swtpm:port=1")
    node.prepare()
    return node


def test_a_configuration_is_checked_without_a_start(node):
    """--check says that the file is valid, or what is wrong and where, and touches nothing."""
    done = CliRunner().invoke(run_cli.command, ["--config", str(node.config), "--check"])
    assert (done.exit_code, done.output) == (0, f"{node.config}: valid\n")
    assert not (node.root / "state").exists()
    node.config.write_text("node: {id: x, colour: red}\n")
    done = _typed("run", "--check", "--config", str(node.config))
    assert done.returncode == 3
    assert "colour" in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_schema_is_printed():
    """--schema prints a JSON Schema."""
    schema = json.loads(CliRunner().invoke(run_cli.command, ["--schema"]).output)
    assert "$defs" in schema


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda node: (node.root / "keys" / "policy.pub").unlink(), "policy.trusted_keys"),
        (lambda node: (node.root / "pki" / "node.key").chmod(0o644), "inference.key"),
        (lambda node: (node.root / "keys" / "models.pub").write_text("none"), "PEM"),
        (lambda node: (node.root / "state").write_text("a file"), "state directory"),
        (lambda _: None, "TPM"),
    ],
)
def test_what_keeps_the_agent_from_starting_is_one_clear_line(node, spoil, words):
    """A missing key, a mode that is too open, a state that is no directory, a TPM that is not there: exit code 3 and one line."""
    spoil(node)
    done = _typed("run", "--config", str(node.config))
    assert done.returncode == 3, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("edgewarden: ")
    assert words in last
    assert "Traceback" not in done.stderr


def test_a_log_line_that_can_not_be_written_stops_nothing(monkeypatch):
    """A full disk below standard error costs the line, not the agent; text that has no encoding is written all the same."""
    lines = run_cli._Lines()
    written = []
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", lambda fd, data: written.append((fd, data)))
        lines.write("\ud800 ok\n")
        lines.flush()
    assert written == [(2, b"\\ud800 ok\n")]
    full, kept = os.open("/dev/full", os.O_WRONLY), os.dup(2)
    os.dup2(full, 2)
    try:
        lines.write("lost\n")
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(full)


def test_reference_values_name_what_was_approved(node):
    """The command writes PCR, configuration, policy and each file of each package; a package by a stranger is refused."""
    from tests.support.models import write_tiny  # noqa: PLC0415 -- imports onnx, which only this test needs
    from tests.support.node import build_policy, sign_and_place  # noqa: PLC0415 -- as above

    (node.root / "policy.tar.gz").write_bytes(build_policy(node, "r1"))
    package = sign_and_place(node, write_tiny(node.root / "packages" / "tiny" / "1"))
    command = ["attest", "reference", "--config", str(node.config), "--policy", str(node.root / "policy.tar.gz")]
    out = node.root / "reference.json"
    here = CliRunner().invoke(cli._edgewarden, [*command, "--package", str(package), "--out", str(out)])
    assert here.exit_code == 0, here.output
    assert here.output == f"{out}: 2 files of 1 packages\n"
    values = json.loads(out.read_bytes())
    assert values["measurement"]["pcr"] == 14
    assert set(values["models"]) == {"tiny/1/model.onnx", "tiny/1/model.yaml"}
    assert json.loads(CliRunner().invoke(cli._edgewarden, command).output)["models"] == {}
    write_signing_key(node.root / "keys", "other")
    foreign = sign_and_place(node, write_tiny(node.root / "packages" / "foreign" / "1", name="foreign"), key="other")
    done = _typed(*command, "--package", str(foreign))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr


def test_a_keylime_policy_names_what_was_approved(node):
    """The runtime policy lists the path and digest of each entry that the node may measure, and is none that Keylime takes for empty."""
    from tests.support.models import write_tiny  # noqa: PLC0415 -- imports onnx, which only these tests need
    from tests.support.node import build_policy, sign_and_place  # noqa: PLC0415 -- as above

    bundle = node.root / "policy.tar.gz"
    bundle.write_bytes(build_policy(node, "r1"))
    package = sign_and_place(node, write_tiny(node.root / "packages" / "listed" / "1", name="listed"))
    command = [
        "attest",
        "keylime-policy",
        "--config",
        str(node.config),
        "--policy",
        str(bundle),
        "--package",
        str(package),
    ]
    policy = json.loads(CliRunner().invoke(cli._edgewarden, command).output)
    model = hashlib.sha256((package / "model.onnx").read_bytes()).hexdigest()
    settings = hashlib.sha256(load(node.config).measured()).hexdigest()
    assert policy["meta"]["generator"] >= 2
    assert policy["digests"] == {
        "edgewarden/config": [settings],
        "edgewarden/models/listed/1/model.onnx": [model],
        "edgewarden/models/listed/1/model.yaml": [hashlib.sha256((package / "model.yaml").read_bytes()).hexdigest()],
        "edgewarden/policy/r1": [hashlib.sha256(bundle.read_bytes()).hexdigest()],
        "edgewarden/unload/listed/1": [hashlib.sha256(b"").hexdigest()],
    }
    assert policy["excludes"] == ["^edgewarden/refused/", "^boot_aggregate$"]
    out = node.root / "runtime.json"
    aggregate = "ab" * 32
    here = CliRunner().invoke(cli._edgewarden, [*command, "--boot-aggregate", aggregate, "--out", str(out)])
    assert here.output == f"{out}: 2 files of 1 packages\n"
    checked = json.loads(out.read_bytes())
    assert checked["digests"]["boot_aggregate"] == [aggregate]
    assert checked["excludes"] == ["^edgewarden/refused/"]
    assert CliRunner().invoke(cli._edgewarden, [*command, "--boot-aggregate", "AB" * 32]).exit_code == 2
    done = _typed(*command, "--out", str(node.root / "missing" / "x"))
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
