"""What a launch has to do, what one tile of it is, and what that tile sees, loads and stores."""

from __future__ import annotations

from typing import Any, NamedTuple

import cutlass.cute as cute
from cutlass import Int32

from ..problem import Operands, Problem
from . import blocks
from .heads import TileHeads
from .memory import Maps
from .operand import HeadRows, Operand
from .rules import Rules
from .schedule import InOrder, InSections, OneTile, WithoutDivisions
from .sequence import Sequence


class Launch(NamedTuple):
    """What CTAs are launched with. group: query heads that share a KV head. by_parts: see `TileHeads.of`."""

    call: Operands
    maps: Maps
    schedule: OneTile | InSections | WithoutDivisions | InOrder
    group: Int32
    by_parts: cute.FastDivmodDivisorV2 | None = None


class Job(NamedTuple):
    """One tile: rows `first_row` and on of some heads of one sequence.

    split: which part of the keys, of `splits`.
    """

    call: Operands
    maps: Maps
    sequence: Sequence
    heads: TileHeads
    first_row: Int32
    split: Int32 | int
    splits: Int32 | int


def rows_of_tile(config: Any) -> int:
    """Rows of the sequence that a tile holds, of each of its heads."""
    return config.tile_m // config.heads


def visits_of(problem: Problem, config: Any, job: Any, rules: Rules) -> blocks.Range | blocks.Listed:
    """The KV blocks that a tile visits, in their order. job: a Job, or what else has its place and split."""
    tile = rows_of_tile(config), config.tile_n
    visits = blocks.visits_of(problem, tile, job.call, rules, job.sequence, job.first_row)
    return blocks.part_of(visits, job.split, job.splits) if problem.split_kv else visits


def sources(job: Job, q: Operand, k: Operand, v: Operand) -> tuple[HeadRows, HeadRows, HeadRows]:
    """The rows of Q, K and V that tiles of a job are copied from."""
    s, maps, table = job.sequence, job.maps, job.call.page_table
    if table is not None:
        table = table[s.batch, None]
    q_rows = q.head_rows(maps.q, s.batch, job.heads.place, s.q_start, s.q_start + s.q_rows)
    k_rows, v_rows = (
        operand.head_rows(mapped, s.k_batch, job.heads.kv, s.k_start, s.k_start + s.seqlen_k, table)
        for operand, mapped in ((k, maps.k), (v, maps.v))
    )
    return q_rows, k_rows, v_rows


def begin_store(job: Job, out: Operand, tile: cute.Tensor, first_row: Int32) -> None:
    """Begin copying a tile of the output to the rows from `first_row`; one warp calls this."""
    s = job.sequence
    rows = out.head_rows(job.maps.out, s.batch, job.heads.place, s.q_start, s.q_start + s.q_rows)
    target, source = out.sides(rows, first_row, tile)
    cute.copy(rows.atom, source, target)
    cute.arch.cp_async_bulk_commit_group()
