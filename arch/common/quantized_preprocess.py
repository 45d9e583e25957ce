"""The preprocess of gradients in 8 bits: D and LSE in the units of the main kernel (`quantized_backward`)."""

from __future__ import annotations

import cutlass.cute as cute
from cutlass import Float8E4M3FN, Float32, Int32

from ..quantized_backward import DS_LIFT, P_LIFT, QuantizedPreprocessOperands
from .element import elements
from .preprocess import PreprocessKernel
from .rows import Rows


class QuantizedPreprocessKernel(PreprocessKernel):
    """The same rows, of a dO of 8 bits."""

    def named(self, operands: list) -> QuantizedPreprocessOperands:
        call = QuantizedPreprocessOperands(*operands)
        return call._replace(grad_out=elements(call.grad_out, Float8E4M3FN))

    def total(
        self, call: QuantizedPreprocessOperands, rows: Rows, head: Int32, row: Int32, lane: Int32
    ) -> Float32:
        return super().total(call, rows, head, row, lane) * of_head(call.grad_out_scale, call.out, rows, head)

    def shift(self, call: QuantizedPreprocessOperands, rows: Rows, head: Int32, total: Float32) -> Float32:
        """-D, of a dP that is multiplied by P and its lift."""
        total *= Float32(-(2.0 ** (DS_LIFT - P_LIFT)))
        for scales in (call.v_scale, call.grad_out_scale):  # whose product may be too small a number
            total = total / of_head(scales, call.out, rows, head)
        return total

    def exponent(self, lse_log2: Float32) -> Float32:
        """Less P's lift."""
        return lse_log2 - P_LIFT


def of_head(scales: cute.Tensor, rows_of_heads: cute.Tensor, rows: Rows, head: Int32) -> Float32:
    """Of (batch, KV heads) the one of a query head, of which `rows_of_heads` has as many as the call."""
    group = rows_of_heads.shape[-2] // scales.shape[1]
    return scales[rows.batch, head // group]
