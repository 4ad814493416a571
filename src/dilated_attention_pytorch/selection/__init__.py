"""Who sees whom, decided from q and k at run time: selectors that give a pattern, `SelectedTiles`."""

from dilated_attention_pytorch.selection.blocks import QueryBlocks, SelectedTiles, TokenBlocks
from dilated_attention_pytorch.selection.coarse import attend_with_coarse
from dilated_attention_pytorch.selection.dilation import AdaptiveDilation, DilatedBlocks
from dilated_attention_pytorch.selection.distillation import distil, gate_loss
from dilated_attention_pytorch.selection.gate import Gate
from dilated_attention_pytorch.selection.last_queries import LastQueries
from dilated_attention_pytorch.selection.mass import block_mass, mass_recall
from dilated_attention_pytorch.selection.reading import query_blocks
from dilated_attention_pytorch.selection.rules import Mass, Threshold, TopBlocks
from dilated_attention_pytorch.selection.scores import Antidiagonal, MeanPooled, MinMax, Oracle
from dilated_attention_pytorch.selection.selector import BlockScore, Rule, Selector

__all__ = [
    "AdaptiveDilation",
    "Antidiagonal",
    "BlockScore",
    "DilatedBlocks",
    "Gate",
    "LastQueries",
    "Mass",
    "MeanPooled",
    "MinMax",
    "Oracle",
    "QueryBlocks",
    "Rule",
    "SelectedTiles",
    "Selector",
    "Threshold",
    "TokenBlocks",
    "TopBlocks",
    "attend_with_coarse",
    "block_mass",
    "distil",
    "gate_loss",
    "mass_recall",
    "query_blocks",
]
