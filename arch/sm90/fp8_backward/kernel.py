"""The main kernel of gradients in FP8 for sm_90a.

Roles, links and their order are those for 16 bits (`..backward.kernel`). Products of 8 bits want what they
sum over contiguous: Q, K and dO come by columns, too (`arch/transposed.py`). dK and dV always leave as sums,
whose scales the postprocess knows.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute

from ...common.element import element_type, elements
from ...common.memory import SmemAllocator
from ...transposed import COPIED, ColumnsBackwardOperands, ColumnsBackwardProblem
from ..backward.job import Tiles
from ..backward.kernel import BackwardKernel, Kinds
from .compute import QuantizedCompute
from .config import Config
from .job import operands_of, tiles_of
from .load import QuantizedLoad


class QuantizedBackwardKernel(BackwardKernel):
    """The same roles, of which two have more to do."""

    def __init__(self, problem: ColumnsBackwardProblem, config: Config):
        super().__init__(problem, config)
        self.operands = operands_of(self.problem, config)

    def kinds(self) -> Kinds:
        return Kinds(QuantizedCompute, QuantizedLoad)

    def named(self, operands: list) -> ColumnsBackwardOperands:
        """With elements for the bytes that 8 bits are passed as; copies as (columns, heads, rows)."""
        call, dtype = ColumnsBackwardOperands(*operands), element_type(self.problem.precision)
        of_bytes = {name: elements(getattr(call, name), dtype) for name in ("q", "k", "v", "grad_out")}
        for name in COPIED:
            copy = elements(getattr(call, f"{name}_columns"), dtype)
            layout = cute.select(copy.layout, mode=[1, 0, 2])
            of_bytes[f"{name}_columns"] = cute.make_tensor(copy.iterator, layout)
        return call._replace(**of_bytes)

    def nbytes(self) -> dict[str, int]:
        copies = {name: getattr(self.operands, f"{name}_columns").bytes for name in COPIED}
        return {name: size + copies.get(name, 0) for name, size in super().nbytes().items()}

    def shared_memory(self) -> tuple[Tiles, cute.Pointer]:
        smem = SmemAllocator()
        barriers = smem.allocate_array(cutlass.Int64, self.topology.count)
        return tiles_of(smem, self.config, self.operands), barriers
