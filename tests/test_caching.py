"""A cache that keeps the last asked for, and gives threads that ask together one value."""

import threading

import pytest

from dilated_attention_pytorch.caching import BoundedCache
from dilated_attention_pytorch.errors import InvalidInput


def test_the_cache_keeps_the_last_asked_for_and_no_more():
    cache, made = BoundedCache(2), []
    for key in (1, 2, 1, 3, 1, 2):
        assert cache.get(key, lambda key=key: made.append(key) or -key) == -key
    assert made == [1, 2, 3, 2]  # 2 was least lately asked for when 3 came
    assert len(cache) == 2
    with pytest.raises(InvalidInput, match="at least 1"):
        BoundedCache(0)


def test_threads_that_ask_together_get_one_value():
    cache, start, found = BoundedCache(4), threading.Barrier(8), []

    def ask(number):
        start.wait()
        for step in range(300):
            key = (number + step) % 6
            value = cache.get(key, lambda key=key: (key, object()))
            assert value[0] == key
            assert len(cache) <= 5  # one may be on its way out
        found.append(cache.get("last", object))

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(found) == 8
    assert len(cache) == 4
