"""A load generator that costs little itself: raw HTTP/1.1 over asyncio, closed loop, plain or mTLS.

Each connection sends one prepared request, waits for the whole answer, and sends the next. An answer that is not 200 ends the run.
Prints one JSON line: requests, seconds, microseconds at p50 and p99.

Usage: python bench/load.py HOST:PORT REQUEST_FILE --connections N --seconds S [--ca PEM --cert PEM --key PEM]
"""

import argparse
import asyncio
import json
import ssl
import sys
import time
from pathlib import Path
from typing import cast

import uvloop


class _Connection(asyncio.Protocol):
    def __init__(self, request: bytes, deadline: float, latencies: list[int], done: asyncio.Future[None]) -> None:
        self._request = request
        self._deadline = deadline
        self._latencies = latencies
        self._done = done
        self._buffer = b""
        self._sent_ns = 0
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._send()

    def _send(self) -> None:
        if self._transport is None:
            return
        self._sent_ns = time.perf_counter_ns()
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, separator, body = self._buffer.partition(b"\r\n\r\n")
        if not separator:
            return
        at = head.lower().find(b"content-length:")
        length = int(head[at + 15 :].split(b"\r\n", 1)[0])
        if len(body) < length:
            return
        now = time.perf_counter_ns()
        if not head.startswith(b"HTTP/1.1 200"):
            self._fail(RuntimeError((head + b"\n" + body[:500]).decode(errors="replace")))
            return
        self._latencies.append(now - self._sent_ns)
        self._buffer = body[length:]
        if time.monotonic() < self._deadline:
            self._send()
        elif not self._done.done():
            self._done.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(exc or ConnectionError("the server closed the connection"))

    def _fail(self, error: Exception) -> None:
        if not self._done.done():
            self._done.set_exception(error)


def _context(arguments: argparse.Namespace) -> ssl.SSLContext | None:
    if not arguments.ca:
        return None
    context = ssl.create_default_context(cafile=arguments.ca)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(arguments.cert, arguments.key)
    return context


async def _run(arguments: argparse.Namespace, request: bytes) -> dict[str, float]:
    host, _, port = arguments.address.rpartition(":")
    loop = asyncio.get_running_loop()
    latencies: list[int] = []
    begin = time.monotonic()
    deadline = begin + arguments.seconds
    waits = []
    for _ in range(arguments.connections):
        done: asyncio.Future[None] = loop.create_future()
        waits.append(done)
        await loop.create_connection(
            lambda done=done: _Connection(request, deadline, latencies, done),
            host,
            int(port),
            ssl=_context(arguments),
        )
    await asyncio.gather(*waits)
    seconds = time.monotonic() - begin
    latencies.sort()
    return {
        "requests": len(latencies),
        "seconds": seconds,
        "rate": len(latencies) / seconds,
        "p50_us": latencies[len(latencies) // 2] / 1000,
        "p99_us": latencies[len(latencies) * 99 // 100] / 1000,
    }


def main() -> None:
    """Run one closed loop and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address")
    parser.add_argument("request")
    parser.add_argument("--connections", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--ca")
    parser.add_argument("--cert")
    parser.add_argument("--key")
    arguments = parser.parse_args()
    try:
        figures = uvloop.run(_run(arguments, Path(arguments.request).read_bytes()))
    except (RuntimeError, OSError) as error:
        sys.exit(f"load: {error}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
