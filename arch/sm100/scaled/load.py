"""The load role: as for 16 bits; a tile's factors come with it, and fill the same slot."""

from __future__ import annotations

from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Int32

from ...block_scaled import BlockScaledProblem
from ...common.operand import HeadRows, Operand
from ..forward.job import Work
from ..forward.load import Load
from .config import Config
from .factors import Mapped, copy


class Rows(NamedTuple):
    """One head's rows of an operand, and their factors: from where, of which (head, batch), to where."""

    operand: str
    data: HeadRows
    source: Mapped | None
    head: tuple[Int32, Int32]
    tiles: cute.Tensor | None

    @property
    def atom(self) -> cute.CopyAtom:
        """That copies the rows."""
        return self.data.atom


class BlockScaledLoad(Load):
    """The same for operands with factors."""

    def __init__(self, problem: BlockScaledProblem, config: Config, q: Operand, k: Operand, v: Operand):
        super().__init__(problem, config, q, k, v)
        self.factors = config.factors(problem)

    def sources(self, work: Work) -> tuple[Rows, Rows, Rows]:
        job, sequence = work.job, work.job.sequence
        heads = {
            "q": (job.heads.place, sequence.batch),
            "k": (job.heads.kv, sequence.k_batch),
            "v": (job.heads.kv, sequence.k_batch),
        }
        q, k, v = (
            Rows(name, rows, getattr(job.maps.factors, name), heads[name], tiles)
            for name, rows, tiles in zip("qkv", super().sources(work), work.memory.factor_tiles, strict=True)
        )
        return q, k, v

    def copy(self, operand: Operand, rows: Rows, first: Int32, tiles: cute.Tensor, slot) -> None:
        super().copy(operand, rows.data, first, tiles, slot)
        if rows.source is not None:
            target = rows.tiles[None, None, None, slot.index]
            copy(self.factors[rows.operand], rows.source, rows.head, first, target, slot.barrier)
