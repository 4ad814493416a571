"""Bad input says what was expected, what came and how to mend it, and changes nothing."""

import math

import pytest
import torch

from dilated_attention_pytorch import (
    Causal,
    Documents,
    Full,
    InvalidInput,
    Relative,
    Softcap,
    TorchscaleCompat,
    attend,
    explain,
    longnet,
    longnet_attention,
)
from dilated_attention_pytorch.problem import Run, make_problem, positions_tensor, visible_key_lengths


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype)


Q, K = (2, 6, 4, 8), (2, 6, 2, 8)
LEFT = torch.tensor([[True] + [False] * 5, [False] * 6])
HOLE = torch.tensor([[False, True, False, False, False, True], [False] * 6])

# name -> (changes to a legal call, words that the message must hold: what was expected or got, and the fix)
BAD = {
    "q_not_a_tensor": ({"q": [1.0]}, ["tensor", "list"]),
    "q_of_three_dims": ({"q": randn(2, 6, 8)}, ["(B, N, H, D)", "(2, 6, 8)"]),
    "integers": ({"q": torch.zeros(Q, dtype=torch.int64)}, ["float16", "int64"]),
    "complex": ({"v": torch.zeros(K, dtype=torch.complex64)}, ["float32", "complex64"]),
    "mixed_dtypes": ({"k": randn(*K, dtype=torch.float64)}, ["dtype", "float64", ".to()"]),
    "mixed_devices": ({"k": torch.empty(K, device="meta")}, ["device", "meta", ".to()"]),
    "lengths_of_k_and_v": ({"v": randn(2, 5, 2, 8)}, ["6", "5", "same tokens"]),
    "batches": ({"q": randn(3, 6, 4, 8)}, ["3, 2, 2", "expand"]),
    "head_dims": ({"q": randn(2, 6, 4, 16)}, ["16", "8", "equal"]),
    "heads_of_k_and_v": ({"v": randn(2, 6, 4, 8)}, ["2", "4", "equal"]),
    "heads_that_do_not_divide": ({"q": randn(2, 6, 5, 8)}, ["5", "2", "multiple"]),
    "no_heads": ({"q": randn(2, 6, 0, 8)}, ["at least one head"]),
    "no_head_dim": ({"q": randn(2, 6, 4, 0), "k": randn(2, 6, 2, 0)}, ["head dim"]),
    "more_queries_than_keys": ({"q": randn(2, 7, 4, 8)}, ["7", "6", "query_start="]),
    "negative_query_start": ({"query_start": -1}, [">= 0", "-1"]),
    "bool_query_start": ({"query_start": True}, [">= 0", "True"]),
    "nan_scale": ({"scale": math.nan}, ["finite", "nan", "1/sqrt(D)"]),
    "infinite_scale": ({"scale": math.inf}, ["finite", "inf"]),
    "dropout_one": ({"dropout_p": 1.0}, ["[0, 1)", "1.0"]),
    "dropout_negative": ({"dropout_p": -0.1}, ["[0, 1)", "-0.1"]),
    "dropout_nan": ({"dropout_p": math.nan}, ["[0, 1)", "nan"]),
    "mask_of_floats": ({"key_padding_mask": torch.zeros(2, 6)}, ["bool", "float32", "mask == 0"]),
    "mask_of_wrong_shape": (
        {"key_padding_mask": torch.zeros(2, 5, dtype=torch.bool)},
        ["(B, Nk) = (2, 6)", "(2, 5)"],
    ),
    "mask_on_another_device": (
        {"key_padding_mask": torch.zeros(2, 6, dtype=torch.bool, device="meta")},
        ["meta", "k.device"],
    ),
    "left_padding": ({"key_padding_mask": LEFT}, ["right", "left-padded", "Documents"]),
    "padding_in_the_middle": ({"key_padding_mask": HOLE}, ["right"]),
    "bool_bias": ({"bias": torch.zeros(6, 6, dtype=torch.bool)}, ["floating point", "bool", "-inf"]),
    "bias_of_wrong_shape": ({"bias": randn(2, 3, 6, 6)}, ["(2, 4, 6, 6)", "(2, 3, 6, 6)"]),
    "bias_of_five_dims": ({"bias": randn(1, 1, 1, 6, 6)}, ["(2, 4, 6, 6)"]),
    "bias_on_another_device": ({"bias": torch.zeros(6, 6, device="meta")}, ["meta", "q.device"]),
    "score_that_is_a_function": ({"score": torch.tanh}, ["scores.py"]),
    "score_of_other_heads": ({"score": Relative(slopes=torch.ones(3))}, ["3 heads", "q has 4"]),
    "pattern_that_is_a_name": ({"pattern": "causal"}, ["Causal()", "str"]),
    "backend_unknown": ({"backend": "flash"}, ["auto", "sdpa", "dense", "flash"]),
    "head_groups_of_few_heads": ({"pattern": longnet([2] * 5, [1] * 5, head_groups=True)}, ["5", "4", "more heads"]),
    "documents_of_other_batch": ({"pattern": Documents([[6]] * 3)}, ["3 samples", "q has 2"]),
    "compat_without_longnet": (
        {"compat": TorchscaleCompat(zero_keys=True), "pattern": Causal()},
        ["longnet(...)", "drop compat="],
    ),
    "zero_keys_with_documents": (
        {"compat": TorchscaleCompat(zero_keys=True), "pattern": Documents([6]).of(longnet([2], [1]))},
        ["longnet(...)"],
    ),
    "zero_keys_with_mask": (
        {
            "compat": TorchscaleCompat(zero_keys=True),
            "pattern": longnet([2], [1]),
            "key_padding_mask": torch.zeros(2, 6, dtype=torch.bool),
        },
        ["zero_keys", "key_padding_mask"],
    ),
    "zero_keys_with_score": (
        {"compat": TorchscaleCompat(zero_keys=True), "pattern": longnet([2], [1]), "score": Softcap(2.0)},
        ["zero_keys", "score"],
    ),
    "detached_with_dropout": (
        {"compat": TorchscaleCompat(detach_mixing=True), "pattern": longnet([2], [1]), "dropout_p": 0.1},
        ["detach_mixing", "dropout_p=0"],
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    change, words = BAD[name]
    call = {"q": randn(*Q), "k": randn(*K), "v": randn(*K), "pattern": Full()} | change
    before = {n: x.clone() for n, x in call.items() if isinstance(x, torch.Tensor) and x.device.type == "cpu"}
    state = torch.get_rng_state()
    with pytest.raises(InvalidInput) as error:
        attend(call.pop("q"), call.pop("k"), call.pop("v"), call.pop("pattern"), **call)
    message = str(error.value)
    for word in words:
        assert word in message, message
    assert isinstance(error.value, ValueError)
    for n, x in before.items():
        now = (call | change).get(n)
        assert now is None or torch.equal(now, x)
    if name not in ("left_padding", "padding_in_the_middle", "head_groups_of_few_heads", "documents_of_other_batch"):
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", [n for n in BAD if n not in ("left_padding", "padding_in_the_middle")])
def test_explain_refuses_the_same(name):
    change, words = BAD[name]
    call = {"q": randn(*Q), "k": randn(*K), "v": randn(*K), "pattern": Full()} | change
    with pytest.raises(InvalidInput) as error:
        explain(call.pop("q"), call.pop("k"), call.pop("v"), call.pop("pattern"), **call)
    assert any(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    ("lengths", "rates", "words"),
    [([4, 8], [1], "equally long"), ([], [], "not empty"), ([0], [1], "at least 1"), ([4], [0], "dilation_rate")],
)
def test_longnet_attention_checks_its_lists(lengths, rates, words):
    x = randn(1, 4, 1, 2)
    with pytest.raises(InvalidInput, match=words):
        longnet_attention(x, x, x, lengths, rates)
    with pytest.raises(InvalidInput, match="modulo"):
        longnet_attention(x, x, x, [4], [1], head_offset="random")


def test_longnet_attention_ignores_no_option():
    x = randn(1, 4, 1, 2)
    with pytest.raises(TypeError, match="window"):
        longnet_attention(x, x, x, [4], [1], window=3)


def test_visible_key_lengths():
    mask = torch.arange(5) >= torch.tensor([[0], [2], [5]])
    assert visible_key_lengths(mask) == (0, 2, 5)
    assert visible_key_lengths(torch.zeros(0, 5, dtype=torch.bool)) == ()


def test_a_mask_without_padding_is_no_mask():
    x = randn(2, 5, 1, 4)
    mask = torch.zeros(2, 5, dtype=torch.bool)
    assert make_problem(x, x, x, scale=1.0, query_start=0, key_padding_mask=mask).key_lengths is None
    mask[1, 3:] = True
    assert make_problem(x, x, x, scale=1.0, query_start=0, key_padding_mask=mask).key_lengths == (5, 3)


def test_positions_are_runs():
    runs = (Run(4, 2, 3), Run(20, 1, 2), Run(0, 1, 0))
    assert positions_tensor(runs).tolist() == [4, 6, 8, 20, 21]
    assert positions_tensor(()).tolist() == []
    assert positions_tensor((Run(2**40, 1, 1),)).item() == 2**40


def test_a_problem_knows_its_shapes():
    p = make_problem(randn(*Q), randn(2, 9, 2, 8), randn(2, 9, 2, 3), scale=1.0, query_start=3)
    assert (p.batch, p.query_length, p.key_length, p.num_heads, p.kv_group) == (2, 6, 9, 4, 2)
    assert p.accumulate_dtype == torch.float32
    with pytest.raises(AttributeError):
        p.scale = 2.0
