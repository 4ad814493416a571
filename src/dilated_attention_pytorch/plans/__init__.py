"""How to walk a pattern: frozen data, made once for a pattern and a set of shapes and kept in a bounded cache."""

from dilated_attention_pytorch.plans.base import DensePlan, Plan
from dilated_attention_pytorch.plans.orders import OrderedPlan, RowOrder, ordered_plan, residue_order
from dilated_attention_pytorch.plans.planner import candidate_plans
from dilated_attention_pytorch.plans.ranges import TileRanges, tile_ranges
from dilated_attention_pytorch.plans.strided import StridedPlan
from dilated_attention_pytorch.plans.tiles import TilePlan, tile_plan

__all__ = [
    "DensePlan",
    "OrderedPlan",
    "Plan",
    "RowOrder",
    "StridedPlan",
    "TilePlan",
    "TileRanges",
    "candidate_plans",
    "ordered_plan",
    "residue_order",
    "tile_plan",
    "tile_ranges",
]
