import pytest
import torch

from dilated_attention_pytorch import InvalidInput
from dilated_attention_pytorch.nn import KeyValueCache, LayerCache


def rows(length, start=0, batch=2, heads=3, dim=4, **kind):
    x = torch.arange(start, start + length, dtype=torch.float32)
    return x[None, :, None, None].expand(batch, length, heads, dim).to(**kind)


def test_rows_come_back_in_order_and_capacity_doubles():
    cache, capacities = LayerCache(), []
    for start, length in [(0, 5), (5, 1), (6, 60), (66, 1), (67, 300), (367, 1)]:
        keys, values = cache.append(rows(length, start), -rows(length, start))
        assert torch.equal(keys, rows(start + length))
        assert torch.equal(values, -rows(start + length))
        capacities.append(cache.capacity)
    assert cache.length == 368
    assert capacities == [64, 64, 128, 128, 367, 734]
    assert cache.nbytes == 2 * 2 * 734 * 3 * 4 * 4


def test_single_rows_copy_few_rows():
    cache, grown = LayerCache(), 0
    for i in range(1000):
        before = cache.capacity
        cache.append(rows(1, i), rows(1, i))
        grown += cache.capacity != before
    assert grown == 5  # 64, 128, ..., 1024


def test_truncate_forgets_the_tail_only():
    cache = LayerCache()
    cache.append(rows(10), rows(10))
    cache.truncate(4)
    keys, _ = cache.append(rows(2, 50), rows(2, 50))
    assert keys[0, :, 0, 0].tolist() == [0, 1, 2, 3, 50, 51]
    with pytest.raises(InvalidInput, match="between 0 and 6"):
        cache.truncate(7)


@pytest.mark.parametrize(
    "other",
    [rows(1, batch=1), rows(1, heads=1), rows(1, dim=8), rows(1, dtype=torch.float64), rows(1, device="meta")],
    ids=["batch", "heads", "dim", "dtype", "device"],
)
def test_rows_of_another_kind_change_nothing(other):
    cache = LayerCache()
    cache.append(rows(3), rows(3))
    with pytest.raises(InvalidInput, match="another batch or model"):
        cache.append(other, other)
    assert cache.length == 3
    assert torch.equal(cache.append(rows(1, 3), rows(1, 3))[0], rows(4))


def test_gradients_are_refused():
    x = rows(1).clone().requires_grad_()
    with pytest.raises(InvalidInput, match="no_grad"):
        LayerCache().append(x, rows(1))
    with torch.no_grad():
        LayerCache().append(x, x)


def test_a_model_cache_is_as_long_as_its_shortest_layer():
    cache = KeyValueCache(2)
    cache.layers[0].append(rows(3), rows(3))
    assert cache.length == 0
    cache.layers[1].append(rows(2), rows(2))
    assert cache.length == 2
    cache.truncate(1)
    assert [layer.length for layer in cache.layers] == [1, 1]
    with pytest.raises(InvalidInput, match="at least 1"):
        KeyValueCache(0)
