"""What compilers may not move: they know nothing of what runs beside the instructions of a thread.

Each function is an empty or nearly empty instruction that computations cannot pass, or not see through.
"""

from __future__ import annotations

import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass._mlir.dialects import llvm


def pin(registers: cute.Tensor) -> None:
    """Compute these registers here: neither before what precedes nor after what follows."""
    words = cute.recast_tensor(registers, Float32)
    for i in range(cute.size(words)):
        word = words[i].ir_value()
        words[i] = Float32(llvm.inline_asm(Float32.mlir_type, [word], "", "=f,0", has_side_effects=True))


def compute_before_wait(x: Float32, y: Float32) -> None:
    """Compute `x` and `y`, which are never negative, before anything that follows, a wait above all.

    ptxas moves a wait up to where the product's registers come in sight, past most of the work that is
    meant to run beside the product. A barrier of the warp whose mask depends on their signs stands in its
    way; a branch would do so too, but makes ptxas serialize the products.
    """
    mask = "or.b32 m, $0, $1; setp.ge.s32 p, m, 0; selp.b32 m, -1, 0, p;"
    barrier = "{ .reg .pred p; .reg .b32 m; " + mask + " bar.warp.sync m; }"
    llvm.inline_asm(None, [x.ir_value(), y.ir_value()], barrier, "f,f", has_side_effects=True)


def depend_on_load(loaded: Float32, x: Int32) -> Int32:
    """`x`, known only once `loaded` is.

    What follows from x alone is then not computed ahead, while the load is awaited, at a register each. `x`
    would change where `loaded` is one certain signalling NaN, which no product yields.
    """
    compare = "setp.eq.b32 p, $1, 0x7f8ace55; selp.b32 t, 1, 0, p; add.s32 $0, $2, t;"
    compare = "{ .reg .pred p; .reg .b32 t; " + compare + " }"
    operands = [loaded.ir_value(), x.ir_value()]
    return Int32(llvm.inline_asm(Int32.mlir_type, operands, compare, "=r,f,r", has_side_effects=True))


def after(computed: Float32, x: Float32) -> Float32:
    """`x`, known only once `computed` is, which is never that signalling NaN: what follows from x alone comes
    after what `computed` follows from.
    """
    compare = "{ .reg .pred p; setp.eq.b32 p, $1, 0x7f8ace55; selp.b32 $0, 0, $2, p; }"
    operands = [computed.ir_value(), x.ir_value()]
    return Float32(llvm.inline_asm(Float32.mlir_type, operands, compare, "=f,f,f", has_side_effects=True))


def unknown(x: Int32) -> Int32:
    """`x`, of whose value compilers know nothing: a loop of at most one turn stays a loop.

    A branch may become predicates, and what it was to skip is issued all the same.
    """
    return Int32(llvm.inline_asm(Int32.mlir_type, [x.ir_value()], "", "=r,0", has_side_effects=True))


def hidden_zero(place: Int32) -> Int32:
    """0 for a place, in a way that compilers do not see through.

    What is added to it in the loop stays in the loop: else the addresses of all pieces of a tile would
    be computed before it and held in registers, which the output needs.
    """
    return place >> 31
