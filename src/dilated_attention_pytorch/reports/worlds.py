"""Drawings of a world: which rank computes which pairs in each layout, and which keys reach a rank by each method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dilated_attention_pytorch.parallel.costs import planned_world, rank_work
from dilated_attention_pytorch.parallel.layouts import LAYOUTS, Layout
from dilated_attention_pytorch.patterns import Causal, Pattern, longnet
from dilated_attention_pytorch.problem import make_problem, positions_tensor
from dilated_attention_pytorch.reports.figures import COLOURS, INK, LINE, SOFT, check_matplotlib

TOKENS, WORLD, HEADS = 48, 4, 4
DILATED = ((8, 24, 48), (1, 2, 4))
"""Segment lengths and rates of the pattern drawn."""
METHODS = ("ring", "gather", "all_to_all")
ABSENT, OWN, ARRIVES = 0, 1, 2


def ranks_of_rows(layout: Layout) -> Tensor:
    """The rank that holds each row of the sequence, int64 (N,).

    Example:
        >>> ranks_of_rows(Layout("striped", 5, 2))
        tensor([0, 1, 0, 1, 0])
    """
    ranks = torch.empty(layout.length, dtype=torch.int64)
    for rank in range(layout.world):
        ranks[positions_tensor(layout.positions(rank)) - layout.start] = rank
    return ranks


def work_shares(pattern: Pattern, layout: Layout, num_heads: int = 1) -> list[float]:
    """The work of each rank over the mean.

    Example:
        >>> work_shares(Causal(), Layout("contiguous", 4, 2))
        [0.6, 1.4]
    """
    x = torch.empty(1, layout.length, num_heads, 1, device="meta")
    problem = make_problem(x, x, x, scale=1.0, query_start=0)
    work = rank_work(problem, pattern, planned_world(problem, layout.name, layout.world))
    return [pairs * layout.world / work.total for pairs in work.pairs]


def keys_of_rank(pattern: Pattern, layout: Layout, rank: int, method: str, num_heads: int) -> Tensor:
    """Which keys a rank holds at some time: ABSENT, OWN (before anything is sent) or ARRIVES, (H, N).

    "ring" brings all keys of a rank of which anything is seen (it leaves out blocks of large shards), "gather" the keys
    that the rank's own queries see, "all_to_all" those of the heads that the rank computes.
    """
    own = ranks_of_rows(layout) == rank
    seen = pattern.to_mask(num_heads, layout.length)[:, own].any(1)  # (H, N)
    if method == "ring":
        ranks = ranks_of_rows(layout)
        needed = torch.stack([seen[:, ranks == r].any() for r in range(layout.world)])
        arrives = needed[ranks].expand(num_heads, -1)
    elif method == "gather":
        arrives = seen
    else:
        head = torch.arange(num_heads).view(-1, 1)
        arrives = (head * layout.world // num_heads == rank).expand(-1, layout.length)
    return torch.where(own, OWN, torch.where(arrives, ARRIVES, ABSENT))


def layouts_figure(path: Path) -> None:
    """A PNG in `path`: pairs coloured by the rank that computes them, causal and dilated causal, in each layout.

    Below each panel stands each rank's share of the work. Raises InvalidInput when matplotlib is not installed.
    """
    dilated = longnet(*DILATED) & Causal()
    rows: tuple[tuple[str, Pattern], ...] = (("causal", Causal()), ("LongNet, causal", dilated))
    panels = [[_pairs_by_rank(pattern, Layout(name, TOKENS, WORLD)) for name in LAYOUTS] for _, pattern in rows]
    notes = [
        [_shares_text(work_shares(pattern, Layout(name, TOKENS, WORLD), HEADS)) for name in LAYOUTS]
        for _, pattern in rows
    ]
    titles = [[f"{name}: {words}" for name in LAYOUTS] for words, _ in rows]
    _draw(path, panels, titles, notes, ("white", *COLOURS[:WORLD]), "key", "query", [f"rank {r}" for r in range(WORLD)])


def methods_figure(path: Path, rank: int = 1) -> None:
    """A PNG in `path`: the keys that a rank holds, and those that reach it by each method, for each head.

    Raises InvalidInput when matplotlib is not installed.
    """
    pattern, layout = longnet(*DILATED), Layout("contiguous", TOKENS, WORLD)
    held = [keys_of_rank(pattern, layout, rank, method, HEADS) for method in METHODS]
    titles = [[method] for method in METHODS]
    notes = [[f"{100 * float((x == ARRIVES).double().mean()):.0f} % of all keys arrive"] for x in held]
    colours = ("#f3f5f7", COLOURS[0], COLOURS[1])
    names = [f"held by rank {rank}", "arrives"]
    _draw(path, [[x] for x in held], titles, notes, colours, "key", "head", names, height=1.5)


def _pairs_by_rank(pattern: Pattern, layout: Layout) -> Tensor:
    """0 where no head's query sees the key, else 1 and the rank that computes the pair: (N, N)."""
    seen = pattern.to_mask(HEADS, layout.length).any(0)
    return seen * (1 + ranks_of_rows(layout)).view(-1, 1)


def _shares_text(shares: Sequence[float]) -> str:
    return "work " + "  ".join(f"{share:.2f}" for share in shares)


def _draw(
    path: Path,
    panels: Sequence[Sequence[Tensor]],
    titles: Sequence[Sequence[str]],
    notes: Sequence[Sequence[str]],
    colours: Sequence[str],
    x_label: str,
    y_label: str,
    names: Sequence[str],
    height: float = 3.0,
) -> None:
    check_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    down, across = len(panels), len(panels[0])
    figure = Figure(figsize=(max(3.0 * across, 7.6), height * down + 0.4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(down, across, squeeze=False)
    for i in range(down):
        for j in range(across):
            axes, panel = grid[i][j], panels[i][j]
            axes.imshow(
                panel.numpy(),
                cmap=ListedColormap(list(colours)),
                vmin=0,
                vmax=len(colours) - 1,
                interpolation="nearest",
                aspect="auto",
            )
            axes.set_title(titles[i][j], loc="left", fontsize=10, fontweight="bold", color=INK)
            axes.set_xlabel(f"{x_label}\n{notes[i][j]}" if notes[i][j] else x_label, color=SOFT, fontsize=9)
            axes.set_ylabel(y_label if j == 0 else "", color=SOFT, fontsize=9)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_color(LINE)
    figure.legend(
        handles=[Patch(facecolor=colour, label=name) for colour, name in zip(colours[1:], names)],
        loc="outside lower center",
        ncols=len(names),
        frameon=False,
        labelcolor=SOFT,
    )
    figure.savefig(path, format="png", facecolor="white")
