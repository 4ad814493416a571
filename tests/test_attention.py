"""attend as a user and as PyTorch sees it: values, autograd, autocast, compile, export, profiler."""

import pytest
import torch

from dilated_attention_pytorch import (
    Causal,
    Documents,
    Full,
    NoBackend,
    Relative,
    Softcap,
    TorchscaleCompat,
    Window,
    attend,
    attention,
    longnet,
    longnet_attention,
    reference_attention,
)
from dilated_attention_pytorch.backends import select

PATTERN = longnet([4, 8], [1, 2]) & Causal()
BACKENDS = ["sdpa", "dense"]


def tensors(*, b=2, n=13, h=4, hkv=2, d=4, dv=None, dtype=torch.float64, grad=True):
    shapes = ((b, n, h, d), (b, n, hkv, d), (b, n, hkv, dv or d))
    return [torch.randn(s, dtype=dtype, requires_grad=grad) for s in shapes]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", [PATTERN, Full(), Window(3) & Causal(), longnet([3], [4])])
def test_gradcheck(pattern, backend):
    x = tensors(b=1, n=6, h=2, hkv=1, d=3)
    assert torch.autograd.gradcheck(lambda *a: attend(*a, pattern, backend=backend, return_lse=False), x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_with_lse(backend):
    def finite(*x):
        out, lse = attend(*x, longnet([3, 6], [2, 1]), backend=backend, return_lse=True)
        return out, lse

    assert torch.autograd.gradcheck(finite, tensors(b=1, n=6, h=2, hkv=1, d=3))


def test_gradcheck_of_bias_and_score():
    bias = torch.randn(1, 2, 1, 5, dtype=torch.float64, requires_grad=True)
    x = tensors(b=1, n=5, h=2, hkv=1, d=3, dv=2)
    assert torch.autograd.gradcheck(
        lambda q, k, v, b: attend(q, k, v, Causal(), bias=b, score=Softcap(1.0), return_lse=True), (*x, bias)
    )


@pytest.mark.parametrize("shape", [(2, 4, 13, 13), (13,), (4, 1, 13), (1, 1, 13, 1), (2, 1, 1, 1), ()])
def test_bias_broadcasts_and_has_a_gradient(shape):
    x, bias = tensors(), torch.randn(shape, dtype=torch.float64, requires_grad=True)
    mine = attend(*x, PATTERN, bias=bias, return_lse=True)
    expected = reference_attention(*x, PATTERN, bias=bias)
    torch.testing.assert_close(mine, expected)
    given = (torch.randn_like(mine[0]), torch.randn_like(mine[1]))
    found, wanted = (torch.autograd.grad(y, (*x, bias), given) for y in (mine, expected))
    torch.testing.assert_close(found, wanted)
    assert found[3].shape == bias.shape


def test_bias_may_hold_minus_infinity_for_a_whole_row():
    x, bias = tensors(), torch.zeros(13, 13, dtype=torch.float64)
    bias[4] = -torch.inf
    bias.requires_grad_()
    out, lse = attend(*x, Full(), bias=bias, return_lse=True)
    assert bool((out[:, 4] == 0).all())
    assert bool((lse[:, :, 4] == -torch.inf).all())
    for g in torch.autograd.grad((out.sum() + lse[..., :4].sum()), (*x, bias)):
        assert bool(g.isfinite().all())


def test_return_lse_and_longnet_attention():
    x = tensors()
    out, lse = attend(*x, PATTERN, return_lse=True)
    assert out.shape == (2, 13, 4, 4)
    assert lse.shape == (2, 4, 13)
    assert torch.equal(attend(*x, PATTERN), out)
    named = longnet_attention(*x, [4, 8], [1, 2], is_causal=True, return_lse=True)
    assert torch.equal(named[0], out)
    assert torch.equal(named[1], lse)
    two_way = longnet_attention(*x, [4, 8], [1, 2], head_offset="torchscale", head_groups=True)
    assert torch.equal(two_way, attend(*x, longnet([4, 8], [1, 2], head_offset="torchscale", head_groups=True)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_dtypes_of_results(dtype, backend):
    x = tensors(dtype=dtype)
    out, lse = attend(*x, PATTERN, backend=backend, return_lse=True)
    assert out.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    grads = torch.autograd.grad(out.sum() + lse.sum(), x)
    assert [g.dtype for g in grads] == [dtype] * 3


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0)])
@pytest.mark.parametrize("pattern", [Full(), PATTERN, Documents([2, 3]).of(Causal())])
def test_empty_sequences_give_empty_results(shape, pattern):
    x = [torch.randn(*shape, 2, 4, requires_grad=True) for _ in range(3)]
    out, lse = attend(*x, pattern, return_lse=True)
    assert out.shape == (*shape, 2, 4)
    assert lse.shape == (shape[0], 2, shape[1])
    grads = torch.autograd.grad(out.sum() + lse.sum(), x)
    assert [g.shape for g in grads] == [t.shape for t in x]


def test_no_queries_or_no_keys():
    q, k = torch.randn(2, 3, 2, 4, requires_grad=True), torch.randn(2, 0, 2, 4, requires_grad=True)
    out, lse = attend(q, k, k, Full(), query_start=0, return_lse=True)
    assert bool((out == 0).all())
    assert bool((lse == -torch.inf).all())
    out.sum().backward()
    assert bool((q.grad == 0).all())
    none = attend(q[:, :0], q, q, Causal())
    assert none.shape == (2, 0, 2, 4)
    none.sum().backward()
    biased = attend(q, k, k, Full(), query_start=0, bias=torch.randn(3, 1))
    assert biased.shape == (2, 3, 2, 4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_queries_stand_at_the_end_by_default(backend):
    q, k, v = tensors(n=40)
    whole = attend(q, k, v, PATTERN, backend=backend)
    for start, end in [(39, 40), (33, 40), (0, 1), (7, 20)]:
        rows = q[:, start:end]
        placed = attend(rows, k, v, PATTERN, backend=backend, query_start=start)
        torch.testing.assert_close(placed, whole[:, start:end])
        if end == 40:
            torch.testing.assert_close(attend(rows, k, v, PATTERN, backend=backend), whole[:, start:])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", [PATTERN, Window(5) & Causal(), longnet([6, 10], [4, 3]) & Causal()])
def test_the_future_changes_nothing(pattern, backend):
    x = tensors(n=41, dtype=torch.float32, grad=False)
    out, lse = attend(*x, pattern, backend=backend, return_lse=True)
    for i in (0, 7, 8, 23, 39):
        changed = [torch.cat([t[:, : i + 1], torch.randn_like(t[:, i + 1 :])], 1) for t in x]
        other, other_lse = attend(*changed, pattern, backend=backend, return_lse=True)
        assert torch.equal(other[:, : i + 1], out[:, : i + 1])
        assert torch.equal(other_lse[..., : i + 1], lse[..., : i + 1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_future_has_no_gradient_and_the_past_has_one(backend):
    q, k, v = tensors(n=21)
    out = attend(q, k, v, PATTERN, backend=backend)
    dk, dv = torch.autograd.grad(out[:, 9].sum(), (k, v))
    assert bool((dk[:, 10:] == 0).all())
    assert bool((dv[:, 10:] == 0).all())
    assert float(dv[:, :10].abs().max()) > 0.1


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_right_padded_sample_equals_the_sample_alone(backend):
    x = tensors(n=29)
    mask = torch.arange(29) >= torch.tensor([[29], [17]])
    g = torch.randn(2, 29, 4, 4, dtype=torch.float64)
    out = attend(*x, PATTERN, key_padding_mask=mask, backend=backend)
    grads = torch.autograd.grad(out[:, :17], x, g[:, :17])
    alone = [t.detach()[1:, :17].clone().requires_grad_() for t in x]
    expected = attend(*alone, PATTERN, backend=backend)
    torch.testing.assert_close(out[1:, :17], expected)
    for mine, other in zip(grads, torch.autograd.grad(expected, alone, g[1:, :17])):
        torch.testing.assert_close(mine[1:, :17], other)
    changed = [torch.where(mask[:, :, None, None], 1e30, t) for t in x]
    assert torch.equal(attend(*changed, PATTERN, key_padding_mask=mask, backend=backend)[1:, :17], out[1:, :17])


def test_named_backends_say_why_they_cannot():
    x = tensors(dv=5)
    with pytest.raises(NoBackend) as error:
        attend(*x, PATTERN, backend="sdpa", dropout_p=0.1, bias=torch.zeros(13), score=Softcap(1.0))
    for reason in ("dropout", "bias", "score rules", "Dv (5) must equal D (4)", "backend='dense'"):
        assert reason in str(error.value)
    assert isinstance(error.value, NotImplementedError)
    assert attend(*x, PATTERN).shape == (2, 13, 4, 5)


def test_autocast_casts_like_sdpa():
    x = tensors(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = attend(*x, PATTERN, return_lse=True)
    half = [t.detach().bfloat16() for t in x]
    expected = attend(*half, PATTERN, return_lse=True)
    assert out.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])
    grads = torch.autograd.grad(out.float().sum(), x)
    assert [g.dtype for g in grads] == [torch.float32] * 3
    with torch.autocast("cpu", torch.bfloat16):
        assert attend(*tensors(), PATTERN).dtype == torch.float64


def test_no_gradient_is_kept_without_need():
    x = tensors(grad=False)
    assert attend(*x, PATTERN).grad_fn is None
    q, k, v = tensors()
    (only,) = torch.autograd.grad(attend(q.detach(), k, v.detach(), PATTERN).sum(), k)
    assert only.shape == k.shape
    with torch.no_grad():
        assert not attend(q, k, v, PATTERN).requires_grad


def test_the_problem_says_whether_gradients_will_be_asked_for(monkeypatch):
    seen = []
    monkeypatch.setattr(
        attention, "select", lambda problem, *rest: seen.append(problem.needs_grad) or select(problem, *rest)
    )
    q, k, v = tensors()
    out = attend(q, k, v, PATTERN)
    with torch.no_grad():
        attend(q, k, v, PATTERN)
    attend(q.detach(), k.detach(), v.detach(), PATTERN)
    assert seen == [True, False, False]
    out.sum().backward()
    assert seen == [True, False, False, True]


def test_double_backward_says_no():
    x = tensors()
    (g,) = torch.autograd.grad(attend(*x, PATTERN).square().sum(), x[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        g.sum().backward()


def test_vmap_and_forward_mode_say_no():
    q, k, v = (t.detach() for t in tensors())
    with pytest.raises(NotImplementedError, match="vmap"):
        torch.func.vmap(lambda t: attend(t, k, v, PATTERN))(torch.stack([q, q]))
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(lambda t: attend(t, k, v, PATTERN), (q,), (torch.ones_like(q),))


def arguments(name):
    """Argument tuples of the forward operator."""
    q, k, v = tensors(n=6, dtype=torch.float32)
    base = {"q": q, "k": k, "v": v, "bias": None, "mask": None, "seed": None, "tables": [], "score_tables": []}
    base |= {"pattern": PATTERN.text(), "score": "", "scale": 0.5, "dropout_p": 0.0, "query_start": 0}
    base |= {"zero_keys": False, "detach_mixing": False, "backend": "auto", "needs_grad": True}
    rule = Relative(slopes=torch.ones(4))
    documents = Documents([2, 4]).of(PATTERN)
    change = {
        "plain": {},
        "bias": {"bias": torch.randn(6, 6, requires_grad=True)},
        "mask": {"mask": torch.arange(6) >= torch.tensor([[6], [4]])},
        "dropout": {"dropout_p": 0.5, "seed": torch.tensor([3])},
        "tables": {"pattern": documents.text(), "tables": list(documents.tables)},
        "score": {"score": rule.text, "score_tables": list(rule.tables)},
        "compat": {"zero_keys": True, "detach_mixing": True, "pattern": longnet([4], [2]).text()},
    }[name]
    return tuple((base | change).values())


@pytest.mark.parametrize("name", ["plain", "bias", "mask", "dropout", "tables", "score"])
def test_opcheck_of_the_operator(name):
    torch.library.opcheck(torch.ops.dilated_attention_pytorch.attend.default, arguments(name))


@pytest.mark.parametrize("name", ["plain", "bias", "mask", "dropout", "tables", "score", "compat"])
def test_opcheck_of_the_backward_operator(name):
    given = [t.detach() if isinstance(t, torch.Tensor) else t for t in arguments(name)]
    out, lse = torch.ops.dilated_attention_pytorch.attend(*given)
    dlse = None if name == "compat" else torch.randn_like(lse)
    operator = torch.ops.dilated_attention_pytorch.attend_backward.default
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(operator, (torch.randn_like(out), dlse, out, lse, *given), test_utils=tests)


def calls():
    mask = torch.arange(13) >= torch.tensor([[13], [9]])
    documents = Documents([6, 7]).of(PATTERN)
    return {
        "plain": lambda *x: attend(*x, PATTERN),
        "lse": lambda *x: sum(t.sum() for t in attend(*x, PATTERN, return_lse=True)),
        "mask": lambda *x: attend(*x, PATTERN, key_padding_mask=mask),
        "documents": lambda *x: attend(*x, documents),
        "score": lambda *x: attend(*x, PATTERN, score=Softcap(2.0)),
        "longnet": lambda *x: longnet_attention(*x, [4, 8], [1, 2], head_offset="torchscale"),
        "compat": lambda *x: attend(*x, longnet([4], [2]), compat=TorchscaleCompat(True, True)),
    }


@pytest.mark.parametrize("name", list(calls()))
def test_compiles_without_a_graph_break(name):
    call, x = calls()[name], tensors()
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    found, expected = compiled(*x), call(*x)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), x), torch.autograd.grad(expected.sum(), x))


def test_compiled_dropout_draws_anew():
    torch._dynamo.reset()
    x = tensors(grad=False)
    compiled = torch.compile(lambda *t: attend(*t, PATTERN, dropout_p=0.5), fullgraph=True, backend="aot_eager")
    assert not torch.equal(compiled(*x), compiled(*x))


def test_new_documents_do_not_recompile():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(
        lambda q, lengths: attend(q, q, q, Documents(lengths).of(Causal())), fullgraph=True, backend=counter
    )
    x = torch.randn(1, 6, 1, 4)
    for lengths in ([2, 4], [3, 3], [1, 5]):
        found = compiled(x, torch.tensor(lengths))
        torch.testing.assert_close(found, attend(x, x, x, Documents(lengths).of(Causal())))
    assert counter.frame_count == 1


def test_compiles_with_dynamic_lengths():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(lambda q: attend(q, q, q, PATTERN), fullgraph=True, backend=counter, dynamic=True)
    for n in (9, 14, 31):
        x = torch.randn(1, n, 2, 4)
        torch.testing.assert_close(compiled(x), attend(x, x, x, PATTERN))
    assert counter.frame_count == 1


def test_exports_with_a_dynamic_length():
    class Layer(torch.nn.Module):
        def forward(self, q, k, v):
            return attend(q, k, v, PATTERN)

    n = torch.export.Dim("n", min=2, max=4096)
    x = [torch.randn(1, 12, 2, 4) for _ in range(3)]
    program = torch.export.export(Layer(), tuple(x), dynamic_shapes=({1: n}, {1: n}, {1: n}))
    for length in (12, 5, 77):
        y = [torch.randn(1, length, 2, 4) for _ in range(3)]
        torch.testing.assert_close(program.module()(*y), attend(*y, PATTERN))


@pytest.mark.parametrize("backend", BACKENDS)
def test_profiler_sees_the_backend(backend):
    x = tensors()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        attend(*x, PATTERN, backend=backend).sum().backward()
    names = {event.key for event in profile.key_averages()}
    for direction in ("forward", "backward"):
        assert f"dilated_attention_pytorch::{backend}::{direction}" in names


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_of_any_strides_are_left_as_they_are(backend):
    fused = torch.randn(2, 21, 3, 4, 8)
    before = fused.clone()
    q, k, v = fused.unbind(2)
    out = attend(q, k, v, PATTERN, backend=backend)
    assert torch.equal(fused, before)
    torch.testing.assert_close(out, attend(*(t.contiguous() for t in (q, k, v)), PATTERN, backend=backend))
    swapped = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    torch.testing.assert_close(attend(*swapped, PATTERN, backend=backend), out)
    one = torch.randn(1, 21, 4, 8).expand(3, 21, 4, 8)
    torch.testing.assert_close(attend(one, one, one, PATTERN, backend=backend)[2], attend(*[one[:1]] * 3, PATTERN)[0])
