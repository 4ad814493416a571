"""Who sees whom, decided from q and k at run time: selectors that give a pattern, `SelectedTiles`."""

from dilated_attention_pytorch.selection.blocks import QueryBlocks, SelectedTiles
from dilated_attention_pytorch.selection.selector import BlockScore, Rule, Selector

__all__ = ["BlockScore", "QueryBlocks", "Rule", "SelectedTiles", "Selector"]
