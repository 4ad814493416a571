"""Buffers that grow, are handed out again, and hold NaN where tests ask for it."""

import threading

import torch

from dilated_attention_pytorch import Causal, attend, longnet
from dilated_attention_pytorch.memory import Workspace, empty, fill_with_nan


def test_a_buffer_is_handed_out_again():
    work = Workspace(torch.float32, "cpu")
    a = work.take("a", (4, 8))
    assert a.is_contiguous()
    assert a.shape == (4, 8)
    assert work.take("a", (2, 3)).data_ptr() == a.data_ptr()
    assert work.take("b", (4, 8)).data_ptr() != a.data_ptr()


def test_it_grows_to_the_largest_request():
    work = Workspace(torch.float64, "cpu")
    small = work.take("a", (2,))
    large = work.take("a", (50,))
    assert large.numel() == 50
    assert large.dtype == torch.float64
    assert work.take("a", (50,)).data_ptr() == large.data_ptr()
    small.fill_(1)  # an old view stays memory of its own
    assert work.take("c", (0, 3)).shape == (0, 3)


def test_fill_with_nan_holds_inside_only():
    with fill_with_nan():
        assert bool(empty((3,), torch.float32, "cpu").isnan().all())
        work = Workspace(torch.bfloat16, "cpu")
        work.take("a", (4,)).zero_()
        assert bool(work.take("a", (4,)).isnan().all()), "what an earlier chunk left is poisoned too"
    assert not bool(empty((3,), torch.float32, "cpu").fill_(0).isnan().any())
    x = empty((2, 3), torch.float16, "cpu")
    assert x.shape == (2, 3)
    assert x.dtype == torch.float16


def test_other_threads_are_not_poisoned():
    found = []

    def look():
        work = Workspace(torch.float32, "cpu")
        work.take("a", (4,)).zero_()
        found.append(bool(work.take("a", (4,)).isnan().any()))

    with fill_with_nan():
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
    assert found == [False]


def test_results_hold_no_buffer_that_is_used_again():
    x, y = torch.randn(1, 40, 2, 8), torch.randn(1, 40, 2, 8)
    pattern = longnet([8, 16], [1, 2]) & Causal()
    first, first_lse = attend(x, x, x, pattern, return_lse=True)
    copies = first.clone(), first_lse.clone()
    attend(y, y, y, pattern, return_lse=True)
    assert torch.equal(first, copies[0])
    assert torch.equal(first_lse, copies[1])


def test_threads_do_not_share_work():
    x = [torch.randn(1, 200, 2, 8) for _ in range(4)]
    pattern = longnet([16, 64], [1, 4]) & Causal()
    expected = [attend(t, t, t, pattern) for t in x]
    found: dict[int, list[torch.Tensor]] = {}

    def work(i):
        found[i] = [attend(x[i], x[i], x[i], pattern) for _ in range(5)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(torch.equal(out, expected[i]) for i in range(4) for out in found[i])
