"""How the latent kernel works: what its tuning (tuning.py) decides."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

from ...problem import Problem
from .. import config

ROWS = 64  # of a CTA: a pair's product has 128, and takes all lanes for half of its columns
PART = 64  # columns of K that arrive and leave together, and that swizzling takes as one
V_STEP = 2 * PART  # columns of V: whole parts for each CTA
WIDEST = 128  # columns of V that one CTA brings to a product, which has 256 of both at most


@dataclass(frozen=True, kw_only=True)
class Config(config.Config):
    """As for other heads, of a pair of CTAs with 64 rows each. k_stages, v_stages: tiles of all parts."""

    ctas: int = 2
    tiles: int = 1

    @property
    def cta_rows(self) -> int:
        return ROWS

    @property
    def tail(self) -> int:
        """None: P V is begun when all of P is stored."""
        return 0

    def shared_memory(self, problem: Problem) -> int:
        """Bytes of a CTA's dynamic shared memory: Q and then O in its place, K, V, P, and what is small."""
        k, v = self.tile_n // 2 * self.k_stages, self.tile_n * self.v_stages
        elements = (ROWS + k) * problem.head_dim + v * problem.head_dim_v // 2 + ROWS * self.tile_n
        return problem.precision.nbytes(elements) + SMALL


SMALL = 3072  # rows' factors and maxima, and barriers


def k_parts(problem: Problem) -> int:
    """Of a tile of K."""
    return problem.head_dim // PART


def v_columns(problem: Problem) -> int:
    """Columns of a part of V: of a CTA's half as many as one product takes."""
    return gcd(problem.head_dim_v // 2, WIDEST)


def v_parts(problem: Problem) -> int:
    """Of a CTA's columns of V."""
    return problem.head_dim_v // 2 // v_columns(problem)
