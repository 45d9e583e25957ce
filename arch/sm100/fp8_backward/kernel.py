"""The main kernel of gradients in FP8 for sm_100a, sm_103a and sm_110a.

Roles, links and their order are those for 16 bits (`..backward.kernel`). All operands are multiplied as they
lie: of 8 bits, too, tcgen05 takes an A or a B whose rows or columns are contiguous. P and dS take a quarter
of the columns of S and dP. dK and dV always leave as sums, whose scales the postprocess knows.
"""

from __future__ import annotations

from ...common.element import element_type, elements
from ...quantized_backward import QuantizedBackwardOperands
from ..backward.kernel import BackwardKernel, Kinds
from .compute import QuantizedCompute


class QuantizedBackwardKernel(BackwardKernel):
    """The same roles, another compute role."""

    def kinds(self) -> Kinds:
        return super().kinds()._replace(compute=QuantizedCompute)

    def named(self, operands: list) -> QuantizedBackwardOperands:
        """With elements for the bytes that tensors of 8 bits are passed as."""
        call, dtype = QuantizedBackwardOperands(*operands), element_type(self.problem.precision)
        q, k, v, grad_out = (elements(x, dtype) for x in (call.q, call.k, call.v, call.grad_out))
        return call._replace(q=q, k=k, v=v, grad_out=grad_out)
