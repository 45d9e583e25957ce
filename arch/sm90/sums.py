"""How sums of gradients lie, for the postprocess."""

from __future__ import annotations

from ..sm80.backward.config import PostprocessConfig
from .backward.config import ROWS

# As the accumulators of one warpgroup, whose four warps have 64 rows below each other.
SUMS = PostprocessConfig(rows=ROWS, grid=(4, 1))
