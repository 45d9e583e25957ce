"""The arithmetic of wgmma: D = A B (+ D) for the warps of a set, many warpgroups and k steps as one product.

Products of two elements are exact in float32; sums are float32 in numpy's order (hardware's order and its
precision for 8-bit inputs are not documented; `multiply_short` is what is known of it). A warp owns rows 16w
to 16w + 15 of its warpgroup's 64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..base import fragments, short_sums
from ..base.formats import matrix_values
from ..core.memory import OwnedMemory
from ..core.state import LANES
from .descriptors import WGMMA, Tile, locate, read

if TYPE_CHECKING:
    from ..base.errors import EmulatorError
    from ..core.machine import Machine
    from ..core.state import Threads
    from ..ptx.parse import Instruction

WARPS = 4  # of a warpgroup
ROWS = 64  # of a product


@dataclass(frozen=True, eq=False)
class Form:
    """One wgmma.mma_async as translated.

    d, a: rows of the fragments in the b32 bank, a None where A is in shared memory. descriptors: rows of the
    b64 bank for A (or None) and B. tiles, kinds: how the operands lie and their element types. sign: of the
    product. half: D is f16. keep: (row, negated) of the predicate scale-d, or its value where that is known.
    """

    d: np.ndarray
    a: np.ndarray | None
    descriptors: tuple[int | None, int]
    tiles: tuple[Tile, Tile]
    kinds: tuple[str, str]
    sign: int
    half: bool
    keep: tuple[int, bool] | bool
    where: Instruction

    @cached_property
    def accumulator(self) -> tuple[int, ...]:
        """The rows of D; forms with the same ones have the same tuple."""
        return _the_one(tuple(self.d.tolist()))

    def chains_with(self, other: Form) -> bool:
        """Whether a product of this form and then one of `other` can be summed in one go."""
        same = self.tiles == other.tiles and self.kinds == other.kinds and self.sign == other.sign
        same = same and self.accumulator is other.accumulator
        return same and not self.half and (self.a is None) == (other.a is None)


@cache
def _the_one(rows: tuple[int, ...]) -> tuple[int, ...]:
    return rows


class Crew:
    """The warps of a set by party: a warpgroup of which all four warps are in the set, else a warp.

    order: positions of the warps in the set, party by party. cta, warpgroup, quarter: per party; quarter is
    which of the four warps it is, None where parties are warpgroups. size: warps per party.
    """

    def __init__(self, g: Threads):
        warpgroup, cta = g.warp_at // WARPS, g.cta_at
        self.order = np.lexsort((g.warp_at, warpgroup, cta))
        self.straight = bool((np.diff(self.order) == 1).all())
        names = (cta * LANES + warpgroup)[self.order]
        _, counts = np.unique(names, return_counts=True)
        self.complete = bool((counts == WARPS).all())
        self.size = WARPS if self.complete else 1
        first = self.order[:: self.size]
        self.first = first
        self.cta, self.warpgroup = cta[first], warpgroup[first]
        self.quarter = None if self.complete else g.warp_at[first] % WARPS

    def by_party(self, values: np.ndarray) -> np.ndarray:
        """Values per warp of the set -> per party (those of its first warp)."""
        return values[self.first]


class Operands(NamedTuple):
    """What one issue of a form works on: descriptors per party, A's None where it is in registers."""

    form: Form
    a: np.ndarray | None
    b: np.ndarray


def multiply(m: Machine, g: Threads, crew: Crew, run: list[Operands]) -> np.ndarray:
    """The sum of the products of a run, as registers of D: float32 (registers, g.warps, 32)."""
    form = run[0].form

    def fault(kind: type[EmulatorError], number: int, text: str) -> EmulatorError:
        return m.warp_fault(kind, g, int(crew.first[number % len(crew.cta)]), text)

    left = _left(m, g, crew, run, fault)
    b = np.stack([one.b for one in run])
    total = _by_tile(left, m.shared, crew.cta, b, (form.tiles[1], form.kinds[1], fault))
    if form.sign < 0:
        np.negative(total, out=total)
    words = fragments.registers_d(total.reshape(-1, 16, form.tiles[1].rows))
    if crew.straight:
        return words
    registers = np.empty_like(words)
    registers[:, crew.order] = words
    return registers


def multiply_short(m: Machine, g: Threads, crew: Crew, run: list[Operands], start: np.ndarray) -> np.ndarray:
    """`start` and the products of a run of 8-bit elements, in registers of D, as Hopper adds them."""
    form = run[0].form

    def fault(kind: type[EmulatorError], number: int, text: str) -> EmulatorError:
        return m.warp_fault(kind, g, int(crew.first[number % len(crew.cta)]), text)

    left = _left(m, g, crew, run, fault) * np.float32(form.sign)
    b = np.stack([one.b for one in run])
    right = operand(m.shared, crew.cta, b, (form.tiles[1], form.kinds[1], fault))
    total = fragments.matrix_d(start[:, crew.order].view(np.float32)).reshape(len(left), -1, right.shape[1])
    total = np.stack([short_sums.accumulate(*party) for party in zip(total, left, right, strict=True)])
    registers = np.empty_like(start)
    registers[:, crew.order] = fragments.registers_d(total.reshape(-1, 16, right.shape[1])).view(np.uint32)
    return registers


def _left(m: Machine, g: Threads, crew: Crew, run: list[Operands], fault: Callable) -> np.ndarray:
    """A of every party: float32 (parties, rows, k)."""
    form = run[0].form
    if form.a is None:
        a = np.stack([one.a for one in run])
        return operand(m.shared, crew.cta, a, (form.tiles[0], form.kinds[0], fault), crew.quarter)
    rows = np.concatenate([one.form.a for one in run])
    words = g.gather(m.banks[32], rows)
    if not crew.straight:
        words = words[:, crew.order]
    kind = form.kinds[0]
    if form.tiles[0].bits == 8:
        values = matrix_values(fragments.matrix_a_bytes(np.ascontiguousarray(words)), kind)
    else:
        values = fragments.matrix_a(words, kind == "bf16")
    return values.reshape(len(crew.cta), -1, values.shape[2])


def _by_tile(
    left: np.ndarray, memory: OwnedMemory, cta: np.ndarray, b: np.ndarray, how: tuple[Tile, str, Callable]
) -> np.ndarray:
    """left (parties, rows, k) times every party's B, given by descriptors (steps, parties).

    Parties with one B (warpgroups of a CTA that share a tile, warps of a warpgroup) share its decoding.
    """
    if len(cta) == 1:
        return left @ operand(memory, cta, b, how).swapaxes(1, 2)
    names = np.concatenate([cta[None].astype(np.uint64), b])
    _, first, inverse, counts = np.unique(
        names, axis=1, return_index=True, return_inverse=True, return_counts=True
    )
    right = operand(memory, cta[first], b[:, first], how).swapaxes(1, 2)
    inverse = inverse.reshape(-1)
    parties, rows, k = left.shape
    if (counts != counts[0]).any():
        return left @ right[inverse]
    order = np.argsort(inverse, kind="stable")
    total = left[order].reshape(len(first), -1, k) @ right
    result = np.empty((parties, rows, total.shape[2]), np.float32)
    result[order] = total.reshape(parties, rows, -1)
    return result


def operand(
    memory: OwnedMemory,
    owners: np.ndarray,
    words: np.ndarray,
    how: tuple[Tile, str, Callable],
    quarter: np.ndarray | None = None,
) -> np.ndarray:
    """An operand in shared memory as float32 (n, rows, steps * k), for descriptors (steps, n).

    how: the tile, its element type, and fault(kind, number, text). quarter (n,): only those 16 of 64 rows.
    """
    tile, kind, fault = how
    steps, n = words.shape
    chunks = locate(words.reshape(-1), WGMMA, tile)
    if quarter is not None:
        chunks = quarter_of(chunks, np.tile(quarter, steps), tile)
    raw = read(memory, np.tile(owners, steps), chunks, tile, fault)
    rows, k = raw.shape[1:]
    if tile.mn_major:
        lines = raw.swapaxes(1, 2).reshape(steps, n, k, rows).swapaxes(0, 1).reshape(n, steps * k, rows)
        return matrix_values(lines, kind).swapaxes(1, 2)
    lines = raw.reshape(steps, n, rows, k).transpose(1, 2, 0, 3).reshape(n, rows, steps * k)
    return matrix_values(lines, kind)


def quarter_of(chunks: np.ndarray, quarter: np.ndarray, tile: Tile) -> np.ndarray:
    """The chunks that hold rows 16q to 16q + 15 of tiles of 64 rows."""
    if tile.mn_major:
        n, k, inner = chunks.shape
        return chunks.reshape(n, k, WARPS, inner // WARPS)[np.arange(n), :, quarter]
    n, rows, inner = chunks.shape
    return chunks.reshape(n, WARPS, rows // WARPS, inner)[np.arange(n), quarter]


def addresses(form: Form, a: np.ndarray | None, b: np.ndarray, k: int, quarter: int) -> list[np.ndarray]:
    """Addresses of the chunks that warp k of a product's set, the `quarter`th of its warpgroup, reads."""
    found = [locate(b[k : k + 1], WGMMA, form.tiles[1]).reshape(-1)]
    if a is not None:
        chunks = locate(a[k : k + 1], WGMMA, form.tiles[0])
        found.append(quarter_of(chunks, np.array([quarter]), form.tiles[0]).reshape(-1))
    return found
