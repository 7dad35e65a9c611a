"""The last policy that was in force, kept over restarts in the state directory.

Rules:

1. A new bundle is whole on the disk before it takes the old one's name; a crash leaves either.
2. That is done in two steps, so that a policy can be measured in between: what needs space on the disk fails in the first.
3. What is read back is a bundle like any other: it is verified, tried and measured again.
"""

import os
from pathlib import Path

from agent.errors import HostError
from agent.policy.bundle import MAX_BUNDLE_BYTES

__all__ = ["LAST_GOOD_FILE", "commit", "load_last_good", "stage"]

LAST_GOOD_FILE = "policy.tar.gz"
_MODE = 0o600


def stage(directory: Path, name: str, content: bytes) -> None:
    """Write the next content of a file beside it, durably.

    Raises:
        HostError: the directory cannot be written.
    """
    fresh = directory / f"{name}.new"
    try:
        fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, _MODE)
        with os.fdopen(fd, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise HostError(f"{fresh}: the policy in force cannot be kept: {error.strerror}") from error


def commit(directory: Path, name: str) -> None:
    """Put what was staged in its place.

    Raises:
        HostError: the directory cannot be written.
    """
    target = directory / name
    try:
        (directory / f"{name}.new").replace(target)
        folder = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise HostError(f"{target}: the policy in force cannot be kept: {error.strerror}") from error


def load_last_good(directory: Path) -> bytes | None:
    """Return the bundle that was kept; None when there is none.

    Raises:
        HostError: it cannot be read, or is larger than a bundle can be.
    """
    target = directory / LAST_GOOD_FILE
    try:
        with target.open("rb") as file:
            bundle = file.read(MAX_BUNDLE_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise HostError(f"{target}: the last policy cannot be read: {error.strerror}") from error
    if len(bundle) > MAX_BUNDLE_BYTES:
        raise HostError(f"{target}: over {MAX_BUNDLE_BYTES} bytes, which no bundle has")
    return bundle
