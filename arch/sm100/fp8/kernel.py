"""FlashAttention-4's forward pass in FP8 for sm_100a, sm_103a and sm_110a.

Roles, links and their order are those for 16 bits (`..forward.kernel`). V is multiplied as it lies: of 8
bits, too, tcgen05 takes a B whose columns are contiguous. P takes a quarter of S's columns.
"""

from __future__ import annotations

from ...common.element import element_type, elements
from ...quantized import QuantizedOperands, named
from ..forward.kernel import ForwardKernel
from .softmax import QuantizedSoftmax


class QuantizedKernel(ForwardKernel):
    """The same roles, another softmax."""

    softmax_role = QuantizedSoftmax

    def named(self, operands: list) -> QuantizedOperands:
        """With elements for the bytes that tensors of 8 bits are passed as."""
        call, dtype = named(operands), element_type(self.problem.precision)
        q, k, v = (elements(x, dtype) for x in (call.q, call.k, call.v))
        return call._replace(q=q, k=k, v=v)
