"""Which keys the columns of a thread's scores are, and which of these a row sees, as bits of words.

Bits, because ptxas puts seven of them into predicates by one instruction: a row that sees a range of keys
then costs little more than a selection for each of its scores, not two comparisons (FlashAttention-4,
Zadouri et al. 2026).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from cutlass import Boolean, Int32, Uint32
from cutlass._mlir.dialects import llvm

from ..elementwise import floor_divide, maximum, minimum, modulo

WORD = 32
PAIR, APART = 2, 8  # a thread of a matrix instruction has two columns of every eight


class Keys(NamedTuple):
    """Keys of the columns of a thread's scores, from `first` on, its place inside the sequence.

    in_pairs: as matrix instructions lay out their results, two of every eight; else neighbours.
    """

    first: Int32
    in_pairs: bool

    def of(self, column: int) -> Int32:
        """The key of a column."""
        return self.first + (column // PAIR * APART + column % PAIR if self.in_pairs else column)

    def before(self, key: Int32) -> Int32:
        """How many columns have keys less than `key`, if columns went on both ways: it may be negative."""
        behind = key - self.first
        if not self.in_pairs:
            return behind
        return floor_divide(behind, APART) * PAIR + minimum(modulo(behind, APART), PAIR)


def seen_words(keys: Keys, low: Int32 | int, high: Int32, columns: int) -> Iterator[Uint32]:
    """For every 32 columns of a row a word, whose bits say which of them have low <= key < high.

    low: the number 0 where it bounds nothing.
    """
    begin = None if isinstance(low, int) and low == 0 else keys.before(low)
    end = keys.before(high)
    for first in range(0, columns, WORD):
        word = _shifted("shr", maximum(first + WORD - end, 0))
        yield word if begin is None else word & _shifted("shl", maximum(begin - first, 0))


def is_set(word: Uint32, bit: int) -> Boolean:
    return Boolean(word & (1 << bit))


def _shifted(way: str, by: Int32) -> Uint32:
    """A word of ones, shifted; by 32 or more, which PTX defines, none is left."""
    code = f"{way}.b32 $0, -1, $1;"
    return Uint32(llvm.inline_asm(Uint32.mlir_type, [by.ir_value()], code, "=r,r"))
