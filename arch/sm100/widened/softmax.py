"""The softmax role with keys and values that were widened: as for 16 bits, but for their scales."""

from __future__ import annotations

from cutlass import Boolean, Float32, Int32

from ...common.output import OutputRows
from ...common.widen import of_head
from ..forward.job import Work
from ..forward.softmax import Row, Softmax


class WidenedSoftmax(Softmax):
    """The scale of keys is part of the softmax scale, that of values of what normalises O: `Row.scales`."""

    def row(self, work: Work, tile: Int32) -> Row:
        job = work.job
        call, scale = of_head(job.call, job.sequence.batch, job.heads.kv)
        return super().row(work._replace(job=job._replace(call=call)), tile)._replace(scales=scale)

    def normaliser(self, row: Row, rows: OutputRows, exists: Boolean) -> Float32:
        """Of an O of values as they lie in the cache."""
        return super().normaliser(row, rows, exists) * row.scales
