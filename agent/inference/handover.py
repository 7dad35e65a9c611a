"""How a package's sealed files travel from the agent to a child: pure, for blocking and asynchronous channels alike.

Rules:

1. A frame names up to :data:`FILES_A_FRAME` files and carries their descriptors in the same order; the last one says so.
   (A message holds fewer descriptors than a package may have files.)
2. The receiver checks every seal: the bytes it maps are the bytes that the agent hashed, for good.
"""

from collections.abc import Iterator

import msgspec

from agent.errors import EdgeWardenError, IsolationError
from agent.inference.package import Package
from agent.isolation.channel import Frame
from agent.isolation.memfd import check_sealed

__all__ = ["FILES_A_FRAME", "IncomingFiles", "handover_frames"]

FILES_A_FRAME = 128  # files; times the longest path this stays below a frame's size


class _Batch(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    names: list[str]
    last: bool


def handover_frames(package: Package) -> Iterator[tuple[bytes, tuple[int, ...]]]:
    """Return frames with their descriptors, to be sent in this order; the package keeps its own descriptors."""
    files = list(package.files.items())
    for start in range(0, len(files), FILES_A_FRAME):
        batch = files[start : start + FILES_A_FRAME]
        last = start + FILES_A_FRAME >= len(files)
        yield (
            msgspec.json.encode(_Batch([path for path, _ in batch], last)),
            tuple(sealed.fd for _, sealed in batch),
        )


class IncomingFiles:
    """Collects the frames of one hand-over."""

    def __init__(self) -> None:
        self.files: dict[str, int] = {}

    def add(self, frame: Frame) -> bool:
        """Take a frame and its descriptors; returns True once all have come.

        Raises:
            IsolationError: it is malformed, or a file is not completely sealed.
        """
        try:
            batch = msgspec.json.decode(frame.data, type=_Batch)
            if len(batch.names) != len(frame.fds) or self.files.keys() & set(batch.names):
                raise IsolationError("hand-over: names and descriptors don't match")
            for fd in frame.fds:
                check_sealed(fd)
        except (ValueError, RecursionError) as error:
            frame.close_fds()
            raise IsolationError(f"hand-over: malformed ({error})") from error
        except EdgeWardenError:
            frame.close_fds()
            raise
        self.files.update(zip(batch.names, frame.fds, strict=True))
        return batch.last
