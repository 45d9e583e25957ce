"""The compute role in FP8: as for 16 bits, with scores in units of their scales.

    wait S    P = 2**P_LIFT exp(S - LSE)          wait dP    dS = P (dP 2**(DS_LIFT - P_LIFT) - D)

LSE comes less the lift, and D negative and in dS's units: see `quantized_backward`.
"""

from __future__ import annotations

from cutlass import Float32, Int32

from ...common.key_block import KeyBlock
from ...common.numeric import both, packed
from ...common.rules import Rules
from ...quantized_backward import DS_LIFT, P_LIFT
from ..backward.compute import Compute, Key


class QuantizedCompute(Compute):
    """The same waits and places."""

    def key(self, block: KeyBlock, rules: Rules, warpgroup: Int32) -> Key:
        place = block.sequence.batch, block.kv_head
        factor = block.call.q_scale[place] * block.call.k_scale[place]
        key = super().key(block, rules, warpgroup)
        if self.problem.score:
            return key._replace(rules=rules._replace(scale=rules.scale * factor))
        return key._replace(scale_log2=key.scale_log2 * factor)

    def difference(self, dp: tuple[Float32, Float32], delta: tuple[Float32, Float32]) -> tuple:
        return packed().fma(dp, both(2.0 ** (DS_LIFT - P_LIFT)), delta)
