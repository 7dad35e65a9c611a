"""A small assembler for seccomp filters: from an allowlist to classic BPF.

Rules (Documentation/userspace-api/seccomp_filter.rst):

1. The machine is checked before the number is read, because numbers mean something else elsewhere: a foreign machine,
   and the x32 calls of x86-64, kill the process.
2. What is not allowed answers ``EPERM``; a few calls answer ``ENOSYS``, for which libraries have a fallback.
3. A condition on an argument compares 32 bits where the kernel takes an ``int``, and all 64 bits where it takes a
   ``long``, so that the filter sees just what the kernel will act on. A pointer's target cannot be checked.

The program is a list of blocks, one for each system call, each of which ends with a verdict: no jump is long.
"""

import errno
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from agent.isolation.kernel import syscall_number

__all__ = ["ALLOW", "KILL", "Call", "Condition", "Instruction", "assemble", "denied_with", "encode"]

Instruction: TypeAlias = tuple[int, int, int, int]
"""``code, jump if true, jump if false, k`` of ``struct sock_filter``."""

ALLOW = 0x7FFF0000  # SECCOMP_RET_ALLOW
KILL = 0x80000000  # SECCOMP_RET_KILL_PROCESS
_ERRNO = 0x00050000  # SECCOMP_RET_ERRNO

_LOAD = 0x20  # BPF_LD | BPF_W | BPF_ABS
_AND = 0x54  # BPF_ALU | BPF_AND | BPF_K
_JUMP_EQUAL = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_JUMP_AT_LEAST = 0x35  # BPF_JMP | BPF_JGE | BPF_K
_RETURN = 0x06  # BPF_RET | BPF_K

# Offsets in struct seccomp_data; both machines are little-endian, so an argument's low word comes first.
_AT_NUMBER, _AT_MACHINE, _AT_ARGUMENTS = 0, 4, 16
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_X32_BIT = 0x40000000
_WORD = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Condition:
    """``argument & mask`` must be one of ``values``.

    Attributes:
        argument: index 0-5.
        values: what is allowed after masking, each 0 <= value < 2**32.
        mask: bits of the low word that count.
        wide: the kernel takes 64 bits here: the high word must be 0 as well.
    """

    argument: int
    values: tuple[int, ...]
    mask: int = _WORD
    wide: bool = False


@dataclass(frozen=True, slots=True)
class Call:
    """A system call that is allowed when all conditions of any one alternative hold; no alternative: always."""

    name: str
    alternatives: tuple[tuple[Condition, ...], ...] = ()


def denied_with(code: int) -> int:
    """Return the verdict that makes a call fail with this errno."""
    return _ERRNO | code


def assemble(calls: Sequence[Call], machine: str, *, missing: Sequence[str] = ()) -> list[Instruction]:
    """Write the filter for an allowlist.

    Args:
        calls: what is allowed; calls that the machine does not have are left out.
        machine: ``x86_64`` or ``aarch64``.
        missing: calls that answer ``ENOSYS``.
    """
    program: list[Instruction] = [
        (_LOAD, 0, 0, _AT_MACHINE),
        (_JUMP_EQUAL, 1, 0, _AUDIT_ARCH[machine]),
        (_RETURN, 0, 0, KILL),
        (_LOAD, 0, 0, _AT_NUMBER),
    ]
    if machine == "x86_64":
        program += [(_JUMP_AT_LEAST, 0, 1, _X32_BIT), (_RETURN, 0, 0, KILL)]
    for call in calls:
        program += _block(syscall_number(call.name, machine), _verdict_of(call))
    for name in missing:
        program += _block(syscall_number(name, machine), [(_RETURN, 0, 0, denied_with(errno.ENOSYS))])
    return [*program, (_RETURN, 0, 0, denied_with(errno.EPERM))]


def encode(program: Sequence[Instruction]) -> bytes:
    """Return the program as an array of ``struct sock_filter``."""
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in program)


def _block(number: int | None, body: list[Instruction]) -> list[Instruction]:
    if number is None:
        return []
    return [(_JUMP_EQUAL, 0, len(body), number), *body]


def _verdict_of(call: Call) -> list[Instruction]:
    if not call.alternatives:
        return [(_RETURN, 0, 0, ALLOW)]
    body: list[Instruction] = []
    for conditions in call.alternatives:
        alternative: list[Instruction] = [(_RETURN, 0, 0, ALLOW)]
        for condition in reversed(conditions):
            alternative = _test(condition, len(alternative)) + alternative
        body += alternative
    return [*body, (_RETURN, 0, 0, denied_with(errno.EPERM))]


def _test(condition: Condition, rest: int) -> list[Instruction]:
    """Fall through to the ``rest`` instructions that follow when the condition holds, else jump past them."""
    at = _AT_ARGUMENTS + 8 * condition.argument
    count = len(condition.values)
    test: list[Instruction] = []
    if condition.wide:
        after = 1 + (condition.mask != _WORD) + count + rest
        test += [(_LOAD, 0, 0, at + 4), (_JUMP_EQUAL, 0, after, 0)]
    test.append((_LOAD, 0, 0, at))
    if condition.mask != _WORD:
        test.append((_AND, 0, 0, condition.mask))
    for index, value in enumerate(condition.values):
        last = index == count - 1
        test.append((_JUMP_EQUAL, count - 1 - index, rest if last else 0, value))
    return test
