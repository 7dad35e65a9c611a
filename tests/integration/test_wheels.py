"""The two wheels as they are installed: everything is in them, each does its work, and the node's needs nothing of the controller's.

They are built and installed without an index. Third parties' packages are lent by the environment that runs the tests; the checkout is not, so
what is missing in a wheel is missing.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
VERBS = ("admin", "controller", "node", "reference", "token")
BUILD_S = 60
START_S = 60
_NEVER_SHIPPED = ("__pycache__", "*.egg-info", "build", "dist")
_NOT_IN_THE_WHEEL = {"pyproject.toml"}

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """Both wheels, built from a copy: a build leaves files in its tree."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheels")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("agent", "controller"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns(*_NEVER_SHIPPED))
    found = {}
    for name, folder in (("agent", source), ("controller", source / "controller")):
        _pip("wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(target / name), str(folder))
        (found[name],) = (target / name).glob("*.whl")
    return found


def _pip(*arguments):
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=BUILD_S)
    assert done.returncode == 0, done.stdout + done.stderr


class House:
    """An environment of its own with some wheels, and a directory that is nobody's checkout."""

    def __init__(self, folder, *wheels):
        self.programs = folder / "venv" / "bin"
        self.room = folder / "room"
        self.room.mkdir()
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True, timeout=BUILD_S)
        (site,) = (folder / "venv" / "lib").glob("python3*/site-packages")
        lent = folder / "lent"
        lent.mkdir()
        for package in Path(sysconfig.get_path("purelib")).iterdir():
            if not package.name.startswith(("edgewarden", "__editable__", "_edgewarden")) and package.suffix != ".pth":
                (lent / package.name).symlink_to(package)
        (site / "lent.pth").write_text(f"{lent}\n")  # a line of another .pth is a path, and no .pth in there is read
        _pip("--python", str(self.programs / "python"), "install", "--no-deps", "--no-index", *map(str, wheels))

    def start(self, *arguments, **more):
        # fmt: off
        return subprocess.Popen(
            [self.programs / arguments[0], *arguments[1:]], cwd=self.room, text=True, env={"PATH": os.defpath, "HOME": str(self.room)},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more,
        )
        # fmt: on

    def run(self, *arguments):
        process = self.start(*arguments)
        output, errors = process.communicate(timeout=START_S)
        return process.returncode, output, errors

    def verbs(self, *group):
        """Return the words that ``--help`` lists as commands."""
        code, output, errors = self.run("edgewarden", *group, "--help")
        assert code == 0, errors
        return {line.split()[0] for line in output.partition("Commands:")[2].splitlines() if line.strip()}


@pytest.fixture(scope="module")
def both(wheels, tmp_path_factory):
    return House(tmp_path_factory.mktemp("both"), wheels["agent"], wheels["controller"])


@pytest.fixture(scope="module")
def node_alone(wheels, tmp_path_factory):
    return House(tmp_path_factory.mktemp("node"), wheels["agent"])


@pytest.mark.parametrize("package", ["agent", "controller"])
def test_every_file_of_a_package_is_in_its_wheel(wheels, package):
    """Code, schemas, Rego, migrations: all of it, and nothing of anybody else's."""
    source = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / package).rglob("*")
        if path.is_file() and not any(part == "__pycache__" or part.endswith(".egg-info") for part in path.parts)
    } - {f"{package}/{name}" for name in _NOT_IN_THE_WHEEL}
    with zipfile.ZipFile(wheels[package]) as wheel:
        inside = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert inside == source


def test_the_node_s_wheel_knows_no_controller(node_alone):
    """Its command line has no verb of the controller's, and there is no such package."""
    assert {"run", "attest", "model", "policy", "log", "doctor"} <= node_alone.verbs()
    assert not node_alone.verbs() & set(VERBS)
    assert "poll" not in node_alone.verbs("attest")
    code, _, errors = node_alone.run("python", "-c", "import agent.cli.main, agent.daemon.main, controller")
    assert (code, errors.strip().rpartition("\n")[2]) == (1, "ModuleNotFoundError: No module named 'controller'")


def test_both_wheels_have_all_verbs(both):
    """The controller's verbs join the node's."""
    assert {"run", *VERBS} <= both.verbs()
    assert "poll" in both.verbs("attest")
    assert {"init", "run", "status"} <= both.verbs("controller")


def test_a_controller_runs_out_of_its_wheel(both):
    """Made and run far from the checkout: tables by migrations, decisions by Rego, and it ends when it is told to."""
    code, _, errors = both.run(
        "edgewarden", "controller", "init", "ctl", "--url", "https://localhost:1", "--listen", "127.0.0.1:0"
    )
    assert code == 0, errors
    with contextlib.ExitStack() as stack:
        process = both.start("edgewarden", "controller", "run", "--config", "ctl/controller.yaml")
        stack.callback(process.wait)
        stack.callback(process.kill)
        lines = map(json.loads, process.stderr)
        serving = next(line for line in lines if line["event"] == "serving")
        (both.room / "ctl" / "admin" / "url").write_text(f"https://localhost:{serving['port']}\n")
        code, output, errors = both.run("edgewarden", "node", "list", "--json", "--admin", "ctl/admin")
        assert (code, output.strip()) == (0, "[]"), errors
        code, output, errors = both.run("python", "-c", "import controller; print(controller.__file__)")
        assert output.startswith(str(both.programs.parent)), errors
        process.terminate()
        _, rest = process.communicate(timeout=START_S)
        assert process.returncode == 0, rest
