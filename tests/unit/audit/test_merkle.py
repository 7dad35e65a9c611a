"""The Merkle tree of RFC 6962."""

from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.audit.merkle import (
    EMPTY_ROOT,
    Frontier,
    consistency_proof,
    inclusion_proof,
    leaf_hash,
    node_hash,
    tree_root,
    verify_consistency,
    verify_inclusion,
)
from agent.errors import VerificationError

# Leaves and roots of the Certificate Transparency reference implementation's tree tests.
VECTOR_LEAVES = [
    bytes.fromhex(text)
    for text in ("", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f")
]
VECTOR_ROOTS = [
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]
leaf_lists = st.lists(st.binary(max_size=4).map(leaf_hash), min_size=1, max_size=70)


def naive_root(leaves):
    """MTH of RFC 6962 section 2.1, as it is written there."""
    if not leaves:
        return sha256(b"").digest()
    if len(leaves) == 1:
        return leaves[0]
    k = 1
    while k * 2 < len(leaves):
        k *= 2
    return sha256(b"\1" + naive_root(leaves[:k]) + naive_root(leaves[k:])).digest()


def naive_path(m, leaves):
    """PATH of RFC 6962 section 2.1.1."""
    if len(leaves) == 1:
        return []
    k = 1
    while k * 2 < len(leaves):
        k *= 2
    if m < k:
        return [*naive_path(m, leaves[:k]), naive_root(leaves[k:])]
    return [*naive_path(m - k, leaves[k:]), naive_root(leaves[:k])]


def naive_subproof(m, leaves, whole):
    """SUBPROOF of RFC 6962 section 2.1.2."""
    if m == len(leaves):
        return [] if whole else [naive_root(leaves)]
    k = 1
    while k * 2 < len(leaves):
        k *= 2
    if m <= k:
        return [*naive_subproof(m, leaves[:k], whole), naive_root(leaves[k:])]
    return [*naive_subproof(m - k, leaves[k:], False), naive_root(leaves[:k])]


@pytest.mark.parametrize("size", range(1, 9))
def test_roots_are_those_of_the_reference_implementation(size):
    """Every prefix of the published leaves has the published root."""
    assert tree_root(map(leaf_hash, VECTOR_LEAVES[:size])).hex() == VECTOR_ROOTS[size - 1]


def test_published_proofs_are_reproduced():
    """The inclusion proof of leaf 5 in 8 and the consistency proof 6 -> 8 are the published ones."""
    leaves = [leaf_hash(leaf) for leaf in VECTOR_LEAVES]
    assert [part.hex() for part in inclusion_proof(leaves, 5)] == [
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
        "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    ]
    assert [part.hex() for part in consistency_proof(leaves, 6)] == [
        "0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a",
        "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    ]


def test_the_empty_tree_has_the_hash_of_nothing():
    """Without leaves the root is SHA-256 of the empty string."""
    assert Frontier().root() == EMPTY_ROOT == sha256(b"").digest()


@given(leaf_lists)
def test_the_incremental_root_is_the_recursive_one(leaves):
    """Appending one by one gives the root of the recursive definition, also after a restart from the peaks."""
    assert tree_root(leaves) == naive_root(leaves)
    half = len(leaves) // 2
    tree = Frontier()
    for leaf in leaves[:half]:
        tree.append(leaf)
    again = Frontier(tree.size, tree.peaks)
    twin = tree.copy()
    for leaf in leaves[half:]:
        again.append(leaf)
    assert again.root() == naive_root(leaves)
    assert twin.root() == tree.root() == naive_root(leaves[:half])


@given(leaf_lists, st.data())
def test_inclusion_proofs_are_the_recursive_ones_and_hold(leaves, data):
    """Every proof equals PATH of the RFC, verifies, and fails for another index, root, leaf, size or number of hashes."""
    index = data.draw(st.integers(0, len(leaves) - 1))
    proof, root = inclusion_proof(leaves, index), tree_root(leaves)
    assert proof == naive_path(index, leaves)
    verify_inclusion(leaves[index], index, len(leaves), proof, root)
    other = sha256(b"other").digest()
    forged = [
        (other, index, len(leaves), proof, root),
        (leaves[index], index, len(leaves), proof, other),
        (leaves[index], index, len(leaves), [*proof, other], root),
        (leaves[index], index, len(leaves), proof[:-1], root) if proof else (other, 0, 1, [], root),
        (leaves[index], len(leaves), len(leaves), proof, root),
        (leaves[index], -1, len(leaves), proof, root),
        (leaves[index], index, 2 * len(leaves) + 1, proof, root),
    ]
    for case in forged:
        with pytest.raises(VerificationError) as caught:
            verify_inclusion(*case)
        assert caught.value.check == "inclusion-proof"


@given(leaf_lists, st.data())
def test_consistency_proofs_are_the_recursive_ones_and_hold(leaves, data):
    """Every proof equals PROOF of the RFC, verifies, and fails for other roots, sizes or hashes."""
    size = data.draw(st.integers(1, len(leaves)))
    proof, old, new = consistency_proof(leaves, size), tree_root(leaves[:size]), tree_root(leaves)
    assert proof == naive_subproof(size, leaves, True)
    verify_consistency(size, len(leaves), old, new, proof)
    other = sha256(b"other").digest()
    forged = [
        (size, len(leaves), other, new, proof),
        (size, len(leaves), old, other, proof),
        (size, len(leaves), old, new, [*proof, other]),
        (0, len(leaves), old, new, proof),
        (len(leaves) + 1, len(leaves), old, new, proof),
    ]
    if proof:
        forged += [(size, len(leaves), old, new, proof[:-1]), (size, len(leaves), old, new, [])]
    for case in forged:
        with pytest.raises(VerificationError) as caught:
            verify_consistency(*case)
        assert caught.value.check == "consistency-proof"


def test_a_rewritten_history_has_no_proof():
    """A tree in which an old leaf was changed is not consistent with the old root, whatever its own proof says."""
    leaves = [leaf_hash(bytes([n])) for n in range(11)]
    forged = [*leaves[:3], leaf_hash(b"x"), *leaves[4:]]
    with pytest.raises(VerificationError):
        verify_consistency(6, 11, tree_root(leaves[:6]), tree_root(forged), consistency_proof(forged, 6))


@pytest.mark.parametrize(
    ("size", "peaks"), [(-1, []), (1, []), (0, [b"\0" * 32]), (3, [b"\0" * 32]), (1, [b"\0"]), (2**53, [b"\0" * 32])]
)
def test_a_frontier_that_fits_no_tree_is_refused(size, peaks):
    """The number and the length of the peaks must fit the size."""
    with pytest.raises(VerificationError):
        Frontier(size, peaks)


@pytest.mark.parametrize("index", [-1, 3])
def test_a_proof_of_what_is_not_there_is_refused(index):
    """A proof for a leaf outside the tree, or an older tree larger than the tree, can't be made."""
    leaves = [leaf_hash(bytes([n])) for n in range(3)]
    with pytest.raises(IndexError):
        inclusion_proof(leaves, index)
    with pytest.raises(IndexError):
        consistency_proof(leaves, index + 1 if index > 0 else index)


def test_the_parts_are_domain_separated():
    """A record that looks like a node's content has another hash than the node."""
    left, right = leaf_hash(b"a"), leaf_hash(b"b")
    assert leaf_hash(left + right) != node_hash(left, right)
