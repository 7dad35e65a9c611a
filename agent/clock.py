"""The only reader of the wall clock, so that a test can see every place that depends on it."""

import time

__all__ = ["monotonic_us", "now", "now_us", "rfc3339"]


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
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{micros:06d}Z"
