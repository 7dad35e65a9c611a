"""The Merkle tree of RFC 6962 section 2.1 over the records of the log: pure, bytes in and bytes out.

Rules:

1. A leaf is ``SHA-256(0x00 || record)``, a node ``SHA-256(0x01 || left || right)``, the empty tree's root ``SHA-256("")``.
2. Appending keeps the *frontier* alone: the roots of the complete subtrees, largest first, one for each bit that is set
   in the size. It is all that a segment needs to carry for the tree to go on when everything before it is gone.
3. A proof is verified with the algorithms of RFC 9162 sections 2.1.3.2 and 2.1.4.2; one that has a hash too many or too
   few fails, as does an index outside the tree.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import sha256

from agent.errors import VerificationError

__all__ = [
    "EMPTY_ROOT",
    "HASH_BYTES",
    "MAX_TREE_SIZE",
    "Frontier",
    "consistency_proof",
    "inclusion_proof",
    "leaf_hash",
    "node_hash",
    "tree_root",
    "verify_consistency",
    "verify_inclusion",
]

HASH_BYTES = 32
MAX_TREE_SIZE = 2**53 - 1  # records; a sequence number must fit canonical JSON
EMPTY_ROOT = sha256(b"").digest()


def leaf_hash(record: bytes) -> bytes:
    """Hash one record as a leaf."""
    return sha256(b"\0" + record).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """Hash two subtrees into their parent."""
    return sha256(b"\1" + left + right).digest()


class Frontier:
    """A tree that only grows, reduced to what its growth and its root need.

    Args:
        size: number of leaves.
        peaks: roots of the complete subtrees, largest first, one for each bit that is set in ``size``.

    Raises:
        VerificationError: ``frontier``, when the number or the length of the peaks does not fit the size.
    """

    __slots__ = ("_peaks", "_size")

    def __init__(self, size: int = 0, peaks: Iterable[bytes] = ()) -> None:
        self._size = size
        self._peaks = list(peaks)
        if not 0 <= size <= MAX_TREE_SIZE:
            raise VerificationError("frontier", f"a tree of {size} records is outside 0..{MAX_TREE_SIZE}")
        if len(self._peaks) != size.bit_count() or any(len(peak) != HASH_BYTES for peak in self._peaks):
            raise VerificationError(
                "frontier", f"{len(self._peaks)} subtree hashes do not make a tree of {size} records"
            )

    @property
    def size(self) -> int:
        """Number of leaves."""
        return self._size

    @property
    def peaks(self) -> tuple[bytes, ...]:
        """Roots of the complete subtrees, largest first."""
        return tuple(self._peaks)

    def copy(self) -> Frontier:
        """Return an independent tree of the same leaves."""
        twin = Frontier()
        twin._size, twin._peaks = self._size, self._peaks.copy()
        return twin

    def append(self, leaf: bytes) -> None:
        """Add one leaf hash: as many merges as the size has trailing one bits, two on average."""
        below = self._size
        while below & 1:
            leaf = node_hash(self._peaks.pop(), leaf)
            below >>= 1
        self._peaks.append(leaf)
        self._size += 1

    def root(self) -> bytes:
        """Return the root of the whole tree."""
        if not self._peaks:
            return EMPTY_ROOT
        *rest, root = self._peaks
        for peak in reversed(rest):
            root = node_hash(peak, root)
        return root


def tree_root(leaves: Iterable[bytes]) -> bytes:
    """Return the root over leaf hashes."""
    tree = Frontier()
    for leaf in leaves:
        tree.append(leaf)
    return tree.root()


def _split(size: int) -> int:
    """Return the largest power of two smaller than ``size``."""
    return 1 << ((size - 1).bit_length() - 1)


def inclusion_proof(leaves: Sequence[bytes], index: int) -> list[bytes]:
    """Prove that a leaf stands at ``index``: ``PATH(index, leaves)``, the sibling nearest to the leaf first.

    Raises:
        IndexError: there is no such leaf.
    """
    if not 0 <= index < len(leaves):
        raise IndexError(f"no leaf {index} in a tree of {len(leaves)}")
    path: list[bytes] = []
    start, end = 0, len(leaves)
    while end - start > 1:
        middle = start + _split(end - start)
        if index < middle:
            path.append(tree_root(leaves[middle:end]))
            end = middle
        else:
            path.append(tree_root(leaves[start:middle]))
            start = middle
    return path[::-1]


def consistency_proof(leaves: Sequence[bytes], old_size: int) -> list[bytes]:
    """Prove that the first ``old_size`` leaves are a prefix of the tree: ``PROOF(old_size, leaves)``.

    Raises:
        IndexError: ``old_size`` is not in 1..len(leaves).
    """
    if not 0 < old_size <= len(leaves):
        raise IndexError(f"no earlier tree of {old_size} in a tree of {len(leaves)}")
    proof: list[bytes] = []
    start, end, whole = 0, len(leaves), True
    while old_size < end:
        middle = start + _split(end - start)
        if old_size <= middle:
            proof.append(tree_root(leaves[middle:end]))
            end = middle
        else:
            proof.append(tree_root(leaves[start:middle]))
            start, whole = middle, False
    if not whole:
        proof.append(tree_root(leaves[start:end]))
    return proof[::-1]


def _sides(check: str, at: int, last: int, count: int) -> list[bool]:
    """Say for each of ``count`` hashes on the way from node ``at`` up to the root whether it stands on the left.

    ``last`` is the index of the rightmost node at the level of ``at``; at the right edge, levels without a sibling are
    left out of a proof. This is the loop that RFC 9162 gives twice.
    """
    sides = []
    for _ in range(count):
        if last == 0:
            raise VerificationError(check, "the proof has too many hashes")
        left = bool(at & 1) or at == last
        if left:
            while not at & 1 and at:
                at >>= 1
                last >>= 1
        sides.append(left)
        at >>= 1
        last >>= 1
    if last != 0:
        raise VerificationError(check, "the proof has too few hashes")
    return sides


def verify_inclusion(leaf: bytes, index: int, size: int, proof: Sequence[bytes], root: bytes) -> None:
    """Verify that the leaf hash stands at ``index`` in the tree of ``size`` leaves with this root (RFC 9162 2.1.3.2).

    Raises:
        VerificationError: ``inclusion-proof``.
    """
    check = "inclusion-proof"
    # 1. The leaf lies inside the tree.
    if not 0 <= index < size:
        raise VerificationError(check, f"record {index} is outside a tree of {size}")
    # 2. The proof has exactly the hashes that lie on the way to the root.
    sides = _sides(check, index, size - 1, len(proof))
    # 3. They lead to the root that was asked for.
    for sibling, left in zip(proof, sides, strict=True):
        leaf = node_hash(sibling, leaf) if left else node_hash(leaf, sibling)
    if leaf != root:
        raise VerificationError(check, f"record {index} is not in the tree with this root")


def verify_consistency(old_size: int, new_size: int, old_root: bytes, new_root: bytes, proof: Sequence[bytes]) -> None:
    """Verify that the older tree is a prefix of the newer one (RFC 9162 2.1.4.2).

    Raises:
        VerificationError: ``consistency-proof``.
    """
    check = "consistency-proof"
    # 1. The sizes are in order; equal trees need equal roots and no proof.
    if not 0 < old_size <= new_size:
        raise VerificationError(check, f"a tree of {old_size} can't come before one of {new_size}")
    if old_size == new_size:
        if proof or old_root != new_root:
            raise VerificationError(check, "two trees of one size differ, or the proof is not empty")
        return
    # 2. A complete older tree is its own first hash.
    hashes = list(proof) if old_size & (old_size - 1) else [old_root, *proof]
    if not hashes:
        raise VerificationError(check, "the proof has too few hashes")
    # 3. The way starts at the largest complete subtree that ends with the older tree's last leaf, and the proof has
    #    exactly the hashes that lie on it.
    skipped = (old_size & -old_size).bit_length() - 1
    sides = _sides(check, (old_size - 1) >> skipped, (new_size - 1) >> skipped, len(hashes) - 1)
    # 4. Both roots, rebuilt side by side, are the ones that were asked for.
    older = newer = hashes[0]
    for sibling, left in zip(hashes[1:], sides, strict=True):
        newer = node_hash(sibling, newer) if left else node_hash(newer, sibling)
        if left:
            older = node_hash(sibling, older)
    if older != old_root or newer != new_root:
        raise VerificationError(check, f"the tree of {old_size} is no prefix of the tree of {new_size}")
