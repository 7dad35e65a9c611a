"""Limits on who may ask how much, and how often; all in memory of bounded size, all by the monotonic clock.

Rules:

1. Sizes are checked before a body is parsed: what the client declares, and what it sends (:func:`check_size`).
2. Rate: each principal has a bucket for each limit, as the generic cell rate algorithm keeps it (ITU-T I.371): in any
   interval at most ``burst + requests_per_second * interval`` requests pass. Integers only: nothing drifts. A limit may
   bound besides how many requests a principal makes in a minute, those that are refused included.
3. Concurrency: a principal has at most ``concurrency`` requests in the house, running or waiting.
4. Fairness: at most ``running`` requests of all principals run; the others wait, and a place that becomes free goes to the
   waiting principals in turn. Who floods waits behind itself. When all waiting places are taken, the principal with
   the most waiting gives up its newest.
5. What is refused says 429 (503 when the node itself is full) and when to come back.
6. At most ``principals`` are remembered. The one that was idle longest is forgotten first, one with a request in the house
   never; identities are proved before they come here, so that forgetting cannot be forced at will.
"""

from __future__ import annotations

import asyncio
import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from agent.errors import PeerError, PolicyError

__all__ = ["Admission", "Bucket", "Limit", "RateWindow", "Slot", "check_batch", "check_size", "compile_limits"]

MAX_RATE_PER_SECOND = 1_000_000
MAX_COUNT = 2**31
_NS = 1_000_000_000
_NS_PER_US = 1000
_WINDOW_PARTS = 20  # a window forgets in steps of a twentieth of its length
_RETRY_CONCURRENCY_S = 1.0
_RETRY_MINUTE_S = 3.0  # the window forgets in steps of this length


@dataclass(frozen=True, slots=True)
class Limit:
    """A named limit of the policy's data; ``max_bytes`` of a request's body, ``max_batch`` of its first dimension."""

    requests_per_second: float
    burst: int
    concurrency: int
    max_bytes: int
    max_batch: int
    requests_per_minute: int | None = None


def compile_limits(limits: Mapping[str, Any]) -> dict[str, Limit]:
    """Compile ``data.limits.limits``; members that policy itself enforces (budgets, anomaly) are left to it.

    Raises:
        PolicyError: names the limit and the member that is wrong.
    """
    compiled: dict[str, Limit] = {}
    for name, limit in limits.items():
        if not isinstance(limit, Mapping):
            raise PolicyError(f"limit {name!r}: must be an object")
        rate = limit.get("requests_per_second")
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate <= MAX_RATE_PER_SECOND:
            raise PolicyError(f"limit {name!r}: requests_per_second must be more than 0, up to {MAX_RATE_PER_SECOND}")
        counts = {member: limit.get(member) for member in ("burst", "concurrency", "max_bytes", "max_batch")}
        if "requests_per_minute" in limit:
            counts["requests_per_minute"] = limit["requests_per_minute"]
        for member, count in counts.items():
            if type(count) is not int or not 1 <= count <= MAX_COUNT:
                raise PolicyError(f"limit {name!r}: {member} must be an integer of 1 or more")
        compiled[name] = Limit(
            requests_per_second=rate, **{member: int(count or 0) for member, count in counts.items()}
        )
    return compiled


def check_size(size: int | None, max_bytes: int) -> None:
    """Refuse a body by its size in bytes: once by ``Content-Length`` (None where there is none), once as it was read.

    Raises:
        PeerError: 413.
    """
    if size is not None and size > max_bytes:
        raise PeerError(413, "body_too_large", f"the request's body is larger than {max_bytes} bytes")


def check_batch(batch: int, limit: Limit) -> None:
    """Refuse a batch by its size.

    Raises:
        PeerError: 413.
    """
    if batch > limit.max_batch:
        raise PeerError(413, "batch_too_large", f"a batch of {batch}, more than the limit of {limit.max_batch}")


class Bucket:
    """A bucket by the generic cell rate algorithm: one integer, the time at which it will be full again."""

    __slots__ = ("_full_ns",)

    def __init__(self) -> None:
        self._full_ns = 0

    def take(self, limit: Limit, now_us: int, count: int = 1) -> float:
        """Take ``count`` tokens.

        Returns:
            0.0 when they were taken, else the seconds until they could be; then nothing was taken. Infinity for a
            ``count`` beyond the burst.
        """
        if count > limit.burst:
            return math.inf
        interval_ns = math.ceil(
            _NS / limit.requests_per_second
        )  # rounded so that never more passes than the limit says
        now_ns = now_us * _NS_PER_US
        full_ns = max(self._full_ns, now_ns) + count * interval_ns
        wait_ns = full_ns - now_ns - limit.burst * interval_ns
        if wait_ns > 0:
            return wait_ns / _NS
        self._full_ns = full_ns
        return 0.0


class RateWindow:
    """Counts what happened in the last ``length_us`` microseconds, forgetting by twentieths of it.

    Attributes:
        total: the count, as of the last :meth:`add`.
    """

    __slots__ = ("_counts", "_part_us", "_position", "total")

    def __init__(self, length_us: int) -> None:
        self._part_us = length_us // _WINDOW_PARTS
        self._counts = [0] * _WINDOW_PARTS
        self._position = 0
        self.total = 0

    def add(self, now_us: int) -> int:
        """Count one more and return how many there were, this one included."""
        position = now_us // self._part_us
        if position > self._position:
            for old in range(self._position + 1, min(position, self._position + _WINDOW_PARTS) + 1):
                self.total -= self._counts[old % _WINDOW_PARTS]
                self._counts[old % _WINDOW_PARTS] = 0
            self._position = position
        self._counts[self._position % _WINDOW_PARTS] += 1
        self.total += 1
        return self.total


@dataclass(slots=True)
class _Principal:
    last_second: RateWindow = field(default_factory=lambda: RateWindow(1_000_000))
    last_minute: RateWindow = field(default_factory=lambda: RateWindow(60_000_000))
    buckets: dict[str, Bucket] = field(default_factory=dict)
    in_house: int = 0
    waiting: list[asyncio.Future[None]] = field(default_factory=list)  # an empty deque is ten times as large


class Slot:
    """A place to run in, given back at the end of the ``with`` block."""

    __slots__ = ("_admission", "_principal")

    def __init__(self, admission: Admission, principal: _Principal) -> None:
        self._admission = admission
        self._principal = principal

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._admission._leave(self._principal)  # noqa: SLF001 -- a slot is a part of its admission


class Admission:
    """The limits of one process. Used from one event loop only.

    Args:
        limits: by name, from :func:`compile_limits`.
        running: how many requests run at once, of all principals.
        waiting: how many more may wait; each holds its body in memory.
        principals: how many are remembered.
    """

    def __init__(
        self, limits: Mapping[str, Limit], *, running: int = 64, waiting: int = 256, principals: int = 10_000
    ) -> None:
        self._limits = dict(limits)
        self._running_limit = running
        self._waiting_limit = waiting
        self._principals_limit = principals
        self._known: OrderedDict[str, _Principal] = OrderedDict()
        self._turns: OrderedDict[int, _Principal] = OrderedDict()  # principals with waiting requests, next first
        self._running = 0
        self._waiting = 0

    def replace_limits(self, limits: Mapping[str, Limit]) -> None:
        """Put a new policy's limits in force; what a bucket of the same name has given stays given."""
        self._limits = dict(limits)
        for principal in self._known.values():
            for name in principal.buckets.keys() - self._limits.keys():
                del principal.buckets[name]

    def limit(self, name: str) -> Limit:
        """Return a limit by its name.

        Raises:
            PolicyError: the policy names a limit that its data does not have.
        """
        limit = self._limits.get(name)
        if limit is None:
            raise PolicyError(f"there is no limit {name!r} in the policy's data")
        return limit

    def observe(self, principal_id: str, now_us: int) -> dict[str, int]:
        """Count a request, before policy decides on it, and return the rates for the policy's input."""
        principal = self._find(principal_id)
        return {"1s": principal.last_second.add(now_us), "60s": principal.last_minute.add(now_us)}

    async def enter(self, principal_id: str, limit_name: str, now_us: int) -> Slot:
        """Take a token and a place to run; wait for the place in turn.

        Returns:
            A context manager; the place is free again when it is left.

        Raises:
            PeerError: 429 with ``retry_after_s``, or 503 when the node is full.
            PolicyError: no such limit.
        """
        limit = self.limit(limit_name)
        principal = self._find(principal_id)
        # 1. A place in the house comes first: what is refused for that costs no token. 2. The rate.
        self._charge(principal, limit_name, limit, principal.in_house, now_us)
        # 3. A place to run, now or in turn.
        principal.in_house += 1
        if self._running < self._running_limit:
            self._running += 1
        else:
            await self._wait(principal)
        return Slot(self, principal)

    def narrow(self, principal_id: str, limit_name: str, now_us: int) -> None:
        """Hold a request that is in the house to a further limit: the one that the policy's decision names.

        Raises:
            PeerError: 429 with ``retry_after_s``.
            PolicyError: no such limit.
        """
        principal = self._find(principal_id)
        self._charge(principal, limit_name, self.limit(limit_name), principal.in_house - 1, now_us)

    def _charge(self, principal: _Principal, limit_name: str, limit: Limit, others: int, now_us: int) -> None:
        if others >= limit.concurrency:
            raise PeerError(
                429,
                "concurrency",
                f"more than {limit.concurrency} requests at once",
                retry_after_s=_RETRY_CONCURRENCY_S,
            )
        a_minute = limit.requests_per_minute
        if a_minute is not None and principal.last_minute.total > a_minute:
            raise PeerError(429, "rate", f"more than {a_minute} requests a minute", retry_after_s=_RETRY_MINUTE_S)
        wait_s = principal.buckets.setdefault(limit_name, Bucket()).take(limit, now_us)
        if wait_s:
            message = f"more than {limit.requests_per_second:g} requests a second"
            raise PeerError(429, "rate", message, retry_after_s=wait_s)

    def _find(self, principal_id: str) -> _Principal:
        principal = self._known.get(principal_id)
        if principal is not None:
            self._known.move_to_end(principal_id)
            return principal
        if len(self._known) >= self._principals_limit:
            self._forget_one()
        principal = self._known[principal_id] = _Principal()
        return principal

    def _forget_one(self) -> None:
        # At most running + waiting principals are in the house, so that the search ends soon.
        idle = next((name for name, principal in self._known.items() if not principal.in_house), None)
        if idle is None:
            raise _full()
        del self._known[idle]

    async def _wait(self, principal: _Principal) -> None:
        if self._waiting >= self._waiting_limit:
            self._make_room(principal)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        principal.waiting.append(turn)
        self._turns.setdefault(id(principal), principal)
        self._waiting += 1
        try:
            await turn
        except asyncio.CancelledError:
            # The client went away; where its turn had come already, the place goes on to the next.
            if turn.cancelled():
                if turn in principal.waiting:
                    self._withdraw(principal, turn)
                principal.in_house -= 1
            elif turn.exception() is None:
                self._leave(principal)
            raise

    def _make_room(self, arriving: _Principal) -> None:
        greediest = max(self._turns.values(), key=lambda principal: len(principal.waiting), default=None)
        if greediest is None or len(greediest.waiting) <= len(arriving.waiting) + 1:
            arriving.in_house -= 1
            raise _full()
        newest = greediest.waiting[-1]
        self._withdraw(greediest, newest)
        if not newest.cancelled():
            greediest.in_house -= 1
            newest.set_exception(_full())

    def _withdraw(self, principal: _Principal, turn: asyncio.Future[None]) -> None:
        principal.waiting.remove(turn)
        self._waiting -= 1
        if not principal.waiting:
            del self._turns[id(principal)]

    def _leave(self, principal: _Principal) -> None:
        principal.in_house -= 1
        # The place goes to the principal whose turn it is, which then stands at the end of the line. A request that was
        # cancelled a moment ago may still stand there.
        while self._turns:
            key, following = self._turns.popitem(last=False)
            turn = following.waiting.pop(0)
            self._waiting -= 1
            if following.waiting:
                self._turns[key] = following
            if not turn.cancelled():
                turn.set_result(None)
                return
        self._running -= 1


def _full() -> PeerError:
    return PeerError(
        503, "overloaded", "the node has as many requests as it can hold", retry_after_s=_RETRY_CONCURRENCY_S
    )
