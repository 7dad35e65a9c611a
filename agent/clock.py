"""The only reader of the wall clock, so that a test can see every place that depends on it."""

import functools
import time
from email.utils import formatdate

__all__ = ["http_date", "monotonic_us", "now", "now_us", "rfc3339", "rfc3339_seconds"]


def now() -> float:
    """Return seconds since the Unix epoch."""
    return time.time()  # noqa: TID251 -- this module is the one door to the wall clock


def now_us() -> int:
    """Return microseconds since the Unix epoch."""
    return time.time_ns() // 1000


def monotonic_us() -> int:
    """Return microseconds of the monotonic clock, for durations."""
    return time.monotonic_ns() // 1000


def rfc3339(epoch_us: int) -> str:
    """Format microseconds since the epoch as RFC 3339 in UTC, with microseconds."""
    seconds, micros = divmod(epoch_us, 1_000_000)
    return f"{_date_and_time(seconds)}.{micros:06d}Z"


def rfc3339_seconds(epoch_us: int) -> str:
    """Format microseconds since the epoch as RFC 3339 in UTC, to the second that has begun."""
    return _date_and_time(epoch_us // 1_000_000) + "Z"


def http_date(epoch_us: int) -> str:
    """Format microseconds since the epoch as HTTP does (RFC 9110, section 5.6.7)."""
    return _http_date(epoch_us // 1_000_000)


@functools.lru_cache(maxsize=8)  # many callers ask within the same second
def _date_and_time(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))


@functools.lru_cache(maxsize=2)
def _http_date(seconds: int) -> str:
    return formatdate(seconds, usegmt=True)
