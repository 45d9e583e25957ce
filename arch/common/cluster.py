"""What the CTAs of a cluster send each other."""

from __future__ import annotations

import cutlass.cute as cute
from cutlass import Int32
from cutlass._mlir.dialects import llvm


def copy_to_peer(
    target: cute.Pointer, source: cute.Pointer, nbytes: int, barrier: cute.Pointer, peer: Int32
) -> None:
    """Begin copying bytes in shared memory to `target` of another CTA, whose `barrier` hears of them."""
    words = [pointer.toint().to(Int32).ir_value() for pointer in (target, source, barrier)]
    operands = [*words, Int32(nbytes).ir_value(), Int32(peer).ir_value()]
    there = "mapa.shared::cluster.u32 target, $0, $4; mapa.shared::cluster.u32 barrier, $2, $4;"
    copy = "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes"
    asm = f"{{ .reg .b32 target, barrier; {there} {copy} [target], [$1], $3, [barrier]; }}"
    llvm.inline_asm(None, operands, asm, "r,r,r,r,r", has_side_effects=True)
