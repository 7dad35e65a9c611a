"""Inspection of a package, seen from the agent: a process of its own looks into the model, the agent never does.

Rules:

1. The agent imports neither a graph parser nor a runtime; both live in the inspector (:mod:`agent.inference.inspector`).
2. The inspector's death is a refusal. A model that crashes the parser, eats the memory or does not come to an end costs
   that one process, and is not loaded.
3. A report is believed only as far as a process that read hostile bytes can be believed: it can refuse a good model or
   pass a bad one, but everything else about the package (digest, signature) was settled before, by the agent.
"""

import asyncio

import msgspec

from agent.errors import IsolationError, VerificationError
from agent.inference.handover import handover_frames
from agent.inference.package import Package
from agent.inference.report import InspectionReport, Refusal
from agent.isolation.channel import AsyncChannel, Frame
from agent.isolation.sandbox import Limits, Profile
from agent.isolation.supervisor import ChildSpec, Zygote

__all__ = ["DEADLINE_S", "ENTRY", "inspect"]

ENTRY = "agent.inference.inspector:main"
DEADLINE_S = 120.0
MAX_REPORT_BYTES = 1 << 20
_BASE_BYTES = 1 << 30  # address space: runtime, threads' stacks and arenas
_COPIES = 4  # of the package's bytes: parsed graph, runtime's copy, its optimized weights, room
_OPEN_FILES = 640  # a descriptor for each file, and the one that its mapping holds


async def inspect(zygote: Zygote, package: Package, deadline_s: float = DEADLINE_S) -> InspectionReport:
    """Have a package inspected by a process of its own (the agent's side).

    Args:
        zygote: may have preloaded :mod:`agent.inference.inspector`; else each inspector imports it, before its sandbox.
        package: verified already; it keeps its descriptors.
        deadline_s: after it the inspector is killed and the model refused.

    Raises:
        VerificationError: what the inspector refused, or ``inspector``: it died, went on for too long or told nonsense.
        IsolationError: no process could be started.
    """
    size = sum(sealed.size for sealed in package.files.values())
    limits = Limits(headroom_bytes=_BASE_BYTES + _COPIES * size, open_files=_OPEN_FILES)
    handle = await zygote.spawn(ChildSpec(profile=Profile.INSPECTOR, entry=ENTRY, limits=limits))
    answer = _Answer()
    channel = AsyncChannel(handle.sock, answer.take, answer.closed.set)
    try:
        async with asyncio.timeout(deadline_s):
            for frame, fds in handover_frames(package):
                channel.send(frame, fds)
            await answer.closed.wait()
    except TimeoutError as error:
        raise VerificationError("inspector", f"no result within {deadline_s:g} s") from error
    except IsolationError as error:
        raise VerificationError("inspector", f"it ended before it had the package ({error})") from error
    finally:
        channel.close()
        handle.kill()
        status = await handle.wait()
    if not answer.data:
        raise VerificationError("inspector", f"the model brought the inspector down: {status}")
    return answer.decoded()


class _Answer:
    """Collects what an inspector says, up to a limit."""

    def __init__(self) -> None:
        self.closed = asyncio.Event()
        self.data = b""

    def take(self, frame: Frame) -> None:
        frame.close_fds()
        if len(self.data) <= MAX_REPORT_BYTES:
            self.data += frame.data

    def decoded(self) -> InspectionReport:
        try:
            report = msgspec.json.decode(self.data, type=InspectionReport | Refusal)
        except (ValueError, RecursionError) as error:
            raise VerificationError("inspector", f"its report is malformed ({error})") from error
        if isinstance(report, Refusal):
            raise VerificationError(report.check[:64], report.message[:1000])
        return report
