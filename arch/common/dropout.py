"""Dropout with random numbers that depend on the position only: Philox4x32-7 (Salmon et al. 2011).

    key      (seed low, seed high ^ offset high)
    counter  (group, row, batch * num_heads_q + head, offset low)
    group    (k // 32) * 4 + (k % 8) // 2      row: of the query inside its sequence

One call yields eight 16-bit numbers, low half of each word first. Element k takes number
((k % 32) // 8) * 2 + k % 2 and is kept where that is below `keep_threshold`. So one call serves the
eight elements that one lane of mma.sync or wgmma holds of 32 keys, and every architecture, and the
reference, draw the same mask.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32, Uint64

from ..elementwise import where
from ..problem import Problem
from .sequence import Sequence

ROUNDS = 7
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
GROUP_KEYS = 32  # keys that one call covers, together with the three neighbouring lanes


def philox(counter: tuple, key: tuple) -> tuple:
    """Four random words from four counter words and two key words, all Uint32."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for i in range(ROUNDS):
        p0, p1 = Uint64(c0) * Uint64(MULTIPLIERS[0]), Uint64(c2) * Uint64(MULTIPLIERS[1])
        c0, c1, c2, c3 = Uint32(p1 >> 32) ^ c1 ^ k0, Uint32(p1), Uint32(p0 >> 32) ^ c3 ^ k1, Uint32(p0)
        if i + 1 < ROUNDS:
            k0, k1 = k0 + Uint32(KEY_INCREMENTS[0]), k1 + Uint32(KEY_INCREMENTS[1])
    return c0, c1, c2, c3


class Dropout(NamedTuple):
    """The random numbers of one query head of one sequence."""

    key: tuple[Uint32, Uint32]
    head: Uint32
    offset: Uint32
    keep_threshold: Int32

    @staticmethod
    def of(problem: Problem, call: Any, sequence: Sequence, head: Int32) -> Dropout | None:
        """Those of a call, whose operands `call` are, for one head; None where the problem has no dropout."""
        if not problem.dropout:
            return None
        batch_and_head = sequence.batch * call.q.shape[-2] + head
        seed, offset = Uint64(call.rng_state[0]), Uint64(call.rng_state[1])
        key = (Uint32(seed), Uint32(seed >> 32) ^ Uint32(offset >> 32))
        return Dropout(key, Uint32(batch_and_head), Uint32(offset), call.keep_threshold)

    def apply(self, p: cute.Tensor, row_of, first_key: Int32, lane: Int32) -> None:
        """Zero what is dropped of P (rows, columns), one thread's part of an mma accumulator.

        Columns are the thread's, in order: pairs 8 keys apart. row_of(r): row in the sequence.
        first_key: of the block, a multiple of 32, as is the block's size; or of 16, where that is its size.
        """
        columns = cute.size(p, mode=[1])
        for first in range(0, columns, 8):
            whole = first_key + first // 8 * GROUP_KEYS
            group = (whole // 8 if columns >= 8 else whole // GROUP_KEYS * 4) + lane % 4
            for r in range(cute.size(p, mode=[0])):
                words = philox((Uint32(group), Uint32(row_of(r)), self.head, self.offset), self.key)
                if columns == 4:
                    upper = first_key % GROUP_KEYS >= 16
                    halves = zip(words[:2], words[2:], strict=True)
                    words = tuple(where(upper, high, low) for low, high in halves)
                for j in range(min(8, columns)):
                    number = Int32(words[j // 2] >> 16 if j % 2 else words[j // 2] & 0xFFFF)
                    kept = number < self.keep_threshold
                    p[r, first + j] = where(kept, p[r, first + j], Float32(0.0))

    def keeps(self, first_row: Int32, key: Int32, lane: Int32) -> list[list]:
        """Of two neighbouring rows and two keys 8 apart, [row][key]: whether they are kept.

        What a lane has of a transposed accumulator: lane // 4 counts keys from a multiple of 16 on, and the
        lane 4 further on has the key beside, which the same numbers serve: each draws one row's for both.
        first_row: a multiple of 2. key: the lane's first.
        """
        odd, upper = lane // 4 % 2 == 1, key % GROUP_KEYS >= 16
        group = key // GROUP_KEYS * 4 + key % 8 // 2
        row = first_row + where(odd, 1, 0)
        words = philox((Uint32(group), Uint32(row), self.head, self.offset), self.key)
        mine = [where(upper, high, low) for low, high in zip(words[:2], words[2:], strict=True)]
        others = [Uint32(cute.arch.shuffle_sync_bfly(word, 4)) for word in mine]
        pairs = list(zip(mine, others, strict=True))
        rows = [where(odd, b, a) for a, b in pairs], [where(odd, a, b) for a, b in pairs]
        return [
            [Int32(where(odd, word >> 16, word & 0xFFFF)) < self.keep_threshold for word in drawn]
            for drawn in rows
        ]

    def apply_to_row(self, p: cute.Tensor, row: Int32, first_key: Int32) -> None:
        """Zero what is dropped of P (1, columns), the columns being neighbouring keys of one row.

        first_key: of column 0, a multiple of GROUP_KEYS, as is the number of columns.
        """
        for first in range(0, cute.size(p), GROUP_KEYS):
            for pair in range(4):
                group = (first_key + first) // 8 + pair
                words = philox((Uint32(group), Uint32(row), self.head, self.offset), self.key)
                for j in range(8):
                    c = first + j // 2 * 8 + pair * 2 + j % 2
                    number = Int32(words[j // 2] >> 16 if j % 2 else words[j // 2] & 0xFFFF)
                    p[0, c] = where(number < self.keep_threshold, p[0, c], Float32(0.0))
