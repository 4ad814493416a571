"""The checks of 0.2 by their names: what passes, and the very texts of what does not."""

import pytest
import torch

from dilated_attention_pytorch import InvalidInput
from dilated_attention_pytorch.core import ValidationMixin as Check

X = torch.zeros(2, 5, 4, 8)

FAILURES = {
    "segments": (
        lambda: Check.validate_segment_dilation_match([2, 4, 8], [1, 2]),
        "segment_lengths and dilation_rates must have the same length: got 3 and 2",
    ),
    "no segments": (
        lambda: Check.validate_segment_dilation_match([], []),
        "segment_lengths cannot be empty: give one segment length and one dilation rate at least",
    ),
    "positive": (lambda: Check.validate_positive_values([2, 0], "rates"), "rates[1] must be positive, got 0"),
    "not a number": (
        lambda: Check.validate_positive_values([float("nan")], "rates"),
        "rates[0] must be positive, got nan",
    ),
    "dims": (
        lambda: Check.validate_tensor_shape(X, 3, "query"),
        "query must have 3 dims, got 4 dims of shape (2, 5, 4, 8)",
    ),
    "shapes": (
        lambda: Check.validate_tensor_shapes_match([X, X[:1]], ["query", "key"]),
        "query and key must have the same shape: got (2, 5, 4, 8) and (1, 5, 4, 8)",
    ),
    "sizes": (
        lambda: Check.validate_tensor_shapes_match([X, X[:, :3]], ["query", "key"], [0, 1]),
        "query and key must have the same size in dim 1: got 5 and 3",
    ),
    "length": (
        lambda: Check.validate_sequence_length(0, [4]),
        "the sequence length must be an int of at least 1 token, got 0",
    ),
    "length without segments": (
        lambda: Check.validate_sequence_length(4, []),
        "segment_lengths cannot be empty: give one segment length at least",
    ),
    "dtype": (
        lambda: Check.validate_device_dtype_consistency([X, X.double()], ["query", "key"]),
        "query and key must have the same dtype: got torch.float32 and torch.float64; move one with .to()",
    ),
    "device": (
        lambda: Check.validate_device_dtype_consistency([X, X.to("meta")], ["query", "key"]),
        "query and key must have the same device: got cpu and meta; move one with .to()",
    ),
    "batch first": (
        lambda: Check.validate_batch_first_format(X[0], "query"),
        "query must be batch-first with 4 dims (B, N, H, D), got 3 dims of shape (5, 4, 8)",
    ),
    "mask's shape": (
        lambda: Check.validate_attention_mask(torch.ones(5, 4), 2, 5),
        "attention_mask must have shape (5, 5) or (2 or 1, heads or 1, 5, 5), got (5, 4)",
    ),
    "mask's batch": (
        lambda: Check.validate_attention_mask(torch.ones(3, 1, 5, 5), 2, 5, "mask"),
        "mask must have shape (5, 5) or (2 or 1, heads or 1, 5, 5), got (3, 1, 5, 5)",
    ),
    "mask's dtype": (
        lambda: Check.validate_attention_mask(torch.ones(5, 5, dtype=torch.int), 2, 5),
        "expected attention_mask of dtype bool or float. Got torch.int32; convert it with .bool().",
    ),
    "dropout": (lambda: Check.validate_dropout_prob(1.0), "expected dropout in [0, 1). Got 1.0."),
    "head dim": (
        lambda: Check.validate_head_dim(768, 13),
        "embed_dim (768) must be divisible by num_heads (13). Got head_dim=59.08",
    ),
    "heads": (
        lambda: Check.validate_num_heads(2, 3),
        "num_heads (2) must be at least the number of groups (3) that heads are dealt to",
    ),
}


@pytest.mark.parametrize("name", FAILURES)
def test_each_check_says_what_was_expected_and_what_came(name):
    call, text = FAILURES[name]
    with pytest.raises(InvalidInput) as caught:
        call()
    assert str(caught.value) == text
    assert isinstance(caught.value, ValueError)


def test_what_is_legal_passes():
    Check.validate_segment_dilation_match([2, 4], [1, 2])
    Check.validate_positive_values([1, 0.5], "x")
    Check.validate_tensor_shape(X, 4, "query")
    Check.validate_tensor_shapes_match([X, X, X], ["q", "k", "v"])
    Check.validate_tensor_shapes_match([X, X[:, :3]], ["q", "k"], [0, 2, 3])
    Check.validate_sequence_length(1000003, [2048])  # any length, a prime too
    Check.validate_device_dtype_consistency([X, X], ["q", "k"])
    Check.validate_batch_first_format(X[0], "x", 3)
    for mask in (None, torch.ones(5, 5), torch.ones(2, 1, 5, 5).bool(), torch.ones(1, 4, 5, 5)):
        Check.validate_attention_mask(mask, 2, 5)
    Check.validate_attention_mask(torch.ones(5, 9), 2, 5, key_len=9)
    Check.validate_dropout_prob(0.0)
    Check.validate_num_heads(3, 3)
    assert Check.validate_head_dim(768, 12) == 64
