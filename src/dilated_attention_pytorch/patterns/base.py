"""What a pattern is: a count for every (head, query position, key position), and how patterns combine.

`count` alone makes a pattern right on every backend. `branches` is the optional closed form that makes it fast.
"""

from __future__ import annotations

import ast
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor

from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.problem import Problem

if TYPE_CHECKING:
    from pathlib import Path

Index: TypeAlias = "int | Tensor"

UNBOUNDED = 1 << 20
"""The upper bound of a count of which nothing is known."""


class Block(NamedTuple):
    """Some rows: they stand at positions from ``low`` to ``high``, each ``low`` plus a multiple of ``step``.

    Elementwise int64 tensors of many blocks; a single row has step 0.
    """

    low: Tensor
    high: Tensor
    step: Tensor

    def take(self, which: Tensor) -> Block:
        """The blocks with these numbers."""
        return Block(*(x[which] for x in self))


@dataclass(frozen=True)
class Branch:
    """A product of simple patterns in closed form; a pattern with closed form is a sum of these.

    Without a segment length it is one segment that never ends. `documents` is the pattern whose documents restart it.
    ``of_heads`` is (first, total) where head 0 is head ``first`` of so many, as in a slice of the heads.
    """

    segment_length: int | None = None
    dilation_rate: int = 1
    head_offset: str = "modulo"
    heads: tuple[int, int] | None = None
    is_causal: bool = False
    window: int | None = None
    documents: Pattern | None = None
    of_heads: tuple[int, int] | None = None

    def offset(self, head: Index, num_heads: int) -> Index:
        """The place of a head's grid: "modulo" is the paper's, "torchscale" that of torchscale's code and weights."""
        if self.of_heads is not None:
            head, num_heads = head + self.of_heads[0], self.of_heads[1]
        if self.head_offset == "modulo":
            return head % self.dilation_rate
        return head // -(-num_heads // self.dilation_rate)

    def head_range(self, num_heads: int) -> tuple[int, int]:
        """First head and one past the last head that run this branch; dealt out, the first groups get one head more."""
        if self.heads is None:
            return 0, num_heads
        first, total = (0, num_heads) if self.of_heads is None else self.of_heads
        group, groups = self.heads
        size, extra = divmod(total, groups)
        start = group * size + min(group, extra)
        end = start + size + (group < extra)
        return min(max(start - first, 0), num_heads), min(max(end - first, 0), num_heads)

    def product(self, other: Branch) -> Branch | None:
        """The branch whose count is the product of both counts, or None when it has no closed form."""
        if self.segment_length is not None and other.segment_length is not None:
            return None
        first, second = (self, other) if self.segment_length is not None else (other, self)
        if first.documents is not None and second.documents is not None:
            return None
        if second.documents is not None and first.segment_length is not None:
            return None  # documents only cut the links of a global grid
        windows = [b.window for b in (first, second) if b.window is not None]
        return replace(
            first,
            is_causal=first.is_causal or second.is_causal,
            window=min(windows, default=None),
            documents=first.documents or second.documents,
        )


class Pattern(ABC):
    """How many times query ``q`` of a head sees key ``k``. Immutable; combine with ``&`` (product) and ``+`` (sum)."""

    kinds: ClassVar[dict[str, type[Pattern]]] = {}

    def __init_subclass__(cls) -> None:
        Pattern.kinds[cls.__name__] = cls

    @abstractmethod
    def count(self, head: Index, num_heads: int, q: Index, k: Index) -> Index:
        """How often query position ``q`` sees key position ``k``; elementwise over broadcastable integers.

        ``q`` and ``k`` have at most three dims (head, query, key). A pattern with a batch of tables adds a leading dim.
        """

    def parts(self) -> Iterator[Pattern]:
        """This pattern, and all those that it is made of."""
        yield self
        for f in fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            if isinstance(value, Pattern):
                yield from value.parts()

    def branches(self) -> tuple[Branch, ...] | None:
        """The closed form as a sum of branches, or None: then plans work from `count`."""
        return None

    def count_bounds(self, head: Tensor, num_heads: int, q: Block, k: Block) -> tuple[Index, Index]:
        """Least and greatest count over blocks of queries and keys, elementwise; they need not be tight.

        Without a closed form nothing is known: (0, UNBOUNDED). A pattern with a batch of tables adds leading dims, as
        in `count`.
        """
        return 0, UNBOUNDED

    @property
    def varies_by_head(self) -> bool:
        """Whether heads may have different counts."""
        return True

    @property
    def varies_by_sample(self) -> bool:
        """Whether samples of a batch may have different counts: then `count` adds a leading dim."""
        return False

    def of_sample(self, sample: int) -> Pattern:
        """The pattern as one sample of the batch sees it: its tables have no batch dim.

        Example:
            >>> from dilated_attention_pytorch import Documents
            >>> Documents([[3, 1], [2, 2]]).of_sample(1).lengths
            tensor([2, 2])
        """
        return self

    @property
    def is_causal(self) -> bool:
        """Whether it is known that no query sees a key at a later position."""
        return False

    @property
    def period(self) -> int | None:
        """Tokens by which query and key may move together without changing any count, or None."""
        return None

    @property
    def key_classes(self) -> int | None:
        """The modulus by whose residues keys are to stand in order, whatever the tables hold; None leaves it to plans.

        For patterns of which only the keys lie on grids.
        """
        return None

    @property
    def chosen_rows(self) -> int | None:
        """Positions of a block of queries for which tables were chosen from the data; None: nothing was chosen.

        Rows of two such blocks must not share a tile: what the later one sees may come from tokens that no row of the
        earlier one sees, and must not decide how a row of the earlier one is summed.
        """
        return None

    def signs(self, head: Tensor, num_heads: int, q: Block, k: Block) -> tuple[Tensor, ...] | None:
        """Numbers of pairs of blocks, as `count_bounds` takes them: where they agree, the counts are equal.

        Pairs are compared whose rows stand alike above their lowest ones. None: nothing is known but the `period`.
        """
        return None

    def check(self, problem: Problem) -> None:
        """Raise InvalidInput when the pattern does not fit the problem's heads, batch or lengths."""

    @property
    def tables(self) -> tuple[Tensor, ...]:
        """The int tensors that the pattern reads, in the order in which its text names them."""
        own = (getattr(self, f.name) for f in fields(self))  # type: ignore[arg-type]
        return tuple(x for x in own if isinstance(x, Tensor))

    def text(self, first_table: int = 0) -> str:
        """The canonical description; with `tables` it is the whole pattern. Tables are named ``t0, t1, ...``."""
        words, place = [], first_table
        for f in fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            if isinstance(value, Tensor):
                words.append(f"{f.name}=t{place}")
                place += 1
            else:
                words.append(f"{f.name}={value!r}")
        return f"{type(self).__name__}({', '.join(words)})"

    def __and__(self, other: Pattern) -> Pattern:
        return And(self, other) if isinstance(other, Pattern) else NotImplemented

    def __add__(self, other: Pattern) -> Pattern:
        return Sum(self, other) if isinstance(other, Pattern) else NotImplemented

    def to_mask(
        self,
        num_heads: int,
        query_length: int,
        key_length: int | None = None,
        *,
        query_start: int | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """All counts as int64: (H, Nq, Nk), or (B, H, Nq, Nk) for a pattern with a batch of tables.

        Queries stand at ``query_start...``, by default the last rows of the keys, as in `attend`.

        Example:
            >>> from dilated_attention_pytorch import Causal
            >>> Causal().to_mask(1, 2, 3)
            tensor([[[1, 1, 0],
                     [1, 1, 1]]])
        """
        key_length = query_length if key_length is None else key_length
        start = key_length - query_length if query_start is None else query_start
        if min(num_heads, query_length, key_length, start) < 0:
            raise InvalidInput(
                f"to_mask: expected lengths >= 0 and query_start >= 0. Got num_heads={num_heads}, "
                f"query_length={query_length}, key_length={key_length}, query_start={start}."
            )
        head = torch.arange(num_heads, device=device).view(-1, 1, 1)
        q = torch.arange(start, start + query_length, device=device).view(-1, 1)
        k = torch.arange(key_length, device=device)
        return dense_counts(self, head, num_heads, q, k)

    def draw(
        self,
        query_length: int,
        key_length: int | None = None,
        *,
        num_heads: int = 1,
        head: int = 0,
        path: str | Path | None = None,
    ) -> str:
        """A picture of one head's counts as text: a row per query, ``·`` for 0, digits for counts, ``+`` above 9.

        With ``path`` the same picture is also written as an image, by matplotlib, in the format of the path's suffix.

        Example:
            >>> from dilated_attention_pytorch import Dilated
            >>> print(Dilated(4, 2).draw(4))
            1·1·
            ····
            1·1·
            ····
        """
        counts = self.to_mask(num_heads, query_length, key_length)
        counts = counts[0, head] if counts.dim() == 4 else counts[head]
        if path is not None:
            from matplotlib import image  # an extra, needed for pictures only

            image.imsave(str(path), counts.numpy(), cmap="magma_r")
        symbols = "·123456789+"
        return "\n".join("".join(symbols[min(c, 10)] for c in row) for row in counts.tolist())


def dense_counts(pattern: Pattern, head: Tensor, num_heads: int, q: Tensor, k: Tensor) -> Tensor:
    """``pattern.count`` as int64 of its full shape: (H, Nq, Nk), with a leading batch when the tables have one."""
    shape = torch.broadcast_shapes(head.shape, q.shape, k.shape)
    counts = torch.as_tensor(pattern.count(head, num_heads, q, k), dtype=torch.int64, device=k.device)
    return counts.expand(torch.broadcast_shapes(counts.shape, shape))


@dataclass(frozen=True)
class _Pair(Pattern):
    left: Pattern
    right: Pattern

    @property
    def tables(self) -> tuple[Tensor, ...]:
        return self.left.tables + self.right.tables

    @property
    def varies_by_head(self) -> bool:
        return self.left.varies_by_head or self.right.varies_by_head

    @property
    def varies_by_sample(self) -> bool:
        return self.left.varies_by_sample or self.right.varies_by_sample

    def of_sample(self, sample: int) -> Pattern:
        return replace(self, left=self.left.of_sample(sample), right=self.right.of_sample(sample))

    @property
    def period(self) -> int | None:
        left, right = self.left.period, self.right.period
        return None if left is None or right is None else math.lcm(left, right)

    def check(self, problem: Problem) -> None:
        self.left.check(problem)
        self.right.check(problem)

    def _joined(self, sign: str, first_table: int) -> str:
        return f"({self.left.text(first_table)} {sign} {self.right.text(first_table + len(self.left.tables))})"


@dataclass(frozen=True)
class And(_Pair):
    """The product of two patterns: ``a & b``."""

    @property
    def is_causal(self) -> bool:
        return self.left.is_causal or self.right.is_causal

    def count(self, head: Index, num_heads: int, q: Index, k: Index) -> Index:
        return self.left.count(head, num_heads, q, k) * self.right.count(head, num_heads, q, k)

    def branches(self) -> tuple[Branch, ...] | None:
        left, right = self.left.branches(), self.right.branches()
        if left is None or right is None:
            return None
        products = tuple(a.product(b) for a in left for b in right)
        return None if None in products else products  # type: ignore[return-value]

    def count_bounds(self, head: Tensor, num_heads: int, q: Block, k: Block) -> tuple[Index, Index]:
        (a, b), (c, d) = (x.count_bounds(head, num_heads, q, k) for x in (self.left, self.right))
        return a * c, torch.as_tensor(b * d).clamp(max=UNBOUNDED)

    def text(self, first_table: int = 0) -> str:
        return self._joined("&", first_table)


@dataclass(frozen=True)
class Sum(_Pair):
    """The sum of two patterns, counts added: ``a + b``."""

    @property
    def is_causal(self) -> bool:
        return self.left.is_causal and self.right.is_causal

    def count(self, head: Index, num_heads: int, q: Index, k: Index) -> Index:
        return self.left.count(head, num_heads, q, k) + self.right.count(head, num_heads, q, k)

    def branches(self) -> tuple[Branch, ...] | None:
        left, right = self.left.branches(), self.right.branches()
        return None if left is None or right is None else left + right

    def count_bounds(self, head: Tensor, num_heads: int, q: Block, k: Block) -> tuple[Index, Index]:
        (a, b), (c, d) = (x.count_bounds(head, num_heads, q, k) for x in (self.left, self.right))
        return a + c, b + d

    def text(self, first_table: int = 0) -> str:
        return self._joined("+", first_table)


def pattern_from_text(text: str, tables: Sequence[Tensor]) -> Pattern:
    """The pattern that `Pattern.text` and `Pattern.tables` describe. Reads a small grammar; evaluates nothing.

    Raises InvalidInput for any other text.

    Example:
        >>> pattern_from_text("(Dilated(segment_length=8, dilation_rate=2) & Causal())", []).text()
        "(Dilated(segment_length=8, dilation_rate=2, head_offset='modulo', heads=None) & Causal())"
    """

    def build(node: ast.expr) -> Pattern:
        if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.BitAnd)):
            kind = Sum if isinstance(node.op, ast.Add) else And
            return kind(build(node.left), build(node.right))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in Pattern.kinds:
            words = {word.arg: value(word.value) for word in node.keywords if word.arg is not None}
            if not node.args and len(words) == len(node.keywords):
                return Pattern.kinds[node.func.id](**words)
        raise ValueError(f"unexpected {ast.unparse(node)!r}")

    def value(node: ast.expr) -> object:
        if isinstance(node, ast.Call | ast.BinOp):
            return build(node)
        if isinstance(node, ast.Name):
            return tables[int(node.id[1:])]
        return ast.literal_eval(node)

    try:
        return build(ast.parse(text, mode="eval").body)
    except (SyntaxError, TypeError, IndexError, ValueError) as error:
        raise InvalidInput(f"pattern: expected Pattern.text(). Got {text!r}: {error}.") from error
