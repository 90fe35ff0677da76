"""Batches are made one step ahead, in order, in another thread; errors come in their turn."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from src.errors import DataError
from src.training.prefetch import one_ahead


def counted(made: list[int], until: int, reached: threading.Condition) -> Iterator[int]:
    for number in range(until):
        with reached:
            made.append(number)
            reached.notify_all()
        yield number


def test_the_next_one_is_made_while_one_is_used_and_no_more() -> None:
    made: list[int] = []
    reached = threading.Condition()
    given = []
    for item in one_ahead(counted(made, 5, reached)):
        given.append(item)
        with reached:  # nothing but the thread makes it: this one waits here
            assert reached.wait_for(lambda item=item: len(made) >= min(item + 2, 5), timeout=60)
        assert len(made) <= item + 2
    assert given == made == [0, 1, 2, 3, 4]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_an_error_comes_in_its_turn() -> None:
    def broken() -> Iterator[int]:
        yield 1
        yield 2
        raise DataError("row 3")

    given = []
    with pytest.raises(DataError, match="row 3"):
        given.extend(one_ahead(broken()))
    given = [item for item, _ in zip(one_ahead(broken()), range(1), strict=False)]
    assert given == [1]


def test_who_leaves_early_leaves_no_thread() -> None:
    made: list[int] = []
    items = one_ahead(counted(made, 100, threading.Condition()))
    assert next(items) == 0
    items.close()
    assert len(made) <= 2
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches")]
