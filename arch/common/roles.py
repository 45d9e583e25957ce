"""Roles: which warpgroups of a CTA do what, with how many registers."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32


class Role(NamedTuple):
    """`run(i)` on each of `warpgroups` warpgroups, i from 0; `registers` per thread, a multiple of 8."""

    run: Callable[[Int32], None]
    warpgroups: int
    registers: int


@cute.jit
def warp_specialize(roles: cutlass.Constexpr, launched: cutlass.Constexpr, warpgroup: Int32):
    """Run the roles, which take warpgroups in their order; `launched`: registers per thread at launch."""
    role = roles[0]
    if cutlass.const_expr(len(roles) == 1):
        begin(role, launched, warpgroup)
    else:
        if warpgroup < role.warpgroups:
            begin(role, launched, warpgroup)
        else:
            warp_specialize(roles[1:], launched, warpgroup - role.warpgroups)


def begin(role: Role, launched: int, index: Int32) -> None:
    """Take up a role: registers first, since a role that grows waits for one that shrinks."""
    if role.registers < launched:
        cute.arch.setmaxregister_decrease(role.registers)
    elif role.registers > launched:
        cute.arch.setmaxregister_increase(role.registers)
    role.run(index)
