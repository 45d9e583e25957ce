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
from .order import depend_on_load
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

    def after(self, loaded: Float32) -> Dropout:
        """The same, nothing of which is computed ahead while `loaded` is awaited."""
        return self._replace(key=tuple(Uint32(depend_on_load(loaded, Int32(word))) for word in self.key))

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

    def keeps_in_row(self, row: Int32, first_key: Int32, lane: Int32) -> list[list]:
        """Of a row's 32 keys from a multiple of 32 on, [octet][key]: whether a lane's are kept.

        What a lane has of an accumulator whose columns are keys: two of each octet.
        """
        group = first_key // GROUP_KEYS * 4 + lane % 4
        words = philox((Uint32(group), Uint32(row), self.head, self.offset), self.key)
        drawn = ((word & 0xFFFF, word >> 16) for word in words)
        return [[Int32(number) < self.keep_threshold for number in pair] for pair in drawn]

    def keeps_of_key(
        self, first_row: Int32, key: Int32, lane: Int32, rows: int = 32, keys: int = GROUP_KEYS
    ) -> Int32:
        """Of up to 32 neighbouring rows of one key, a bit for each: whether they are kept.

        keys: neighbours that lanes have, from a multiple of it on: GROUP_KEYS in a warp, or half as many in
        each half of one. Eight lanes, or four, share what a call yields: each draws every eighth row's
        numbers, or every fourth's, and gives the others theirs.
        """
        sharers, half = keys // 4, keys < GROUP_KEYS
        group, place = key // GROUP_KEYS * 4 + lane % 8 // 2, lane % 2 + lane // 8 * 2
        if half:
            place = place % sharers
        kept = Int32(0)
        for first in range(0, rows, sharers):
            row = first_row + first + place
            words = philox((Uint32(group), Uint32(row), self.head, self.offset), self.key)
            if half:
                pairs = zip(words[:2], words[2:], strict=True)
                words = tuple(where(key % GROUP_KEYS >= keys, high, low) for low, high in pairs)
            for other in range(sharers):
                # What the lane takes that is `other` away among them: half of one of the words.
                taker = (place ^ other) // 2
                pairs = zip(words[::2], words[1::2], strict=True)
                low, *high = (where(taker % 2 == 1, b, a) for a, b in pairs)
                word = where(taker >= 2, high[0], low) if high else low
                word = Uint32(cute.arch.shuffle_sync_bfly(word, other % 2 + other // 2 * 8))
                number = Int32(where(lane % 2 == 1, word >> 16, word & 0xFFFF))
                is_kept = where(number < self.keep_threshold, 1, 0)
                kept |= is_kept << (first + (place ^ other))
        return kept

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
