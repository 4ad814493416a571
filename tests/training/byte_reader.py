"""A small byte model with dropout that needs no attention: the loop is tested with it, not the layers."""

import torch

from dilated_attention_pytorch.training.settings import TrainingSettings

SETTINGS = TrainingSettings(
    steps=12,
    window=128,
    short_window=64,
    short_share=0.4,
    batch_size=2,
    warmup_steps=3,
    learning_rate=1e-2,
    checkpoint_every=4,
    seed=7,
)


class Reader(torch.nn.Module):
    """A recurrent byte model; `extra` is a parameter that no gradient reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(256, 16)
        self.cell = torch.nn.GRU(16, 16, batch_first=True)
        self.dropout = torch.nn.Dropout(0.2)
        self.extra = torch.nn.Parameter(torch.zeros(3))
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden, _ = self.cell(self.dropout(self.embedding(tokens)))
        return hidden @ self.embedding.weight.T * self.scale
