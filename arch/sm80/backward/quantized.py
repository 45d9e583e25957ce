"""The postprocess of gradients in 8 bits: scales of heads join the factor."""

from __future__ import annotations

from cutlass import Float32, Int32

from ...common.quantized_preprocess import of_head
from ...common.rows import Rows
from ...quantized_backward import AllScales, QuantizedPostprocessOperands
from .postprocess import PostprocessKernel


class QuantizedPostprocessKernel(PostprocessKernel):
    """The same sums."""

    def named(self, operands: list) -> QuantizedPostprocessOperands:
        return QuantizedPostprocessOperands(*operands)

    def factor(self, call: QuantizedPostprocessOperands, rows: Rows, head: Int32) -> Float32:
        found = super().factor(call, rows, head) * Float32(2.0**-self.problem.lift)
        for name in AllScales._fields:
            scales = getattr(call, name)
            if scales is not None:
                found *= of_head(scales, call.grad, rows, head)
        return found
