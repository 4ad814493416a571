"""Slides of different sizes in one padded batch: encode their tiles, pool them, train a classifier for a few steps.

The tiles are random features with a faint signal in a few of them, so that the example needs no data.
Run: python examples/slides.py
"""

import torch
from torch import Tensor, nn

from dilated_attention_pytorch import LongNetEncoder

FEATURES, CLASSES = 64, 2


def make_batch(generator: torch.Generator, slides: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Tiles (B, N, FEATURES), a padding mask (B, N) and labels (B,) of slides with 300 to 900 tiles."""
    lengths = torch.randint(300, 900, (slides,), generator=generator)
    padding = torch.arange(int(lengths.max())) >= lengths[:, None]
    labels = torch.randint(CLASSES, (slides,), generator=generator)
    tiles = torch.randn(*padding.shape, FEATURES, generator=generator)
    marked = torch.rand(padding.shape, generator=generator) < 0.05  # one tile in twenty carries the signal
    tiles[..., 0] += 4.0 * marked * (2 * labels[:, None] - 1)
    return tiles, padding, labels


class SlideClassifier(nn.Module):
    """LongNet over the tiles, a mean over those that are not padding, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = LongNetEncoder(
            FEATURES, nhead=4, num_layers=2, dim_feedforward=128, segment_lengths=[128, 1024], dilation_rates=[1, 8]
        )
        self.head = nn.Linear(FEATURES, CLASSES)

    def forward(self, tiles: Tensor, padding: Tensor) -> Tensor:
        """Logits (B, CLASSES)."""
        kept = ~padding.unsqueeze(-1)
        encoded = self.encoder(tiles, key_padding_mask=padding) * kept
        return self.head(encoded.sum(1) / kept.sum(1))


def main(steps: int = 30) -> float:
    """Train, print the loss now and then, and return the share of right answers on fresh slides."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = SlideClassifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(steps):
        tiles, padding, labels = make_batch(generator)
        loss = nn.functional.cross_entropy(model(tiles, padding), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0 or step == steps - 1:
            print(f"step {step:3d}  loss {loss.item():.3f}")
    tiles, padding, labels = make_batch(generator, slides=16)
    with torch.no_grad():
        right = (model(tiles, padding).argmax(1) == labels).float().mean().item()
    print(f"right on 16 fresh slides: {right:.0%}")
    return right


if __name__ == "__main__":
    main()
