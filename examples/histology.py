"""A histology picture in patches: ordered along a Hilbert curve, attended, mapped back; and the same row by row.

Noise is added to the picture. Each patch becomes the mean of the patches of its segment that look like it, which is
what attention computes when logits are minus squared distances of colours (non-local means, Buades et al., 2005).
No weights are learnt: how much noise goes depends on what a segment holds, and so on the order of the patches.

Run: python examples/histology.py [figure.png]      (needs scikit-image and matplotlib)
"""

import math
import sys
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from skimage import data
from torch import Tensor

from dilated_attention_pytorch.nn import DilatedAttention, Ordered
from dilated_attention_pytorch.orderings import Order, hilbert_order, mean_segment_distance, raster_order

PATCH = 4  # pixels
SEGMENT = 64  # patches
NOISE = 0.2  # standard deviation; colours are 0 to 1
GRID = (512 // PATCH, 512 // PATCH)
ZOOM = 32  # patches of the corner that is drawn large
SHOWN = 9 * GRID[1] + 13  # the patch whose attention is drawn


def cut(picture: Tensor) -> Tensor:
    """The patches (1, N, 48) of a picture (512, 512, 3), row by row."""
    blocks = picture.view(GRID[0], PATCH, GRID[1], PATCH, 3).transpose(1, 2)
    return blocks.reshape(1, GRID[0] * GRID[1], -1)


def paste(patches: Tensor) -> Tensor:
    """The picture whose patches these are."""
    return patches.view(*GRID, PATCH, PATCH, 3).transpose(1, 2).reshape(512, 512, 3)


def heads_of(patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (1, N, 1, D) for which ``q.k`` is minus half the squared distance of mean colours.

    Up to a term of the query alone, which softmax takes out: ``-|a - b|^2 / 2 = a.b - |b|^2 / 2 - |a|^2 / 2``.
    """
    colours = patches.unflatten(-1, (PATCH * PATCH, 3)).mean(-2)
    queries = torch.cat((colours, torch.ones_like(colours[..., :1])), -1)
    keys = torch.cat((colours, -colours.square().sum(-1, keepdim=True) / 2), -1)
    return queries.unsqueeze(2), keys.unsqueeze(2), patches.unsqueeze(2)


def segment_attention() -> DilatedAttention:
    """Attention inside segments; the width of its kernel is four times the variance of the noise in a mean colour."""
    return DilatedAttention([SEGMENT], [1], softmax_scale=PATCH**2 / (4 * NOISE**2))


def decibels(picture: Tensor, clean: Tensor) -> float:
    """The peak signal-to-noise ratio of a picture."""
    return -10 * math.log10((picture - clean).square().mean().item())


def attention_of(patch: int, order: Order, heads: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """The weights over the grid with which a patch reads its segment; a segment alone is a short sequence."""
    place = int(order.inverse[patch])
    members = order.permutation[place // SEGMENT * SEGMENT :][:SEGMENT]
    _, weights = segment_attention()(*(x[:, members] for x in heads), need_weights=True)
    grid = torch.zeros(GRID[0] * GRID[1])
    grid[members] = weights[0, 0, place % SEGMENT]
    return grid.view(GRID)


def draw(path: Path, clean: Tensor, noisy: Tensor, restored: dict[str, Tensor], orders: dict[str, Order]) -> None:
    """The figure: above the orders, in the picture's corner; below what attention reads there, and what it gives."""
    figure = Figure(figsize=(13, 6.4), layout="constrained")
    panels = figure.subplots(2, 4)
    corner = clean[: ZOOM * PATCH, : ZOOM * PATCH].clamp(0, 1)
    heads = heads_of(cut(noisy))
    show(panels[0, 0], clean, "the picture")
    show(panels[0, 1], corner, f"its corner of {ZOOM} x {ZOOM} patches, and the curve")
    row, column = torch.unravel_index(orders["Hilbert"].permutation, GRID)
    inside = (row < ZOOM) & (column < ZOOM)
    centres = (((x[inside] + 0.5) * PATCH - 0.5).numpy() for x in (column, row))
    panels[0, 1].plot(*centres, color="black", linewidth=0.8)
    for (name, order), axes in zip(orders.items(), panels[0, 2:]):
        segments = (order.inverse // SEGMENT).view(GRID)[:ZOOM, :ZOOM]
        colours = (segments * 7) % 20  # neighbouring segments in different colours
        axes.imshow(colours.numpy(), cmap="tab20", interpolation="nearest")
        axes.set_title(f"segments of {SEGMENT} patches: {name}", fontsize=10)
    show(panels[1, 0], noisy, f"with noise: {decibels(noisy, clean):.1f} dB")
    along = restored["Hilbert"]
    show(panels[1, 1], along, f"attended along the curve: {decibels(along, clean):.1f} dB")
    for (name, order), axes in zip(orders.items(), panels[1, 2:]):
        weights = attention_of(SHOWN, order, heads)[:ZOOM, :ZOOM]
        axes.imshow(weights.numpy(), cmap="magma_r", interpolation="nearest")
        axes.plot(SHOWN % GRID[1], SHOWN // GRID[1], "+", color="tab:cyan", markersize=9)
        axes.set_title(f"what the marked patch reads: {name}", fontsize=10)
    for axes in panels.flat:
        axes.set_axis_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    if path.suffix == ".png":  # 256 colours look the same and take a third of the space
        Image.open(path).convert("RGB").quantize(256, Image.Quantize.FASTOCTREE).save(path, optimize=True)


def show(axes: Axes, picture: Tensor, title: str) -> None:
    """A picture with its title."""
    axes.imshow(picture.clamp(0, 1).numpy())
    axes.set_title(title, fontsize=10)


def main(path: Path = Path("runs/histology.png")) -> dict[str, float]:
    """Attend in both orders, print and draw what came out, and return the signal-to-noise ratios in dB."""
    clean = torch.from_numpy(data.immunohistochemistry()).float() / 255
    noisy = clean + NOISE * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    orders = {"rows": raster_order(GRID), "Hilbert": hilbert_order(GRID)}
    heads = heads_of(cut(noisy))
    restored, figures = {}, {"noise": decibels(noisy, clean)}
    print(f"{GRID[0] * GRID[1]:,} patches of {PATCH} x {PATCH} pixels, with noise {figures['noise']:.2f} dB")
    for name, order in orders.items():
        attended = Ordered(segment_attention(), order)(*heads)
        restored[name] = paste(attended.squeeze(2))
        figures[name] = decibels(restored[name], clean)
        apart = mean_segment_distance(order, GRID, SEGMENT)
        print(f"{name:8s} two patches of a segment lie {apart:4.1f} apart, attended {figures[name]:.2f} dB")
    draw(path, clean, noisy, restored, orders)
    print(f"drawn in {path}")
    return figures


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
