"""Roles: which warps of a CTA do what, with how many registers.

A table of roles counts in warpgroups (`warp_specialize`) or in warps (`specialize_warps`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32


class Role(NamedTuple):
    """`run(i)` on each of `size` warpgroups or warps, i from 0; `registers` per thread, a multiple of 8."""

    run: Callable[[Int32], None]
    size: int
    registers: int


@cute.jit
def warp_specialize(roles: cutlass.Constexpr, launched: cutlass.Constexpr, warpgroup: Int32):
    """Run the roles, which take warpgroups in their order; `launched`: registers per thread at launch."""
    role = roles[0]
    if cutlass.const_expr(len(roles) == 1):
        begin(role, launched, warpgroup)
    else:
        if warpgroup < role.size:
            begin(role, launched, warpgroup)
        else:
            warp_specialize(roles[1:], launched, warpgroup - role.size)


def begin(role: Role, launched: int, index: Int32) -> None:
    """Take up a role: registers first, since a role that grows waits for one that shrinks."""
    take_registers(role.registers, launched)
    role.run(index)


def take_registers(wanted: int, launched: int) -> None:
    """Change this warpgroup's registers per thread from `launched` to `wanted`."""
    if wanted < launched:
        cute.arch.setmaxregister_decrease(wanted)
    elif wanted > launched:
        cute.arch.setmaxregister_increase(wanted)


WARPGROUP = 4


@cute.jit
def specialize_warps(roles: cutlass.Constexpr, launched: cutlass.Constexpr, warp: Int32):
    """Run the roles, which take warps in their order; `launched`: registers per thread at launch.

    Registers belong to whole warpgroups: roles that share one agree on them, and one that is larger fills
    whole ones. Warps after the last role do nothing.
    """
    team = team_of(roles)
    if cutlass.const_expr(len(team) == len(roles)):
        work_as_team(team, launched, warp)
    else:
        warps = sum(role.size for role in team)
        if warp < warps:
            work_as_team(team, launched, warp)
        else:
            specialize_warps(roles[len(team) :], launched, warp - warps)


@cute.jit
def work_as_team(team: cutlass.Constexpr, launched: cutlass.Constexpr, warp: Int32):
    """Take registers once for the warpgroup, as `setmaxnreg` wants it; then each warp finds its role."""
    take_registers(team[0].registers, launched)
    run_warps(team, warp)


@cute.jit
def run_warps(roles: cutlass.Constexpr, warp: Int32):
    """Run the role of a warp, if it has one."""
    role = roles[0]
    if warp < role.size:
        run(role, warp)
    else:
        if cutlass.const_expr(len(roles) > 1):
            run_warps(roles[1:], warp - role.size)


def run(role: Role, index: Int32) -> None:
    role.run(index)


def team_of(roles: tuple[Role, ...]) -> tuple[Role, ...]:
    """The first roles, as many as fill whole warpgroups; ValueError where they disagree on registers."""
    team, warps = [], 0
    for role in roles:
        team.append(role)
        warps += role.size
        if warps % WARPGROUP == 0:
            break
    if len({role.registers for role in team}) > 1:
        raise ValueError(f"roles of one warpgroup take {sorted({r.registers for r in team})} registers")
    if len(team) > 1 and warps > WARPGROUP:
        raise ValueError(f"a role of {team[-1].size} warps begins inside a warpgroup")
    return tuple(team)
