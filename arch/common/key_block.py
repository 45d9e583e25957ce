"""The keys that a CTA of a backward pass's main kernel takes, where TMA moves its operands."""

from __future__ import annotations

from typing import Any, NamedTuple

from cutlass import Boolean, Int32

from ..backward import BackwardOperands
from ..problem import Problem
from .blocks import Listed, Range, visits_from_keys
from .keys import KeyTiles
from .operand import HeadRows, Mapped, Operand
from .rows import scratch_row_k, scratch_row_q
from .rules import Rules
from .sequence import Sequence


class Launch(NamedTuple):
    """What CTAs are launched with. maps: of the tree's own operands that TMA moves."""

    call: BackwardOperands
    maps: Any
    schedule: KeyTiles


class KeyBlock(NamedTuple):
    """Keys first_key and on of one sequence, as one query head sees them.

    member: which of the query heads that share them. tile_key: the first key of all CTAs of a pair. rank: of
    the CTA among them.
    """

    call: BackwardOperands
    maps: Any
    sequence: Sequence
    head: Int32
    kv_head: Int32
    member: Int32
    first_key: Int32
    tile_key: Int32
    rank: Int32 | int

    def any(self) -> Boolean:
        """Whether the tile has keys; a CTA of a pair that has none works for the other's."""
        return self.tile_key < self.sequence.k_rows

    def visits(self, problem: Problem, config: Any, rules: Rules) -> Range | Listed:
        """The query tiles that see these keys."""
        tile = config.tile_m, config.tile_n
        return visits_from_keys(problem, tile, self.call, rules, self.sequence, self.tile_key)

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
        return scratch_row_q(problem, self.sequence)

    def scratch_k(self, problem: Problem) -> Int32:
        """The keys' first scratch row."""
        return scratch_row_k(problem, self.sequence) + self.first_key
