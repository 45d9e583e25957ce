"""What one CTA has to do, as both roles see it."""

from __future__ import annotations

from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Int32

from ...common.blocks import Phase, phases
from ...common.mask import Everything
from ...common.operand import Mapped
from ...common.rules import Rules
from ...common.sequence import Sequence
from ...elementwise import minimum, where
from ...problem import Operands, Problem
from ..tuning import Config


class Maps(NamedTuple):
    """The tensors as TMA sees them."""

    q: Mapped
    k: Mapped
    v: Mapped
    out: Mapped


class Tiles(NamedTuple):
    """Shared memory: (rows, dim, warpgroups) of q and, in its place, out; (rows, dim, stages) of k and v."""

    q: cute.Tensor
    k: cute.Tensor
    v: cute.Tensor
    out: cute.Tensor


class Job(NamedTuple):
    """Rows `first_row` and on of one query head of one sequence."""

    call: Operands
    maps: Maps
    sequence: Sequence
    head: Int32
    kv_head: Int32
    first_row: Int32


def phases_of(problem: Problem, config: Config, job: Job, rules: Rules) -> list[Phase]:
    """The KV blocks to visit, from last to first."""
    sequence, first_row, seqlen_k = job.sequence, job.first_row, job.sequence.seqlen_k
    end_row = minimum(first_row + config.tile_m, sequence.seqlen_q)
    if problem.seqused_q:
        seqlen_k = where(first_row < sequence.seqlen_q, seqlen_k, 0)  # rows out of use see nothing
    q_first, q_last = first_row + sequence.offset, end_row - 1 + sequence.offset
    return phases(rules.mask or Everything(), q_first, q_last, seqlen_k, config.tile_n)
