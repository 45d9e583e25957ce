"""How the block-scaled kernel works: what its tuning (tuning.py) decides."""

from __future__ import annotations

from dataclasses import dataclass

from ...block_scaled import BlockScaledProblem
from .. import config
from ..config import TILE_M
from .atoms import COLUMNS, Factors

P_COLUMNS = COLUMNS  # of the factors of a tile's P, all 1


@dataclass(frozen=True, kw_only=True)
class Config(config.Config):
    """As for 16 bits."""

    @property
    def apart(self) -> bool:
        """O is larger than Q."""
        return True

    def factors(self, problem: BlockScaledProblem) -> dict[str, Factors]:
        """Of operands that have some."""
        found = {
            "q": Factors.of(problem, TILE_M, self.tiles),
            "k": Factors.of(problem, self.tile_n, self.k_stages),
        }
        if problem.v_group:
            found["v"] = Factors.of_values(problem, self.tile_n, self.v_stages)
        return found

    def tensor_columns(self, problem: BlockScaledProblem) -> int:
        """Of tensor memory: S, O and factors."""
        factors = {name: found.columns for name, found in self.factors(problem).items()}
        dim_v = problem.v_precision.padded(problem.head_dim_v)
        of_tile = self.slots * self.tile_n + dim_v + factors["q"] + P_COLUMNS * ("v" in factors)
        return self.tiles * of_tile + factors["k"] + factors.get("v", 0)

    def shared_memory(self, problem: BlockScaledProblem) -> int:
        """Bytes of dynamic shared memory: Q, O beside it, K, V, their factors, those of O, barriers."""
        precision, v_precision = problem.precision, problem.v_precision
        dim, dim_v = precision.padded(problem.head_dim), v_precision.padded(problem.head_dim_v)
        rows = TILE_M * self.tiles
        tiles = precision.nbytes((rows + self.tile_n * self.k_stages) * dim)
        tiles += v_precision.nbytes(self.tile_n * self.v_stages * dim_v)
        tiles += problem.out_precision.nbytes(rows * dim_v)
        tiles += sum(found.bytes * found.places for found in self.factors(problem).values())
        small = 4 * (self.slots + 1) * rows + 512
        return tiles + -(-small // 1024) * 1024
