"""The mma role: as for 16 bits; before a product come the copies that bring its factors to tensor memory.

    factors of Q's tile once, of K[n] and V[n] before the first product that needs them

One thread's copies and products happen in order: the next block's factors come over this one's.
"""

from __future__ import annotations

from cutlass import Boolean, Int32

from ...block_scaled import ATOM_ROWS, BlockScaledProblem
from ...common.order import hidden_zero
from ..forward.job import Work
from ..forward.mma import Mma
from ..mma import begin
from .atoms import Factors
from .config import Config
from .factors import of_step, spread
from .products import Products


class BlockScaledMma(Mma):
    """factors: of operands that have some, by name."""

    def __init__(self, problem: BlockScaledProblem, config: Config, products: Products):
        super().__init__(problem, config, products)
        self.factors: dict[str, Factors] = config.factors(problem)

    def begin_s(self, work: Work, tile: int, turn: Int32 | int, stage: Int32) -> None:
        if isinstance(turn, int):  # the first of a job's
            self.spread(work, "q", tile, tile, 0)
        if tile == 0:
            self.spread(work, "k", 0, stage, self.first_key(work, turn))
        super().begin_s(work, tile, turn, stage)

    def begin_o(self, work: Work, tile: int, turn: Int32, stage: Int32, last: bool) -> None:
        if tile == 0 and "v" in self.factors:
            self.spread(work, "v", 0, stage, self.first_key(work, turn))
        super().begin_o(work, tile, turn, stage, last)

    def begin_qk(self, work: Work, tile: int, turn: Int32, operands: tuple) -> None:
        of_q, of_k = self.column(work, "q", tile, turn), self.column(work, "k", 0, turn)
        begin(
            self.products.qk(), *operands, False,
            factors=lambda step: (
                of_step(self.factors["q"], of_q, step), of_step(self.factors["k"], of_k, step)
            ),
        )

    def begin_pv(
        self, work: Work, tile: int, turn: Int32, operands: tuple, adds: Boolean | bool, steps: range
    ) -> None:
        if "v" not in self.factors:
            super().begin_pv(work, tile, turn, operands, adds, steps)
            return
        of_p, of_v = self.column(work, "p", tile, turn), self.column(work, "v", 0, turn)
        key, factors = self.first_key(work, turn), self.factors["v"]
        begin(
            self.products.pv(), *operands, adds, steps,
            factors=lambda step: (of_step(factors, of_p, 0), of_step(factors, of_v, step, key)),
        )

    def first_key(self, work: Work, turn: Int32 | int) -> Int32 | int:
        """Of block number `turn` of a job's, or 0 where every block begins with an atom."""
        if self.config.tile_n % ATOM_ROWS == 0:
            return 0
        return work.visits.block(work.visits.after(work.visits.start, turn)) * self.config.tile_n

    def column(self, work: Work, operand: str, tile: int, turn: Int32 | int) -> Int32:
        """The first one of an operand's factors, as an address, computed anew in block number `turn`: kept,
        those of all steps would take more registers than the warp has.
        """
        column = work.memory.tensor.toint().to(Int32) + self.products.plan.of(operand, tile)
        return column + hidden_zero(Int32(turn))

    def spread(self, work: Work, operand: str, tile: int, place: Int32 | int, first: Int32 | int) -> None:
        """Begin copying the factors of a tile that is in shared memory."""
        source = getattr(work.memory.factor_tiles, operand)[None, None, None, place]
        spread(self.factors[operand], source, self.column(work, operand, tile, place), Int32(first))
