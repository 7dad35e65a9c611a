"""Entries that run inside sandboxed children; preloaded by the test's zygote, so everything is imported at the top."""

import asyncio
import io
import json
import os
import socket
import ssl
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import onnxruntime
import regorus
import simplejpeg
import uvloop
from aiohttp import web
from PIL import Image

from agent.isolation.channel import Channel
from agent.isolation.child import Child, fork_worker
from agent.isolation.memfd import map_sealed

Image.init()  # Pillow finds its codecs lazily

PRELOAD = ["tests.support.isolation_entries"]


def echo(child: Child) -> None:
    """Answer every frame with itself, until the agent closes the channel."""
    child.enter_sandbox()
    channel = Channel(child.channel)
    while (frames := channel.receive()) is not None:
        for frame in frames:
            frame.close_fds()
            channel.send(frame.data)


def describe(child: Child) -> None:
    """Tell what this process is, before and in its sandbox."""
    secrets = {}
    for name, fd in child.fds.items():
        with open(f"/proc/self/fd/{fd}", "rb") as file:  # noqa: PTH123 -- a Path would resolve the link
            secrets[name] = file.read().decode()
    facts = {
        "pid": os.getpid(),
        "ppid": os.getppid(),
        "uid": os.getuid(),
        "gid": os.getgid(),
        "groups": os.getgroups(),
        "args": child.args,
        "threads": len(list(Path("/proc/self/task").iterdir())),
        "fds": [fd for fd in range(1024) if _is_open(fd)],
        "given": sorted([child.channel.fileno(), *child.fds.values()]),
        "secrets": secrets,
    }
    report = child.enter_sandbox()
    Channel(child.channel).send(json.dumps({**facts, "report": msgspec.to_builtins(report)}).encode())


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def fail_before(child: Child) -> None:
    raise ValueError(f"a payload: {child.args}")


def fail_after(child: Child) -> None:
    child.enter_sandbox()
    raise ValueError(f"a payload: {child.args}")


def never_confined(child: Child) -> None:
    """Return without having entered the sandbox."""


def overrun(child: Child) -> None:
    """Take more memory than the headroom."""
    child.enter_sandbox()
    try:
        bytearray(1 << 30)
    except MemoryError:
        Channel(child.channel).send(b"refused")


def gateway(child: Child) -> None:
    """Serve TLS on an inherited listener: JPEG in, model run, JPEG out."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(f"/proc/self/fd/{child.fds['cert']}", f"/proc/self/fd/{child.fds['key']}")
    child.enter_sandbox()

    channel = Channel(child.channel)
    frames = channel.receive()
    assert frames is not None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2  # an explicit number: else the threads ask for an affinity, which is refused
    model = bytes(map_sealed(frames[0].fds[0]))
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    listener = socket.socket(fileno=child.fds["listener"])
    uvloop.run(_serve(session, listener, context, channel))


async def _serve(session, listener, context, channel) -> None:
    async def infer(request: web.Request) -> web.Response:
        body = await request.read()
        answer = await asyncio.get_running_loop().run_in_executor(pool, _infer, session, body)
        return web.json_response(answer)

    pool = ThreadPoolExecutor(2)
    app = web.Application()
    app.router.add_post("/infer", infer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.SockSite(runner, listener, ssl_context=context).start()
    channel.send(b"serving")
    stop = asyncio.Event()
    asyncio.get_running_loop().add_reader(channel.fileno(), stop.set)
    await stop.wait()
    await runner.cleanup()


def _infer(session, body: bytes) -> dict[str, object]:
    pixels = simplejpeg.decode_jpeg(body, "RGB")
    again = simplejpeg.encode_jpeg(pixels, quality=90)
    image = Image.open(io.BytesIO(again)).resize((224, 224), Image.Resampling.BILINEAR)
    png = io.BytesIO()
    image.save(png, "PNG")
    tensor = np.asarray(Image.open(png), np.float32).transpose(2, 0, 1)[None] / 255
    (scores,) = session.run(None, {session.get_inputs()[0].name: tensor})
    return {"shape": scores.shape, "finite": bool(np.isfinite(scores).all())}


def policy_template(child: Child) -> None:
    """Parse a policy once; fork a worker for every frame, with the descriptor that came along; answer its pid."""
    child.enter_sandbox()
    engine = regorus.Engine()
    engine.add_policy("authz.rego", child.args["policy"])
    channel = Channel(child.channel)
    while (frames := channel.receive()) is not None:
        (fd,) = frames[0].fds
        pid = fork_worker(partial(_work, engine, fd), keep=[fd])
        os.close(fd)
        channel.send(str(pid).encode())


def _work(engine, fd: int) -> None:
    channel = Channel(socket.socket(fileno=fd))
    while (frames := channel.receive()) is not None:
        for frame in frames:
            one = engine.clone()
            one.set_input_json(frame.data.decode())
            channel.send(one.eval_query_as_json("data.authz.allow").encode())


def dialer(child: Child) -> None:
    """Try to connect to each port that the agent names, over TCP and over what could slip past; tell the errnos."""
    child.enter_sandbox()
    tcp = socket.IPPROTO_TCP
    attempts = {
        "allowed": (socket.SOCK_STREAM, tcp, child.args["allowed"], 0),
        "other": (socket.SOCK_STREAM, tcp, child.args["other"], 0),
        "mptcp": (socket.SOCK_STREAM, 262, child.args["other"], 0),
        "udp": (socket.SOCK_DGRAM, 0, child.args["other"], 0),
        "fast open": (socket.SOCK_STREAM, tcp, child.args["other"], socket.MSG_FASTOPEN),
    }
    results = {}
    for name, (kind, protocol, port, flags) in attempts.items():
        try:
            with socket.socket(socket.AF_INET, kind, protocol) as sock:
                if flags:
                    sock.sendto(b"x", flags, ("127.0.0.1", port))
                else:
                    sock.connect(("127.0.0.1", port))
            results[name] = 0
        except OSError as error:
            results[name] = error.errno or -1
    Channel(child.channel).send(json.dumps(results).encode())
