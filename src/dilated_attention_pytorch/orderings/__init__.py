"""Token orders for grids: curves along which neighbours in the sequence are neighbours in the picture."""

from dilated_attention_pytorch.orderings.curves import (
    folded_order,
    hilbert_order,
    morton_order,
    raster_order,
    snake_order,
)
from dilated_attention_pytorch.orderings.locality import mean_segment_distance, neighbourhood_share
from dilated_attention_pytorch.orderings.order import Order

__all__ = [
    "Order",
    "folded_order",
    "hilbert_order",
    "mean_segment_distance",
    "morton_order",
    "neighbourhood_share",
    "raster_order",
    "snake_order",
]
