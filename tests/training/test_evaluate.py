"""Evaluation asks for the same bytes at every context, and its figures are what they say."""

import lzma
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from byte_reader import Reader

from dilated_attention_pytorch import InvalidInput
from dilated_attention_pytorch.training.evaluate import clustered, clusters_of, evaluate, target_ends, xz_after


class Recorder(torch.nn.Module):
    """Gives every byte the same chance, and keeps what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.shown: list[torch.Tensor] = []

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.shown.append(tokens.clone())
        return torch.zeros(*tokens.shape, 256)


class Copier(Recorder):
    """Sure of the byte that stood `distance` before, where it sees that far; otherwise knows nothing."""

    def __init__(self, distance: int) -> None:
        super().__init__()
        self.distance = distance

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(*tokens.shape, 256)
        seen = tokens[:, : -self.distance + 1] if self.distance > 1 else tokens
        if seen.shape[1]:
            logits[:, self.distance - 1 :].scatter_(2, seen[:, :, None], 20.0)
        return logits


def random_text(length: int, seed: int = 0) -> np.ndarray:
    text = np.random.RandomState(seed).randint(1, 256, length).astype(np.uint8)
    text[::5000] = 0
    return text


def test_every_context_is_asked_for_the_same_bytes() -> None:
    text, model = random_text(20_000), Recorder()
    result = evaluate(model, text, [256, 64, 128], targets=10, bytes_per_target=32, batch_tokens=600)
    ends = target_ends(len(text), 256, 10, 32)
    windows = {context: torch.cat([x for x in model.shown if x.shape[1] == context]) for context in (64, 128, 256)}
    for context, shown in windows.items():
        for row, end in zip(shown, ends, strict=True):
            assert np.array_equal(row.numpy(), text[end - context - 1 : end - 1])
    assert [row.context for row in result.rows] == [64, 128, 256]
    assert all(row.bits_per_byte == pytest.approx(8.0, abs=1e-6) for row in result.rows)
    assert (result.targets, result.target_bytes) == (10, 320)


def test_a_model_that_needs_a_distance_gains_exactly_where_it_sees_it() -> None:
    # Text of period 100: after 64 bytes nothing is known of it, after 128 (at least 113 are seen) everything.
    text = np.tile(np.random.RandomState(0).permutation(256)[:100].astype(np.uint8) | 1, 200)
    result = evaluate(Copier(100), text, [64, 128, 256], targets=20, bytes_per_target=16)
    short, middle, long = result.rows
    assert short.bits_per_byte == pytest.approx(8.0, abs=1e-6)
    assert middle.bits_per_byte < 0.01
    assert long.bits_per_byte == pytest.approx(middle.bits_per_byte)
    assert middle.gain == pytest.approx(short.bits_per_byte - middle.bits_per_byte)
    assert result.best in (middle, long)


def test_bits_per_byte_are_those_of_plain_cross_entropy(reader: Callable[[], Reader]) -> None:
    text, model = random_text(3000), reader()
    result = evaluate(model, text, [64], targets=5, bytes_per_target=16)
    total = 0.0
    model.eval()
    for end in target_ends(3000, 64, 5, 16):
        tokens = torch.from_numpy(text[end - 65 : end].astype(np.int64))[None]
        log_probabilities = torch.log_softmax(model(tokens[:, :-1]), -1)[0, -16:]
        total -= log_probabilities.gather(1, tokens[0, -16:, None]).sum().item() / math.log(2)
    assert result.rows[0].bits_per_byte == pytest.approx(total / 80, rel=1e-6)
    model.train()
    evaluate(model, text, [64], targets=5, bytes_per_target=16)
    assert model.training


def test_xz_figures_are_those_of_xz() -> None:
    text = np.frombuffer(b"".join(b"line %d of a text\n" % (n % 90) for n in range(2000)), np.uint8)
    result = evaluate(Recorder(), text, [256, 2048], targets=5, bytes_per_target=64)
    ends = target_ends(len(text), 2048, 5, 64)
    joined = b"".join(text[end - 64 : end].tobytes() for end in ends)
    assert result.xz_targets == 8 * len(lzma.compress(joined, preset=9)) / len(joined)
    assert result.xz_held_out == 8 * len(lzma.compress(text.tobytes(), preset=9)) / len(text)
    # Behind the same context: the sizes of whole .xz files differ by the same, but for padding to 4 bytes.
    added = 0
    for end in ends:
        window = text[end - 2049 : end].tobytes()
        added += len(lzma.compress(window, preset=9)) - len(lzma.compress(window[:-64], preset=9))
    assert result.rows[1].xz == pytest.approx(8 * added / len(joined), abs=8 * 4 / 64)
    assert result.rows[1].xz < result.rows[0].xz
    assert result.rows[1].xz == xz_after(text, ends, 2048, 64)


def test_clusters_are_documents_and_stretches_of_long_ones() -> None:
    text = np.full(200_000, 65, np.uint8)
    text[[999, 1999]] = 0
    ends = np.array([500, 1000, 1001, 2000, 2100, 60_000, 70_000, 199_999])
    assert clusters_of(text, ends).tolist() == [0, 0, 1, 1, 2, 2, 3, 4]  # 65 536 bytes each from 2000 on


def test_clustered_errors_grow_with_dependence() -> None:
    generator = np.random.RandomState(0)
    independent = generator.normal(size=400)
    alone = np.arange(400)
    mean, error = clustered(independent, alone)
    assert mean == pytest.approx(independent.mean())
    assert error == pytest.approx(independent.std(ddof=1) / 20, rel=1e-9)
    repeated = np.repeat(independent[:100], 4)
    assert clustered(repeated, np.repeat(np.arange(100), 4))[1] == pytest.approx(
        clustered(independent[:100], np.arange(100))[1], rel=1e-9
    )
    assert clustered(repeated, alone)[1] < 0.6 * clustered(repeated, np.repeat(np.arange(100), 4))[1]
    assert clustered(independent, np.zeros(400, int))[1] == math.inf


def test_too_little_text_and_a_broken_model_are_refused() -> None:
    with pytest.raises(InvalidInput, match="shorter contexts"):
        evaluate(Recorder(), random_text(300), [256], targets=4, bytes_per_target=128)
    broken = Copier(1)
    broken.forward = lambda tokens: torch.full((*tokens.shape, 256), float("nan"))  # type: ignore[method-assign]
    with pytest.raises(FloatingPointError, match="not finite"):
        evaluate(broken, random_text(3000), [64], targets=4, bytes_per_target=16)
