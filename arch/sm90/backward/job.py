"""What one CTA of the main kernel works on, and where its tiles lie."""

from __future__ import annotations

from typing import Any, NamedTuple

import cutlass.cute as cute
from cutlass import Float32, Int32

from ...backward import BackwardOperands
from ...common.blocks import Listed, Range, visits_from_keys
from ...common.memory import SmemAllocator, allocate, in_place
from ...common.operand import HeadRows, Mapped, Operand
from ...common.rows import scratch_row
from ...common.rules import Rules
from ...common.schedule import OneTile
from ...common.sequence import Sequence, sequence_of
from ...problem import Problem
from .tuning import DS_STAGES, ROWS, Config


class GradientOperands(NamedTuple):
    """What TMA moves, one head's at a time; maps of it; or tiles of it in shared memory.

    k, v, grad_k, grad_v: a tile for each warpgroup. grad_k, grad_v: no maps where heads share keys.
    """

    q: Any
    k: Any
    v: Any
    grad_out: Any
    grad_k: Any
    grad_v: Any

    @staticmethod
    def of(problem: Problem, config: Config) -> GradientOperands:
        """The operands of a problem. Rows out of use come as zeros: what is there may be no numbers."""
        ragged_q, ragged_k = problem.varlen or problem.seqused_q, problem.varlen or problem.seqused_k

        def operand(rows: int, columns: int, count: int, ragged: bool) -> Operand:
            return Operand.of(problem.precision, rows, columns, count, ragged)

        k, v = ((ROWS, columns, config.warpgroups) for columns in (config.columns, config.columns_v))
        return GradientOperands(
            q=operand(config.tile_m, config.columns, config.stages, ragged_q),
            k=operand(*k, ragged_k),
            v=operand(*v, ragged_k),
            grad_out=operand(config.tile_m, config.columns_v, config.stages, ragged_q),
            grad_k=operand(*k, problem.varlen),
            grad_v=operand(*v, problem.varlen),
        )


class Launch(NamedTuple):
    """What CTAs are launched with. group: query heads that share a KV head."""

    call: BackwardOperands
    maps: GradientOperands
    schedule: OneTile
    group: Int32


class KeyBlock(NamedTuple):
    """Keys first_key and on of one sequence, as one query head sees them.

    member: which of the query heads that share them.
    """

    call: BackwardOperands
    maps: GradientOperands
    sequence: Sequence
    head: Int32
    kv_head: Int32
    member: Int32
    first_key: Int32

    @staticmethod
    def of(problem: Problem, config: Config, launch: Launch, zero: Int32 | int = 0) -> KeyBlock:
        """What this CTA works on. Under a causal mask the first keys have the most to do: they come first.

        zero: one that is not known to be 0, where all of it is to be found anew.
        """
        turn, head, batch, _ = launch.schedule.tile(cute.arch.block_idx()[0] + zero)
        n_block = launch.schedule.m_blocks - 1 - turn
        kv_head = head // launch.group if problem.gqa else head
        sequence = sequence_of(launch.call, batch)
        member = head % launch.group if problem.gqa else Int32(0)
        first_key = n_block * config.tile_n
        return KeyBlock(launch.call, launch.maps, sequence, head, kv_head, member, first_key)

    def visits(self, problem: Problem, config: Config, rules: Rules) -> Range | Listed:
        """The query tiles that see these keys."""
        tile = config.tile_m, config.tile_n
        return visits_from_keys(problem, tile, self.call, rules, self.sequence, self.first_key)

    def q_rows(self, operand: Operand, mapped: Mapped) -> HeadRows:
        """The query head's rows of Q or dO."""
        s = self.sequence
        return operand.head_rows(mapped, s.batch, self.head, s.q_start, s.q_start + s.seqlen_q)

    def k_rows(self, operand: Operand, mapped: Mapped) -> HeadRows:
        """The keys' head's rows of K or V."""
        s = self.sequence
        return operand.head_rows(mapped, s.batch, self.kv_head, s.k_start, s.k_start + s.seqlen_k)

    def grad_rows(self, operand: Operand, mapped: Mapped) -> HeadRows:
        """The keys' head's rows of dK or dV, those out of use too."""
        s = self.sequence
        return operand.head_rows(mapped, s.batch, self.kv_head, s.k_start, s.k_start + s.k_rows)

    def scratch_q(self, problem: Problem) -> Int32:
        """The sequence's first scratch row on the query side."""
        s = self.sequence
        return scratch_row(problem.varlen, s.q_start, s.q_rows, s.batch)

    def scratch_k(self, problem: Problem) -> Int32:
        """The keys' first scratch row."""
        s = self.sequence
        return scratch_row(problem.varlen, s.k_start, s.k_rows, s.batch) + self.first_key


class Sums(NamedTuple):
    """A thread's part of dK and dV, in registers."""

    k: cute.Tensor
    v: cute.Tensor


class Tiles(NamedTuple):
    """Shared memory; see `Config.regions`."""

    moved: GradientOperands  # (rows, columns, tiles); dK and dV in the places of K and V
    ds: cute.Tensor  # (keys, tile_m, warpgroups * DS_STAGES): dS of a warpgroup's keys, transposed
    grad_q: cute.Tensor  # (numbers, warpgroups) fp32
    lse: cute.Tensor  # (tile_m, stages) fp32
    delta: cute.Tensor  # (tile_m, stages) fp32

    @staticmethod
    def allocate(smem: SmemAllocator, problem: Problem, config: Config, operands: GradientOperands) -> Tiles:
        """Places for all of it."""
        k, v, q, grad_out = (allocate(smem, getattr(operands, name)) for name in ("k", "v", "q", "grad_out"))
        grad_k, grad_v = in_place(k, operands.grad_k), in_place(v, operands.grad_v)
        ds = Operand.of(problem.precision, ROWS, config.tile_m, config.warpgroups * DS_STAGES, False)

        def numbers(*shape: int) -> cute.Tensor:
            return smem.allocate_tensor(Float32, cute.make_layout(shape), byte_alignment=128)

        return Tiles(
            moved=GradientOperands(q, k, v, grad_out, grad_k, grad_v),
            ds=allocate(smem, ds),
            grad_q=numbers(ROWS * ROWS, config.warpgroups),
            lse=numbers(config.tile_m, config.stages),
            delta=numbers(config.tile_m, config.stages),
        )
