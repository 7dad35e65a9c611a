"""Attacks from inside every profile, with both layers, with each alone, and with neither."""

import asyncio
import errno
import json
import os
import socket

import pytest

from agent.isolation.channel import Channel
from agent.isolation.sandbox import Profile, SandboxReport
from agent.isolation.supervisor import ChildSpec, Zygote
from tests.support.isolation import LIMITS
from tests.support.isolation_attacks import REFUSED, ROWS, SECCOMP, layers_in_force

pytestmark = [pytest.mark.integration, pytest.mark.xdist_group("isolation")]
ATTACKS = "tests.support.isolation_attacks"


@pytest.fixture(scope="module")
def zygote():
    # Without a change of user: another user's process is out of reach in any case, and would prove nothing.
    started = Zygote.start([ATTACKS], sandbox_required=False)
    yield started
    started.close()


async def _say(channel: Channel) -> bytes:
    frames = await asyncio.to_thread(channel.receive, 60)
    assert frames is not None
    return frames[0].data


async def _attack(zygote, profile, files, *, landlock, seccomp) -> tuple[SandboxReport, dict[str, int]]:
    for name in ("kept", "removed"):
        (files / name).write_text("x")
    abstract = f"edgewarden-test-{os.getpid()}"
    open_victim = await zygote.spawn(
        ChildSpec(Profile.INSPECTOR, f"{ATTACKS}:victim", LIMITS, landlock=False, seccomp=False)
    )
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.socket(socket.AF_UNIX) as abstract_listener,
        socket.socket(socket.AF_UNIX) as path_listener,
        socket.socket() as to_bind,
        socket.socket() as to_connect,
        socket.socket(socket.AF_UNIX) as unix,
        open_victim.sock,
    ):
        abstract_listener.bind("\0" + abstract)
        path_listener.bind(str(files / "listener"))
        for bound in (abstract_listener, path_listener):
            bound.listen()
        memfd = os.memfd_create("page")
        os.truncate(memfd, 4096)
        pidfd = os.pidfd_open(open_victim.pid)
        fds = {
            "bind": to_bind.fileno(),
            "connect": to_connect.fileno(),
            "unix": unix.fileno(),
            "memfd": memfd,
            "pidfd": pidfd,
        }
        args = {
            "agent": os.getpid(),
            "victim": open_victim.pid,
            "address": int(await _say(Channel(open_victim.sock))),
            "port": listener.getsockname()[1],
            "files": str(files),
            "abstract": abstract,
        }
        spec = ChildSpec(profile, f"{ATTACKS}:attack", LIMITS, args, fds, landlock=landlock, seccomp=seccomp)
        attacker = await zygote.spawn(spec)
        with attacker.sock:
            results: dict[str, int] = json.loads(await _say(Channel(attacker.sock)))
        os.close(memfd)
        os.close(pidfd)
    await attacker.wait()
    await open_victim.wait()
    return attacker.report, results


@pytest.mark.parametrize(("landlock", "seccomp"), [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("profile", list(Profile), ids=lambda profile: profile.value)
async def test_every_attack_is_stopped_by_just_the_layers_that_claim_it(zygote, tmp_path, profile, landlock, seccomp):
    """An attempt is refused where a layer that claims it is in force, and gets through where none is."""
    report, results = await _attack(zygote, profile, tmp_path, landlock=landlock, seccomp=seccomp)
    in_force = layers_in_force(report)
    assert (report.landlock_abi > 0, report.seccomp) == (landlock, seccomp)
    wrong = {}
    for row in ROWS:
        claimed = bool(row.layers & in_force) and not (profile.value in row.but and row.layers & in_force == {SECCOMP})
        code = -results[row.name]
        refused = code in REFUSED or (row.name == "clone3" and code == errno.ENOSYS)
        if refused != claimed and (claimed or row.surely):
            wrong[row.name] = (errno.errorcode.get(code, code), f"claimed by {sorted(row.layers)}")
    assert wrong == {}
    assert results.keys() == {row.name for row in ROWS}
