"""Who sees whom, decided from q and k at run time: selectors that give a pattern, `SelectedTiles`."""

from dilated_attention_pytorch.selection.blocks import QueryBlocks, SelectedTiles, TokenBlocks, query_blocks
from dilated_attention_pytorch.selection.rules import TopBlocks
from dilated_attention_pytorch.selection.scores import MeanPooled
from dilated_attention_pytorch.selection.selector import BlockScore, Rule, Selector

__all__ = [
    "BlockScore",
    "MeanPooled",
    "QueryBlocks",
    "Rule",
    "SelectedTiles",
    "Selector",
    "TokenBlocks",
    "TopBlocks",
    "query_blocks",
]
