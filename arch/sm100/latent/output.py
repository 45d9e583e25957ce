"""Where the correction puts O: a thread has half of a row's columns."""

from __future__ import annotations

from cutlass import Int32

from ..forward import output
from ..forward.correction import Correction
from ..forward.job import Work
from ..forward.output import Target
from .config import Config
from .job import part_of, row_of


class LatentCorrection(Correction):
    """The same for half of the columns."""

    def __init__(self, *made):
        super().__init__(*made)
        self.dim_v = self.out_columns = self.plan.dim_v


class Result(output.Result):
    """In shared memory, of 64 rows."""

    def __init__(self, config: Config, dtype: type, columns: int):
        super().__init__(config, dtype)
        self.width = columns

    def target(self, work: Work, tile: int, thread: Int32) -> Target:
        target = super().target(work, tile, thread)
        return target._replace(row=row_of(thread), first=part_of(thread) * self.width)


class Partial(output.Partial):
    """In fp32, of one split."""

    def target(self, work: Work, tile: int, thread: Int32) -> Target:
        first = part_of(thread) * (self.dim_v // 2)
        return super().target(work, tile, thread)._replace(first=first)
