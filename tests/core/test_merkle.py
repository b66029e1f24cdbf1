"""The ledger's tree against the RFC's own definitions, written out here a second time, and the vectors
of the Certificate Transparency reference implementation."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guestlib.attest.merkle import leaf_hash, node_hash
from hostd.core import merkle
from hostd.core.merkle import EMPTY_ROOT, Frontier
from tests.support.merkletree import Tree

LEAVES = [
    bytes.fromhex(h)
    for h in (
        "",
        "00",
        "10",
        "2021",
        "3031",
        "40414243",
        "5051525354555657",
        "606162636465666768696a6b6c6d6e6f",
    )
]
ROOTS = [
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]
# (leaf, tree size) → path; trillian's and certificate-transparency's merkle tests.
INCLUSION = {
    (0, 1): [],
    (0, 8): [
        "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
    ],
    (5, 8): [
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
        "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    ],
    (2, 3): ["fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125"],
    (1, 5): [
        "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
    ],
}
CONSISTENCY = {
    (1, 1): [],
    (1, 8): [
        "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
    ],
    (6, 8): [
        "0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a",
        "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    ],
    (2, 5): [
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
    ],
}


def tree_of(entries: list[bytes]) -> Tree:
    tree = Tree()
    for entry in entries:
        tree.append(leaf_hash(entry))
    return tree


# ── RFC 9162, section 2.1, word for word ──────────────────────────────────────────────────────────


def sha(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def mth(d: list[bytes]) -> bytes:
    """2.1.1, the definition."""
    if not d:
        return sha(b"")
    if len(d) == 1:
        return sha(b"\x00" + d[0])
    k = 1
    while k * 2 < len(d):
        k *= 2
    return sha(b"\x01" + mth(d[:k]) + mth(d[k:]))


def verify_inclusion(leaf: bytes, index: int, size: int, path: list[bytes], root: bytes) -> bool:
    """2.1.3.2."""
    if index >= size:
        return False
    fn, sn, r = index, size - 1, leaf
    for p in path:
        if sn == 0:
            return False
        if fn & 1 or fn == sn:
            r = sha(b"\x01" + p + r)
            while not fn & 1 and fn != 0:
                fn >>= 1
                sn >>= 1
        else:
            r = sha(b"\x01" + r + p)
        fn >>= 1
        sn >>= 1
    return sn == 0 and r == root


def verify_consistency(
    first: int, second: int, path: list[bytes], first_hash: bytes, second_hash: bytes
) -> bool:
    """2.1.4.2; two equal trees need no proof."""
    if first == second:
        return not path and first_hash == second_hash
    if not path:
        return False
    if first & (first - 1) == 0:
        path = [first_hash, *path]
    fn, sn = first - 1, second - 1
    while fn & 1:
        fn >>= 1
        sn >>= 1
    fr = sr = path[0]
    for c in path[1:]:
        if sn == 0:
            return False
        if fn & 1 or fn == sn:
            fr, sr = sha(b"\x01" + c + fr), sha(b"\x01" + c + sr)
            while not fn & 1 and fn != 0:
                fn >>= 1
                sn >>= 1
        else:
            sr = sha(b"\x01" + sr + c)
        fn >>= 1
        sn >>= 1
    return fr == first_hash and sr == second_hash and sn == 0


# ── Vectors ───────────────────────────────────────────────────────────────────────────────────────


def test_known_roots() -> None:
    tree = tree_of(LEAVES)
    assert Tree().root() == EMPTY_ROOT
    assert EMPTY_ROOT.hex() == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert [tree.root(n).hex() for n in range(1, 9)] == ROOTS
    assert tree.leaf(3) == leaf_hash(LEAVES[3])


@pytest.mark.parametrize("place", INCLUSION, ids=str)
def test_known_inclusion_proofs(place: tuple[int, int]) -> None:
    assert [h.hex() for h in tree_of(LEAVES).inclusion(*place)] == INCLUSION[place]


@pytest.mark.parametrize("place", CONSISTENCY, ids=str)
def test_known_consistency_proofs(place: tuple[int, int]) -> None:
    assert [h.hex() for h in tree_of(LEAVES).consistency(*place)] == CONSISTENCY[place]


def test_a_leaf_is_not_a_node() -> None:
    left, right = leaf_hash(b"a"), leaf_hash(b"b")
    assert node_hash(left, right) != leaf_hash(left + right)


# ── Against the oracle ────────────────────────────────────────────────────────────────────────────

ENTRIES = st.lists(st.binary(max_size=8), min_size=1, max_size=70)


@settings(deadline=None)
@given(ENTRIES, st.data())
def test_roots_and_inclusion(entries: list[bytes], data: st.DataObject) -> None:
    tree = tree_of(entries)
    size = data.draw(st.integers(1, len(entries)))
    index = data.draw(st.integers(0, size - 1))
    root = mth(entries[:size])
    assert tree.root(size) == root
    path = tree.inclusion(index, size)
    assert verify_inclusion(leaf_hash(entries[index]), index, size, path, root)
    assert not verify_inclusion(leaf_hash(entries[index] + b"!"), index, size, path, root)


@settings(deadline=None)
@given(ENTRIES, st.data())
def test_consistency(entries: list[bytes], data: st.DataObject) -> None:
    tree = tree_of(entries)
    new = data.draw(st.integers(1, len(entries)))
    old = data.draw(st.integers(1, new))
    path = tree.consistency(old, new)
    assert verify_consistency(old, new, path, mth(entries[:old]), mth(entries[:new]))
    forged = mth([*entries[: old - 1], entries[old - 1] + b"!"])
    assert not verify_consistency(old, new, path, forged, mth(entries[:new]))


def test_every_proof_of_every_small_tree() -> None:
    entries = [bytes([i]) for i in range(33)]
    tree = tree_of(entries)
    for size in range(1, 34):
        root = mth(entries[:size])
        for index in range(size):
            assert verify_inclusion(leaf_hash(entries[index]), index, size, tree.inclusion(index, size), root)
        for old in range(1, size + 1):
            assert verify_consistency(old, size, tree.consistency(old, size), mth(entries[:old]), root)


@settings(deadline=None)
@given(ENTRIES, ENTRIES, st.data())
def test_truncate_is_as_if_never_appended(
    entries: list[bytes], later: list[bytes], data: st.DataObject
) -> None:
    size = data.draw(st.integers(0, len(entries)))
    tree = tree_of(entries)
    tree.truncate(size)
    assert tree.size == size
    assert tree.root() == mth(entries[:size])
    for entry in later:
        tree.append(leaf_hash(entry))
    assert tree.root() == mth(entries[:size] + later)
    assert vars(tree)["_levels"][0] == vars(tree_of(entries[:size] + later))["_levels"][0]


@settings(deadline=None)
@given(st.lists(st.integers(0, 700), max_size=5))
def test_many_leaves_at_once(counts: list[int]) -> None:
    edge, tree, number = Frontier(), Tree(), 0
    for count in counts:
        leaves = [leaf_hash(b"%d" % i) for i in range(number, number + count)]
        number += count
        edge.extend(leaves)
        for leaf in leaves:
            tree.append(leaf)
    assert (edge.size, edge.root()) == (tree.size, tree.root())


# ── The ledger's own functions against the same oracle ────────────────────────────────────────────


@settings(deadline=None)
@given(ENTRIES, st.data())
def test_functions_over_nodes(entries: list[bytes], data: st.DataObject) -> None:
    levels: list[list[bytes]] = [[]]
    leaves = [leaf_hash(entry) for entry in entries]
    split = data.draw(st.integers(0, len(leaves)))
    merkle.grow(levels, leaves[:split])
    merkle.grow(levels, leaves[split:])

    def node(level: int, index: int) -> bytes:
        return levels[level][index]

    new = data.draw(st.integers(1, len(entries)))
    old = data.draw(st.integers(1, new))
    root = mth(entries[:new])
    assert merkle.root(node, new) == root
    path = merkle.inclusion(node, old - 1, new)
    assert verify_inclusion(leaves[old - 1], old - 1, new, path, root)
    proof = merkle.consistency(node, old, new)
    assert verify_consistency(old, new, proof, mth(entries[:old]), root)
    merkle.verify_consistency(old, mth(entries[:old]), new, root, proof)
    for other in (proof[1:], [*proof, root], [root, *proof[1:]]):
        if other != proof:
            with pytest.raises(ValueError, match=r"proof|not equal"):
                merkle.verify_consistency(old, mth(entries[:old]), new, root, other)
    with pytest.raises(ValueError, match=r"roots|not equal"):
        merkle.verify_consistency(old, mth([*entries[: old - 1], b"?" * 9]), new, root, proof)


@settings(deadline=None)
@given(ENTRIES)
def test_the_edge_is_the_largest_subtrees(entries: list[bytes]) -> None:
    edge, again = Frontier(), Frontier()
    done: dict[tuple[int, int], bytes] = {}
    for entry in entries:
        edge.append(leaf_hash(entry))
        for level, node in again.push(leaf_hash(entry)):
            done[level, (again.size >> level) - 1] = node
    assert edge.nodes == again.nodes == Frontier(edge.size, edge.nodes).nodes
    assert edge.root() == mth(entries)
    for (level, index), node in done.items():
        assert node == mth(entries[index << level : (index + 1) << level])
    for level in range(9):
        if edge.size >> level & 1:
            assert edge.at(level) == done[level, (edge.size >> level) - 1]
        else:
            with pytest.raises(ValueError, match="no edge at level"):
                edge.at(level)


def test_what_is_no_edge() -> None:
    for size, nodes in (
        (-1, []),
        (1, []),
        (2, [bytes(32)] * 2),
        (3, [bytes(32), bytes(31)]),
        (0, [bytes(32)]),
    ):
        with pytest.raises(ValueError, match="not the edge"):
            Frontier(size, nodes)
    with pytest.raises(ValueError, match="no subtree of level 3"):
        Frontier(1, [bytes(32)]).push(bytes(32), 3)


def test_what_does_not_exist_is_refused() -> None:
    tree = tree_of(LEAVES)
    for size in (-1, 9):
        with pytest.raises(ValueError, match="truncate"):
            tree.truncate(size)
        with pytest.raises(ValueError, match="no tree"):
            tree.root(size)
    for index, size in ((-1, 8), (8, 8), (3, 3), (0, 9), (0, 0)):
        with pytest.raises(ValueError, match="no leaf"):
            tree.inclusion(index, size)
    for old, new in ((0, 8), (-1, 8), (5, 4), (1, 9), (9, 9)):
        with pytest.raises(ValueError, match="no consistency"):
            tree.consistency(old, new)
    assert tree.size == 8
    assert tree.inclusion(7) == tree.inclusion(7, 8)
    assert tree.consistency(3) == tree.consistency(3, 8)
