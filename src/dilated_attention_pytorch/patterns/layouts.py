"""Builders of block-sparse patterns: which blocks of keys each block of queries sees.

Every builder returns a `BlockSparse` for query positions below ``query_length`` and key positions below ``key_length``
(tokens; by default the same), in square blocks of ``block_size`` tokens. How many blocks are kept is said once: by the
kind's own size, or by ``density``, the share of all blocks of the table, in (0, 1]. Of the sizes that a kind can have
it takes the one whose share is nearest to ``density``, the smaller of two that are equally near. The share is that of
the table: ``& Causal()`` cuts about half of the pairs of most kinds afterwards.

| builder          | own size                | keeps                                                       |
|------------------|-------------------------|-------------------------------------------------------------|
| `local_window`   | ``window``, tokens      | blocks near the diagonal                                    |
| `dilated_sparse` | ``links``, blocks       | steps of several dilation rates around the diagonal         |
| `global_local`   | ``window``, tokens      | a window, and the first blocks' rows and columns            |
| `axial`          | ``thickness``, tokens   | blocks that share a row or a column of a grid               |
| `strided`        | ``stride``, blocks      | every n-th diagonal                                         |
| `random_blocks`  | ``links``, blocks       | the diagonal and, per row, random blocks                    |
| `hierarchical`   | ``window``, tokens      | a window, and beyond it ever fewer diagonals                |
| `hybrid`         |                         | what several of them keep                                   |

Where heads may differ, ``num_heads`` gives each a table of its own, and ``density`` is met by all of them together;
without it they share one. Combine patterns with ``&`` and ``+``, or tables of one block size with `hybrid`.

All raise InvalidInput for lengths or sizes below 1, and unless exactly one of ``density`` and the kind's size is given.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.patterns.blocks import BlockSparse

_NEVER = 1 << 40
_CHUNK_CELLS = 1 << 20


def local_window(
    query_length: int,
    key_length: int | None = None,
    *,
    block_size: int = 128,
    window: int | None = None,
    density: float | None = None,
) -> BlockSparse:
    """Every block that holds a pair of ``Window(window)``: tokens less than ``window`` apart.

    The sliding window of Longformer (arXiv 2004.05150, section 3.1) in whole blocks; ``& Window(window)`` cuts it to
    the exact one. A block always sees itself, so ``density`` is at least that of the diagonal.

    Example:
        >>> print(local_window(6, block_size=1, window=2).draw(6))
        11····
        111···
        ·111··
        ··111·
        ···111
        ····11
    """
    rows, columns = _blocks("local_window", query_length, key_length, block_size, window=window, density=density)
    distance = _distances(rows, columns).abs()
    return BlockSparse(block_size, _nearest_by_distance(distance, rows, columns, _reach(window, block_size), density))


def dilated_sparse(
    query_length: int,
    key_length: int | None = None,
    *,
    block_size: int = 128,
    links: int | None = None,
    density: float | None = None,
    dilation_rates: Sequence[int] = (1, 2, 4),
    num_heads: int | None = None,
) -> BlockSparse:
    """At each rate r a block sees the blocks r, 2r, ... ``links * r`` blocks before and after it, and itself.

    The dilated sliding window of Longformer (arXiv 2004.05150, section 3.1), with rates that grow with the reach as
    LongNet's do (arXiv 2307.02486). With ``num_heads``, head h looks ``h mod r`` blocks further on: r heads together
    see every block. Raises InvalidInput for rates that are no positive ints.

    Example:
        >>> print(dilated_sparse(6, block_size=1, links=1, dilation_rates=[1, 3]).draw(6))
        11·1··
        111·1·
        ·111·1
        1·111·
        ·1·111
        ··1·11
    """
    rows, columns = _blocks(
        "dilated_sparse", query_length, key_length, block_size, links=links, density=density, num_heads=num_heads
    )
    if len(dilation_rates) == 0 or any(isinstance(r, bool) or not isinstance(r, int) or r < 1 for r in dilation_rates):
        raise InvalidInput(f"dilated_sparse: expected dilation_rates of at least 1 block. Got {dilation_rates!r}.")
    distance = _distances(rows, columns)
    needed = torch.where(distance == 0, 0, _NEVER).expand(num_heads or 1, -1)
    for rate in dilation_rates:
        moved = distance - _heads(num_heads) % rate
        needed = torch.minimum(needed, torch.where(moved % rate == 0, (moved // rate).abs(), _NEVER))
    needed = needed if num_heads is not None else needed[0]
    return BlockSparse(block_size, _nearest_by_distance(needed, rows, columns, links, density))


def global_local(
    query_length: int,
    key_length: int | None = None,
    *,
    block_size: int = 128,
    window: int | None = None,
    density: float | None = None,
    global_blocks: int = 1,
) -> BlockSparse:
    """A `local_window`, and the first ``global_blocks`` blocks see every block and are seen by every block.

    Longformer's global tokens (arXiv 2004.05150, section 3.1) and ETC's (arXiv 2004.08483), moved to the front.
    ``density`` chooses the window; it is at least that of the global blocks and the diagonal. Raises InvalidInput for
    more global blocks than blocks of queries or of keys.

    Example:
        >>> print(global_local(6, block_size=1, window=1).draw(6))
        111111
        11····
        1·1···
        1··1··
        1···1·
        1····1
    """
    rows, columns = _blocks("global_local", query_length, key_length, block_size, window=window, density=density)
    if isinstance(global_blocks, bool) or not 0 <= global_blocks <= min(rows, columns):
        raise InvalidInput(
            f"global_local: expected global_blocks from 0 to {min(rows, columns)}, the blocks there are. "
            f"Got {global_blocks!r}; give fewer, or a smaller block_size."
        )
    g, reach = global_blocks, _reach(window, block_size)
    if density is not None:  # the window fills the table without the global rows and columns
        inner_rows, inner_columns = rows - g, columns - g
        kept = _kept_by_distance(_distances(inner_rows, inner_columns).abs(), inner_rows, inner_columns)
        reach = _nearest(kept + rows * columns - inner_rows * inner_columns, rows * columns, density)
    assert reach is not None
    layout = _by_distance(_distances(rows, columns).abs() <= reach, rows, columns)
    layout[:g] = True
    layout[:, :g] = True
    return BlockSparse(block_size, layout)


def axial(
    query_length: int,
    *,
    grid: tuple[int, int],
    block_size: int = 128,
    thickness: int | None = None,
    density: float | None = None,
) -> BlockSparse:
    """Every block that holds a pair of tokens in one row or one column of a grid, whose tokens stand row by row.

    Axial attention (arXiv 1912.12180) in whole blocks. ``grid`` is (rows, columns) of tokens. ``thickness`` is that of
    the lines: with 2 a token sees the rows and columns next to its own, too; 1 is axial attention. Blocks as long as a
    row meet every column: then all blocks are kept, and a smaller ``block_size`` is needed for axes to save anything.
    Raises InvalidInput for a grid that does not hold ``query_length`` tokens.

    Example:
        >>> print(axial(6, grid=(2, 3), block_size=1, thickness=1).draw(6))
        1111··
        111·1·
        111··1
        1··111
        ·1·111
        ··1111
    """
    rows, _ = _blocks("axial", query_length, None, block_size, thickness=thickness, density=density)
    sides = grid if isinstance(grid, tuple | list) and all(isinstance(n, int) and n > 0 for n in grid) else ()
    if len(sides) != 2 or sides[0] * sides[1] != query_length:
        raise InvalidInput(
            f"axial: expected a grid (rows, columns) of {query_length} tokens, as many as query_length. Got {grid!r}."
        )
    gap = _axial_gaps(query_length, grid[1], block_size)
    if density is not None:
        parts = [torch.bincount(part, minlength=max(grid)) for part in gap.flatten().split(_CHUNK_CELLS)]
        thickness = _nearest(torch.stack(parts).sum(0).cumsum(0), rows * rows, density) + 1
    assert thickness is not None
    return BlockSparse(block_size, gap < thickness)


def strided(
    query_length: int,
    key_length: int | None = None,
    *,
    block_size: int = 128,
    stride: int | None = None,
    density: float | None = None,
    num_heads: int | None = None,
) -> BlockSparse:
    """A block sees every ``stride``-th block, counted from itself, over the whole length.

    The far half of the Sparse Transformer's strided attention (arXiv 1904.10509, section 4.2); `hybrid` with a
    `local_window` of ``stride`` blocks adds the near half. With ``num_heads``, head h counts from ``h mod stride``
    blocks further on and keeps the diagonal: ``stride`` heads together see every block.

    Example:
        >>> print(strided(6, block_size=1, stride=3).draw(6))
        1··1··
        ·1··1·
        ··1··1
        1··1··
        ·1··1·
        ··1··1
    """
    rows, columns = _blocks(
        "strided", query_length, key_length, block_size, stride=stride, density=density, num_heads=num_heads
    )
    if density is not None:
        widest = max(rows, columns)
        cells = torch.tensor([_cells_at(s, rows, columns, num_heads or 1) for s in range(widest, 0, -1)])
        stride = widest - _nearest(cells, rows * columns * (num_heads or 1), density)
    assert stride is not None
    distance = _distances(rows, columns)
    kept = ((distance - _heads(num_heads)) % stride == 0) | (distance == 0)
    return BlockSparse(block_size, _by_distance(kept if num_heads is not None else kept[0], rows, columns))


def random_blocks(
    query_length: int,
    key_length: int | None = None,
    *,
    block_size: int = 128,
    links: int | None = None,
    density: float | None = None,
    num_heads: int | None = None,
    seed: int = 0,
) -> BlockSparse:
    """Each block of queries sees ``links`` blocks: its own and, of the others, each as likely as any.

    The random links of BigBird (arXiv 2007.14062, section 2), with the diagonal kept so that no row is empty, also
    after ``& Causal()``; rows below a wide table's last diagonal block have random links only. ``density`` gives all
    rows equally many links and some, drawn at random, one more, so the share is met to half a block, unless the table
    has fewer blocks than rows for it: then each row keeps one. Equal ``seed`` and sizes give equal tables; torch's
    global generator is not used. With ``num_heads`` heads have other links each. Raises InvalidInput for more links
    than blocks of keys.

    Example:
        >>> print(random_blocks(6, block_size=1, links=2, seed=1).draw(6))
        1···1·
        ·11···
        ··11··
        ···1·1
        1···1·
        1····1
    """
    rows, columns = _blocks(
        "random_blocks", query_length, key_length, block_size, links=links, density=density, num_heads=num_heads
    )
    lines = rows * (num_heads or 1)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise InvalidInput(f"random_blocks: expected seed to be an int. Got {seed!r}.")
    generator = torch.Generator().manual_seed(seed)
    if links is not None:
        if links > columns:
            raise InvalidInput(f"random_blocks: expected at most {columns} links, the blocks of keys. Got {links}.")
        wanted = torch.full((lines,), links)
    else:
        assert density is not None
        each, more = divmod(max(lines, round(density * lines * columns)), lines)
        wanted = torch.full((lines,), each)
        wanted[torch.randperm(lines, generator=generator)[:more]] += 1
    layout = _draw(wanted, rows, columns, generator)
    return BlockSparse(block_size, layout if num_heads is None else layout.view(num_heads, rows, columns))


def hierarchical(
    query_length: int,
    key_length: int | None = None,
    *,
    block_size: int = 128,
    window: int | None = None,
    density: float | None = None,
    num_heads: int | None = None,
) -> BlockSparse:
    """Every block within ``window`` tokens, and with each doubling of the distance half as many.

    Blocks n to 2n away are seen at every 2nd, 2n to 4n away at every 4th and so on, n being the first distance (in
    blocks) beyond the window: a row keeps about ``2n + n log2(N / n)`` blocks. With a window that reaches one
    block this is LogSparse attention (arXiv 1907.00235, section 4.2): 1, 2, 4, 8, ... away. With ``num_heads``, head h
    counts the far ones from ``h`` blocks further on.

    Example:
        >>> print(hierarchical(9, block_size=1, window=2).draw(9))
        111·1···1
        1111·1···
        11111·1··
        ·11111·1·
        1·11111·1
        ·1·11111·
        ··1·11111
        ···1·1111
        1···1·111
    """
    rows, columns = _blocks(
        "hierarchical", query_length, key_length, block_size, window=window, density=density, num_heads=num_heads
    )
    distance = _distances(rows, columns)
    moved = distance - _heads(num_heads)
    step = torch.where(moved == 0, _NEVER, moved & -moved)  # the largest power of two that divides it
    needed = (distance.abs() // step).expand(num_heads or 1, -1)  # seen within a window that reaches so far
    needed = needed if num_heads is not None else needed[0]
    return BlockSparse(block_size, _nearest_by_distance(needed, rows, columns, _reach(window, block_size), density))


def hybrid(*patterns: BlockSparse, mode: str = "union") -> BlockSparse:
    """One table from several of one block size and length.

    BigBird (arXiv 2007.14062) is ``hybrid(global_local(...), random_blocks(...))``.
    ``mode="union"`` takes the greatest count of each block, so a block that several tables keep counts once;
    ``mode="sum"`` adds counts, as ``+`` does. Tables for all heads or samples join those for each. Raises InvalidInput
    for tables of different sizes, and for any other mode.

    Example:
        >>> window, far = local_window(6, block_size=1, window=2), strided(6, block_size=1, stride=3)
        >>> print(hybrid(window, far).draw(6))
        11·1··
        111·1·
        ·111·1
        1·111·
        ·1·111
        ··1·11
    """
    if not patterns or any(not isinstance(p, BlockSparse) for p in patterns):
        kinds = [type(p).__name__ for p in patterns]
        raise InvalidInput(f"hybrid: expected BlockSparse patterns, at least one. Got {kinds}; join others with +.")
    if mode not in ("union", "sum"):
        raise InvalidInput(f"hybrid: expected mode 'union' or 'sum'. Got {mode!r}.")
    first = patterns[0]
    for p in patterns:
        if p.block_size != first.block_size or p.layout.shape[-2:] != first.layout.shape[-2:]:
            raise InvalidInput(
                f"hybrid: expected tables of one size. Got {tuple(first.layout.shape)} in blocks of "
                f"{first.block_size} and {tuple(p.layout.shape)} in blocks of {p.block_size}; join them with +."
            )
    wide = torch.int16 if all(p.layout.dtype == torch.uint8 for p in patterns) else torch.int64
    layout = first.layout if mode == "union" else first.layout.to(wide)
    for p in patterns[1:]:
        layout = torch.maximum(layout, p.layout) if mode == "union" else layout + p.layout
    small = layout.dtype != torch.uint8 and int(layout.max()) < 256 and int(layout.min()) >= 0
    return BlockSparse(first.block_size, layout.to(torch.uint8) if small else layout)


def _blocks(
    name: str, query_length: int, key_length: int | None, block_size: int, **options: float | None
) -> tuple[int, int]:
    """Blocks of queries and of keys, once all options are legal: one of ``density`` and the first option is given."""
    sizes = {"query_length": query_length, "key_length": key_length, "block_size": block_size, **options}
    density = sizes.pop("density")
    for word, value in sizes.items():
        optional = word not in ("query_length", "block_size") and value is None
        if not optional and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise InvalidInput(f"{name}: expected {word} to be an int of at least 1. Got {value!r}.")
    own = next(iter(options))
    if (density is None) == (options[own] is None):
        raise InvalidInput(f"{name}: expected either {own}= or density=. Got {own}={options[own]}, density={density}.")
    if density is not None and (isinstance(density, bool) or not 0 < density <= 1):
        raise InvalidInput(f"{name}: expected density, the share of blocks kept, in (0, 1]. Got {density!r}.")
    keys = query_length if key_length is None else key_length
    return -(-query_length // block_size), -(-keys // block_size)


def _reach(window: int | None, block_size: int) -> int | None:
    """How many blocks away a block may be that holds a token less than ``window`` tokens from one of this block."""
    return None if window is None else -(-(window - 1) // block_size)


def _heads(num_heads: int | None) -> Tensor:
    return torch.arange(num_heads or 1).view(-1, 1)


def _distances(rows: int, columns: int) -> Tensor:
    """Query block minus key block of every diagonal of a table, from its upper right to its lower left corner."""
    return torch.arange(1 - columns, rows)


def _lengths(rows: int, columns: int) -> Tensor:
    """Cells of every diagonal, in the same order."""
    distance = _distances(rows, columns)
    return (distance + columns).clamp(max=rows) - distance.clamp(min=0)


def _by_distance(kept: Tensor, rows: int, columns: int) -> Tensor:
    """The table (..., rows, columns) whose diagonals are ``kept`` (..., diagonals)."""
    return kept.flip(-1).unfold(-1, columns, 1).flip(-2)


def _kept_by_distance(needed: Tensor, rows: int, columns: int) -> Tensor:
    """Cells kept at size 0, 1, 2, ...; ``needed`` is the least size at which a diagonal is kept."""
    lengths = _lengths(rows, columns).expand(needed.shape)
    some = needed < _NEVER
    return torch.zeros(max(rows, columns) + 1, dtype=torch.int64).scatter_add(0, needed[some], lengths[some]).cumsum(0)


def _nearest_by_distance(needed: Tensor, rows: int, columns: int, size: int | None, density: float | None) -> Tensor:
    """The table of diagonals kept at a size, or at the one that meets a density best."""
    if density is not None:
        heads = needed.numel() // needed.shape[-1]
        size = _nearest(_kept_by_distance(needed, rows, columns), heads * rows * columns, density)
    assert size is not None
    return _by_distance(needed <= size, rows, columns)


def _nearest(kept: Tensor, cells: int, density: float) -> int:
    """The first place in ``kept``, ascending numbers of cells, whose share is nearest to ``density``."""
    return int((kept.double() / cells - density).abs().argmin())


def _cells_at(stride: int, rows: int, columns: int, heads: int) -> int:
    """How many cells `strided` keeps, over all heads."""
    lengths, diagonal = _lengths(rows, columns).numpy(), min(rows, columns)
    offsets = np.bincount(np.arange(heads) % stride).tolist()
    places = ((columns - 1 + offset) % stride for offset in range(len(offsets)))
    seen = sum(times * int(lengths[place::stride].sum()) for times, place in zip(offsets, places))
    return int(seen + (heads - offsets[0]) * diagonal)


def _axial_gaps(length: int, width: int, block_size: int) -> Tensor:
    """Rows or columns of the grid between two blocks, the fewer of both, 0 where they share one: (blocks, blocks)."""
    low = torch.arange(0, length, block_size, dtype=torch.int32)
    high = (low + block_size).clamp(max=length) - 1
    rows = [(low // width, high // width)]
    wraps, whole = high // width > low // width, high - low + 1 >= width
    left, right = low % width, high % width
    columns = [  # a block that goes on in the next row covers the end of its columns, and the start
        (torch.where(whole, 0, left), torch.where(whole | wraps, width - 1, right)),
        (torch.where(wraps, 0, left), right),
    ]
    found = torch.full((len(low), len(low)), length, dtype=torch.int32)
    for part in torch.arange(len(low)).split(256):
        for spans in (rows, columns):
            for a, b in spans:
                for c, d in spans:
                    gap = torch.maximum(c - b[part, None], a[part, None] - d).clamp_(min=0)
                    found[part] = torch.minimum(found[part], gap)
    return found


def _draw(wanted: Tensor, rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """A table with so many cells in each line, the diagonal among them, the others drawn without preference."""
    layout = torch.empty((len(wanted), columns), dtype=torch.bool)
    for line in torch.arange(len(wanted)).split(max(1, _CHUNK_CELLS // columns)):
        lot = torch.randint(1 << 40, (len(line), columns), generator=generator)
        lot = lot.mul_(columns).add_(torch.arange(columns))  # no two alike
        own = line % rows
        has_own = own < columns
        lot[has_own, own[has_own]] = -1
        last = wanted[line] - 1
        lowest = np.partition(lot.numpy(), last.unique().numpy(), axis=1)
        layout[line] = lot <= torch.from_numpy(lowest).gather(1, last.view(-1, 1))
    return layout
