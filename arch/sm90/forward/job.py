"""What one CTA has to do, as both roles see it."""

from __future__ import annotations

from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Int32

from ...common import blocks
from ...common.operand import Mapped
from ...common.rules import Rules
from ...common.sequence import Sequence
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


def visits_of(problem: Problem, config: Config, job: Job, rules: Rules) -> blocks.Range | blocks.Listed:
    """The KV blocks to visit, in their order."""
    return blocks.visits_of(problem, config, job.call, rules, job.sequence, job.first_row)
