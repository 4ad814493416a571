"""The learned gate: its logits, its loss, training where means fail, storage, causality, and gradients."""

import math

import pytest
import torch

from dilated_attention_pytorch import Causal, InvalidInput, attend
from dilated_attention_pytorch.patterns import Full
from dilated_attention_pytorch.problem import make_problem
from dilated_attention_pytorch.selection import MeanPooled, Selector, TopBlocks, block_mass, mass_recall, query_blocks
from dilated_attention_pytorch.selection.distillation import distil, gate_loss
from dilated_attention_pytorch.selection.gate import Gate


def _blocks(q, k, size=4, mask=None, pattern=None):
    problem = make_problem(q, k, k, scale=q.shape[3] ** -0.5, query_start=0, key_padding_mask=mask)
    return query_blocks(problem, Full() if pattern is None else pattern, size)


def _randomised(gate: Gate) -> Gate:
    with torch.no_grad():
        for weight in gate.parameters():
            weight.normal_()
    return gate


def test_logits_are_products_of_mapped_pools():
    torch.manual_seed(0)
    q, k = torch.randn(2, 12, 4, 6), torch.randn(2, 12, 2, 6)
    mask = torch.arange(12) >= torch.tensor([[12], [7]])
    gate = _randomised(Gate(4, 6, kv_heads=2, gate_dim=5))
    logits = gate(_blocks(q, k, mask=mask))
    assert logits.shape == (2, 4, 3, 3)
    for b, n in enumerate((12, 7)):
        for h in range(4):
            for i in range(3):
                end = min(4 * i + 4, n) if n > 4 * i else 4 * i + 4  # a block of padding alone keeps its rows
                rows = q[b, 4 * i : end, h]
                mine = rows.mean(0) @ gate.query_weight[h]
                for j in range(3):
                    keys = k[b, 4 * j : min(4 * j + 4, n), h // 2]
                    if len(keys) == 0:
                        continue
                    pools = torch.cat((keys.mean(0), keys.amax(0), keys.amin(0)))
                    expected = mine @ (pools @ gate.key_weight[h // 2]) / math.sqrt(5) + math.log(len(keys))
                    torch.testing.assert_close(logits[b, h, i, j], expected)


@pytest.mark.parametrize("gate_dim", [None, 24])
def test_a_new_gate_scores_as_means_do(gate_dim):
    q, k = torch.randn(1, 20, 4, 8), torch.randn(1, 20, 2, 8)
    blocks = _blocks(q, k)
    gate = Gate(4, 8, kv_heads=2, gate_dim=gate_dim)
    keys = blocks.key_blocks.count.log()[:, None, None, :]
    factor = math.sqrt(8 / gate.gate_dim)
    torch.testing.assert_close(gate(blocks) - keys, (MeanPooled()(blocks) - keys) * factor)


def test_the_loss_is_the_divergence_over_open_blocks():
    torch.manual_seed(0)
    logits, mass = torch.randn(2, 3, 4, 5, requires_grad=True), torch.rand(2, 3, 4, 5)
    open_blocks = torch.rand(1, 1, 4, 5) < 0.7
    open_blocks[..., 0, :] = False
    mass[0, 0, 1] = 0.0
    terms = []
    for b, h, i in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(4)).tolist():
        among = open_blocks[0, 0, i]
        target, found = mass[b, h, i][among], logits[b, h, i][among].softmax(-1)
        if target.sum() > 0:
            target = target / target.sum()
            terms.append((target * (target.clamp(min=1e-30) / found).log()).sum())
    loss = gate_loss(logits, mass, open_blocks)
    torch.testing.assert_close(loss, torch.stack(terms).mean())
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.isfinite().all()
    assert (gradient[:, :, 0] == 0).all()
    assert (gradient[0, 0, 1] == 0).all()
    assert gate_loss(logits, torch.zeros_like(mass), open_blocks) == 0


def _hidden_peaks(seed: int, n: int = 256, size: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks of keys that matter hold opposite large keys, whose mean is 0; the others have means that mislead."""
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 2, n, 2, 8, generator=generator)
    q[..., 0] += 3.0
    peaks = torch.rand(2, n // size, 1, 2, generator=generator) < 0.25
    signs = torch.tensor([1.0, -1.0]).repeat(size // 2).view(1, 1, size, 1)
    first = torch.where(peaks, 6.0 * signs, 0.5 * torch.rand(2, n // size, 1, 2, generator=generator))
    k[..., 0] = first.expand(2, n // size, size, 2).reshape(2, n, 2)
    return q, k


@pytest.mark.parametrize("pattern", [Full(), Causal()], ids=["full", "causal"])
def test_distillation_finds_what_means_hide(pattern):
    gate, seen = Gate(2, 8), []
    losses = distil(
        gate,
        (_hidden_peaks(i) for i in range(60)),
        pattern,
        block_size=16,
        learning_rate=0.05,
        on_step=lambda step, loss: seen.append((step, loss)),
    )
    assert seen == list(enumerate(losses, 1))
    assert len(losses) == 60
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    q, k = _hidden_peaks(1000)
    mass = block_mass(q, k, pattern, 16)
    recall = {
        name: mass_recall(Selector(score, TopBlocks(), 16, 0, 0)(q, k, 4, pattern), mass).mean()
        for name, score in (("gate", gate), ("mean", MeanPooled()))
    }
    assert recall["gate"] > recall["mean"] + 0.1


def test_padding_is_learnt_from_as_if_it_were_not_there():
    q, k = (x[:1] for x in _hidden_peaks(3))
    mask = torch.arange(256) >= 100
    gates = [_randomised(Gate(2, 8)), Gate(2, 8)]
    gates[1].load_state_dict(gates[0].state_dict())
    alone = distil(gates[0], [(q[:, :100], k[:, :100])], Causal(), block_size=16)
    q[:, 100:], k[:, 100:] = 7.0, -9.0
    blocks = _blocks(q, k, 16, mask[None], Causal())
    mass = block_mass(q, k, Causal(), 16, key_padding_mask=mask[None])
    whole = gate_loss(gates[1](blocks)[:, :, :7], mass[:, :, :7], blocks.open_blocks[:, :, :7])
    assert whole.item() == pytest.approx(alone[0], rel=1e-5)
    assert len(distil(gates[1], [(q, k, mask[None])], Causal(), block_size=16)) == 1


def test_gradients_reach_the_gate_through_its_loss_only():
    q, k = (x.requires_grad_() for x in _hidden_peaks(0))
    gate = Gate(2, 8)
    attend(q, k, k, Selector(gate, TopBlocks(), 16)(q, k, 4, Causal())).sum().backward()
    assert q.grad is not None
    assert gate.query_weight.grad is None
    before = q.grad.clone()
    distil(gate, [(q, k)], block_size=16)
    assert gate.query_weight.grad is not None
    assert gate.key_weight.grad is not None
    assert torch.equal(q.grad, before)
    gate(_blocks(q, k, 16)).sum().backward()
    assert torch.equal(q.grad, before)


def test_state_is_stored_and_loaded(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    gate, other = _randomised(Gate(4, 8, kv_heads=2)), Gate(4, 8, kv_heads=2)
    safetensors.save_file(gate.state_dict(), tmp_path / "gate.safetensors")
    other.load_state_dict(safetensors.load_file(tmp_path / "gate.safetensors"))
    blocks = _blocks(torch.randn(1, 16, 4, 8), torch.randn(1, 16, 2, 8))
    assert torch.equal(gate(blocks), other(blocks))
    assert repr(gate) == "Gate(num_heads=4, head_dim=8, kv_heads=2, gate_dim=8)"


def test_later_tokens_change_no_bit_through_a_gate():
    torch.manual_seed(0)
    x, cut = torch.randn(2, 1, 256, 2, 8), 150
    y = torch.cat((x[:, :, :cut], torch.randn(2, 1, 256 - cut, 2, 8)), 2)
    selector = Selector(_randomised(Gate(2, 8)), TopBlocks(), block_size=16)
    chosen = [selector(z[0], z[1], 4, Causal()) for z in (x, y)]
    outs = [attend(z[0], z[1], z[1], pattern) for z, pattern in zip((x, y), chosen)]
    assert torch.equal(outs[0][:, :cut], outs[1][:, :cut])
    assert not torch.equal(chosen[0].layout, chosen[1].layout)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Gate(0, 8), "num_heads to be an int of at least 1"),
        (lambda: Gate(2, 8, gate_dim=True), "gate_dim to be an int"),
        (lambda: Gate(4, 8, kv_heads=3), r"query heads \(4\) must be a multiple of kv_heads \(3\)"),
        (lambda: Gate(2, 4)(_blocks(torch.randn(1, 8, 2, 8), torch.randn(1, 8, 2, 8))), r"\(2, 4, 2\). Got blocks"),
        (lambda: distil(Gate(2, 8), [], learning_rate=0.0), "learning_rate above 0"),
        (lambda: distil(Gate(2, 8), [(torch.zeros(1, 8, 2, 8),)]), "Got 1 items"),
        (lambda: gate_loss(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 3), torch.ones(1).bool()), "of one shape"),
    ],
)
def test_what_makes_no_gate(make, words):
    with pytest.raises(InvalidInput, match=words):
        make()


def test_a_loss_that_is_not_finite_stops_before_the_gate_is_changed():
    gate = Gate(2, 8)
    before = gate.query_weight.detach().clone()
    q = torch.full((1, 8, 2, 8), torch.nan)
    with pytest.raises(FloatingPointError, match="step 1"):
        distil(gate, [(q, torch.zeros(1, 8, 2, 8))], block_size=4)
    assert torch.equal(gate.query_weight, before)
