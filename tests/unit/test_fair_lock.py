"""The lock behind which the writers of SQLite queue up."""

import threading

import pytest

from app.fair_lock import FairLock
from tests.helpers.servers import wait_until


def test_threads_get_the_lock_one_by_one_in_the_order_in_which_they_ask() -> None:
    lock, order, inside = FairLock(), list[int](), list[int]()

    def take(number: int) -> None:
        with lock:
            inside.append(number)
            order.append(number)
            assert inside == [number]
            inside.remove(number)

    threads = [threading.Thread(target=take, args=(number,)) for number in range(20)]
    with lock:
        for number, thread in enumerate(threads):
            thread.start()
            wait_until(lambda count=number + 1: len(lock._turns) == count, "the thread's turn")  # type: ignore[misc]
        assert not order
    for thread in threads:
        thread.join()
    assert order == list(range(20))


def test_an_error_gives_the_lock_back() -> None:
    lock = FairLock()
    with pytest.raises(ValueError, match="inside"), lock:
        raise ValueError("inside")
    with lock:
        pass
