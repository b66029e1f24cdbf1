"""Whose files are identified next."""

from __future__ import annotations

from hostd.core.findings import FILES, process_of
from hostd.vault.identifying import MAX_OPEN, MAX_OPEN_EACH, Identifying
from tests.vault.support_gate import VM_A, VM_B

A, B = process_of(VM_A), process_of(VM_B)


def drain(queue: Identifying) -> list[int]:
    """All that are given out, each done before the next."""
    given = []
    while (file := queue.next()) is not None:
        given.append(file)
        queue.done(file)
    return given


def test_each_file_once() -> None:
    queue = Identifying()
    for _ in range(2):
        queue.want(A, {1, 2, 3})
    queue.want(FILES, {1, 2, 3})
    queue.want(B, {3})
    assert sorted(drain(queue)) == [1, 2, 3]
    queue.want(A, {1})
    assert queue.next() == 1
    queue.want(B, {1})
    assert queue.next() is None


def test_so_many_at_once_and_so_many_for_one() -> None:
    queue = Identifying()
    queue.want(A, range(100))
    assert [queue.next() for _ in range(MAX_OPEN_EACH + 1)] == [0, 1, None]
    queue.want(B, range(100, 200))
    queue.want(FILES, range(200, 300))
    given = [queue.next() for _ in range(MAX_OPEN)]
    assert len([file for file in given if file is not None]) == MAX_OPEN - MAX_OPEN_EACH


def test_one_with_many_files_does_not_keep_another_waiting() -> None:
    """Even if the shared files' reading saw all of them first."""
    queue = Identifying()
    queue.want(FILES, range(1000))
    queue.want(A, range(990))
    queue.want(B, {995})
    first = drain(queue)[:3]
    assert 995 in first


def test_clear() -> None:
    queue = Identifying()
    queue.want(A, range(10))
    queue.next()
    queue.clear()
    assert queue.next() is None
    queue.want(A, range(10))
    assert sorted(drain(queue)) == list(range(10))
