"""The attention utilities of 0.2 compute what their names say, with one meaning of masks."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dilated_attention_pytorch import Causal, Full, InvalidInput, longnet, reference_attention
from dilated_attention_pytorch.core import attention_utils
from dilated_attention_pytorch.core.attention_utils import (
    apply_rotary_embeddings,
    combine_masks,
    compute_alibi_bias,
    compute_attention_scores,
    compute_rotary_embeddings,
    create_4d_causal_mask,
    create_block_diagonal_mask,
    create_dilated_mask,
    get_attention_backend_info,
    merge_attention_heads,
    optimize_attention_computation,
    split_attention_heads,
    standard_attention,
)
from dilated_attention_pytorch.nn import MultiheadDilatedAttention

BOTH = pytest.mark.parametrize("attention", [optimize_attention_computation, standard_attention])


def heads(*shape: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(*shape) for _ in range(3)]


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got.double(), expected.double(), rtol=0, atol=1e-5)


@BOTH
@pytest.mark.parametrize("is_causal", [False, True])
def test_attention_is_softmax_attention_over_tokens(attention, is_causal: bool) -> None:
    q, k, v = heads(2, 37, 3, 8)
    close(attention(q, k, v, is_causal), reference_attention(q, k, v, Causal() if is_causal else Full())[0])


@BOTH
def test_leading_dims_are_samples(attention) -> None:
    q, k, v = heads(2, 3, 11, 2, 8)
    for x in (attention(q, k, v)[1, 2], attention(q[1, 2], k[1, 2], v[1, 2])):
        close(x, attention(q[1], k[1], v[1])[2])


@BOTH
def test_a_true_in_a_mask_is_left_out_and_a_float_is_added(attention) -> None:
    q, k, v = heads(2, 12, 3, 8)
    out = torch.rand(3, 12, 12) < 0.4
    out[..., 0] = False
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=~out).transpose(1, 2)
    close(attention(q, k, v, attention_mask=out), expected)
    bias = torch.randn(2, 1, 12, 12)
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=bias).transpose(1, 2)
    close(attention(q, k, v, attention_mask=bias), expected)


def test_masks_of_a_batch_with_two_leading_dims() -> None:
    q, k, v = heads(2, 3, 6, 2, 4)
    mask = torch.rand(2, 3, 1, 6, 6) < 0.3
    mask[..., 0] = False
    for i in range(2):
        close(
            standard_attention(q, k, v, attention_mask=mask)[i],
            standard_attention(q[i], k[i], v[i], attention_mask=mask[i]),
        )


def test_padding_becomes_minus_infinity_in_a_float_mask() -> None:
    padding = torch.tensor([[False, False, True], [False, True, True]])
    bias = torch.randn(3, 3)
    both = combine_masks(bias, padding)
    assert both.shape == (2, 1, 3, 3)
    assert (both[0, 0, :, 2] == -torch.inf).all()
    assert torch.equal(both[0, 0, :, :2], bias[:, :2])
    hidden = torch.eye(3, dtype=torch.bool)
    assert torch.equal(combine_masks(hidden, padding)[1, 0], hidden | padding[1])
    assert combine_masks(None, padding).dtype == torch.bool
    assert combine_masks(bias, None) is bias
    q, k, v = heads(2, 3, 1, 4)
    close(standard_attention(q, k, v, attention_mask=both)[1, :, 0], v[1, :1, 0].expand(3, 4))
    with pytest.raises(InvalidInput, match="True = padding"):
        combine_masks(bias, padding.float())


def test_dropout_acts_and_keeps_the_mean() -> None:
    q = torch.zeros(1, 400, 1, 4)
    out = optimize_attention_computation(q, q, q + 1, dropout_p=0.5)
    assert out.std() > 0.01
    assert abs(float(out.mean()) - 1) < 0.05


def test_scores_are_the_logits_of_attention() -> None:
    q, k, v = (x[0].transpose(0, 1) for x in heads(1, 9, 2, 4))
    mask = torch.rand(9, 9) < 0.3
    mask.fill_diagonal_(False)
    weights = compute_attention_scores(q, k, attention_mask=mask, is_causal=True).softmax(-1)
    expected = standard_attention(*(x.transpose(0, 1) for x in (q, k, v)), is_causal=True, attention_mask=mask)
    close((weights @ v).transpose(0, 1), expected)
    assert compute_attention_scores(q, k, scale=2.0).allclose(2 * q @ k.transpose(1, 2))
    assert compute_attention_scores(q[:, -1:], k, is_causal=True).isfinite().all()  # the last row sees all


def test_the_dilated_mask_is_a_branch_of_longnet() -> None:
    q, k, v = heads(1, 24, 2, 4)
    for head in range(2):
        mask = create_dilated_mask(24, 8, 2, head=head, num_heads=2)
        got = standard_attention(*(x[:, :, head : head + 1] for x in (q, k, v)), attention_mask=mask)
        close(got[:, :, 0], reference_attention(q, k, v, longnet([8], [2]))[0][:, :, head])


def test_block_diagonal_and_causal_masks() -> None:
    sees = ~create_block_diagonal_mask(10, 4)
    assert torch.equal(sees, torch.block_diag(*(torch.ones(n, n) for n in (4, 4, 2))).bool())
    wide = ~create_block_diagonal_mask(10, 4, overlap=2)
    assert torch.equal(wide, wide.T)
    assert wide[0].int().tolist() == [1, 1, 1, 1, 1, 1, 0, 0, 0, 0]  # its block, and 2 tokens beyond it
    assert wide[2].int().tolist() == [1, 1, 1, 1, 1, 1, 1, 1, 0, 0]  # within 2 tokens of the next block too
    q, k, v = heads(1, 7, 2, 4)
    close(standard_attention(q, k, v, attention_mask=create_4d_causal_mask(7)), standard_attention(q, k, v, True))
    assert create_4d_causal_mask(3, dtype=torch.float64).dtype == torch.float64


def test_alibi_is_that_of_the_layers() -> None:
    torch.manual_seed(0)
    layer, x = MultiheadDilatedAttention(32, 4, [1], [64], position="alibi"), torch.randn(2, 20, 32)
    plain = MultiheadDilatedAttention(32, 4, [1], [64])
    plain.load_state_dict(layer.state_dict())
    bias = compute_alibi_bias(20, 4)
    close(plain(x, attn_mask=bias.repeat(2, 1, 1)), layer(x))
    assert bias[:, 3, 2].tolist() == [-(2.0 ** (-2 * (h + 1))) for h in range(4)]
    assert torch.equal(bias, bias.transpose(1, 2))


def test_rotary_is_that_of_the_layers_and_sees_distances_only() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(8), torch.randn(8)
    cos, sin = compute_rotary_embeddings(50, 8)
    assert cos.shape == sin.shape == (50, 8)
    angles = 3 * 10000.0 ** (-torch.arange(4) / 4)
    close(sin[3], angles.sin().repeat(2))
    rows = [x.expand(1, 50, 1, 8) for x in (q, k)]
    turned_q, turned_k = (x[0, :, 0] for x in apply_rotary_embeddings(*rows, cos, sin))
    logits = turned_q @ turned_k.T
    for distance in (0, 1, 7):
        diagonal = logits.diagonal(-distance)
        close(diagonal, diagonal[:1].expand_as(diagonal))
    layer = MultiheadDilatedAttention(8, 1, [1], [64], position="rotary")
    table = layer.positions.table(50)
    close(cos, table.query_cos[:, 0])
    with pytest.raises(InvalidInput, match="shape"):
        apply_rotary_embeddings(*rows, cos[:9], sin[:9])


def test_heads_are_split_and_merged() -> None:
    x = torch.randn(2, 5, 12)
    split = split_attention_heads(x, 3)
    assert torch.equal(split[..., 1, :], x[..., 4:8])
    assert torch.equal(merge_attention_heads(split, 3, 4), x)
    with pytest.raises(InvalidInput, match="divisible"):
        split_attention_heads(x, 5)
    with pytest.raises(InvalidInput, match="expected heads"):
        merge_attention_heads(split, 4, 3)


def test_facts_about_backends() -> None:
    info = get_attention_backend_info()
    assert {"dense", "sdpa"} <= set(info["backends"])
    assert info["has_sdpa"] is True
    assert info["torch_version"] == torch.__version__
    assert info["cuda_available"] == torch.cuda.is_available()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3)), "leading dims"),
        ((torch.zeros(2, 4, 1, 4), torch.zeros(3, 4, 1, 4), torch.zeros(2, 4, 1, 4)), "leading dims"),
        ((*[torch.zeros(2, 4, 1, 4)] * 3, False, torch.zeros(2, 4, dtype=torch.bool)), "broadcast"),
        ((*[torch.zeros(2, 4, 1, 4)] * 3, False, torch.zeros(4, 4, dtype=torch.int)), "bool or float"),
    ],
)
def test_bad_input(arguments, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        optimize_attention_computation(*arguments)
    with pytest.raises(InvalidInput, match="of one D"):
        compute_attention_scores(torch.zeros(2, 3), torch.zeros(2, 4))


def test_every_utility_is_tested_here() -> None:
    text = Path(__file__).read_text()
    assert [name for name in attention_utils.__all__ if text.count(name) < 2] == []
