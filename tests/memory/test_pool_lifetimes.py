"""A buffer comes back when its storage dies, whatever held it, and not before."""

import copy
import gc
import weakref

import pytest
import torch
from pools import SHAPE, live, make


def keep_view(x):
    return x[3:]


def keep_detached(x):
    return x.detach()


def keep_data(x):
    return x.data


def keep_other_shape(x):
    return x.view(-1)[::2]


def keep_storage(x):
    return x.untyped_storage()


def keep_array(x):
    return x.numpy()


def keep_copy(x):
    return copy.copy(x)


def keep_graph(x):
    weight = torch.ones(SHAPE, requires_grad=True)
    return weight * x  # saves x for the gradient of weight


def keep_graph_of_view(x):
    return keep_graph(x.view(8, 64).t())


KEEPERS = [
    keep_view,
    keep_detached,
    keep_data,
    keep_other_shape,
    keep_storage,
    keep_array,
    keep_copy,
    keep_graph,
    keep_graph_of_view,
]


@pytest.mark.parametrize("keep", KEEPERS, ids=lambda f: f.__name__)
def test_a_buffer_is_live_while_anything_holds_its_storage(keep):
    pool = make()
    x = pool.get_buffer(SHAPE).fill_(3)
    address, tensor = x.data_ptr(), weakref.ref(x)
    held = keep(x)
    del x
    if keep in (keep_detached, keep_data, keep_storage, keep_copy):
        assert tensor() is None, "the tensor's own end says nothing of its storage"
    assert live(pool) == 1
    other = pool.get_buffer(SHAPE).fill_(5)
    assert other.data_ptr() != address
    del held
    assert live(pool) == 1, "only the other one"
    assert pool.get_buffer(SHAPE).data_ptr() == address


def test_what_autograd_saved_is_right_and_comes_back_after_backward():
    pool, weight = make(), torch.ones(SHAPE, requires_grad=True)
    x = pool.get_buffer(SHAPE).fill_(3)
    y = (weight * x).sum()
    del x
    pool.get_buffer(SHAPE).fill_(9)
    y.backward()
    assert bool((weight.grad == 3).all())
    assert live(pool) == 0


def test_copies_own_their_memory():
    pool = make()
    x = pool.get_buffer(SHAPE).fill_(2)
    copied = copy.deepcopy(x)
    del x
    assert live(pool) == 0
    pool.get_buffer(SHAPE).fill_(7)
    assert bool((copied == 2).all())


def test_memory_moved_away_comes_back():
    pool = make()
    x = pool.get_buffer(SHAPE).fill_(2)
    x.share_memory_()  # the storage has other memory now
    assert live(pool) == 0
    pool.get_buffer(SHAPE).fill_(7)
    assert bool((x == 2).all())
    with pytest.raises(RuntimeError, match="not resizable"):
        pool.get_buffer(SHAPE).resize_(10_000)


def test_borrowed_memory_is_back_at_the_end():
    pool = make()
    for pattern in (torch.float32, torch.bfloat16):
        with pool.borrow(SHAPE, pattern) as x:
            assert live(pool) == 1
            x.fill_(1)
        assert x.shape == (0,)
        assert live(pool) == 0
    with pool.borrow(SHAPE) as x:
        view = x[2:].fill_(4)
    assert live(pool) == 1, "a view keeps it"
    pool.get_buffer(SHAPE).fill_(6)
    assert bool((view == 4).all())


def test_a_backward_over_returned_memory_raises():
    pool, weight = make(), torch.ones(SHAPE, requires_grad=True)
    with pool.borrow(SHAPE) as x:
        y = (weight * x.fill_(2)).sum()
    with pytest.raises(RuntimeError, match="inplace"):
        y.backward()
    with pytest.raises(KeyError), pool.borrow(SHAPE) as x:
        raise KeyError
    assert x.numel() == 0


def test_a_pool_that_is_gone_leaves_no_hook_and_valid_buffers():
    gc.collect()
    before = len(gc.callbacks)
    pool = make()
    x = pool.get_buffer(SHAPE).fill_(3)
    reference = weakref.ref(pool)
    assert len(gc.callbacks) == before + 1
    del pool
    gc.collect()
    assert reference() is None
    assert len(gc.callbacks) == before
    assert bool((x == 3).all())
