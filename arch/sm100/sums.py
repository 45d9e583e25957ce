"""How sums of gradients lie, for the postprocess."""

from __future__ import annotations

from ..backward import PostprocessProblem
from ..sm80.backward.config import PostprocessConfig
from .backward.config import Config


def sums_of(problem: PostprocessProblem, main: Config) -> PostprocessConfig:
    """As the accumulators of eight or four warps, with 16 rows each."""
    rows = main.cta_rows if problem.side == "q" else main.cta_keys
    return PostprocessConfig(rows=rows, grid=(rows // 16, 1))
