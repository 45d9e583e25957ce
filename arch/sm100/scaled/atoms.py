"""Which atoms of factors a tile has, in shared memory and in tensor memory.

An atom holds the factors of 128 rows and 4 groups, 512 bytes. In tensor memory it takes 4 columns: row r's
factors are in lane r % 32 of every quarter of the lanes, column r // 32, a byte for each of the 4 groups (PTX
ISA, "Scale factor layout").

Tiles of keys need not begin with an atom. They begin with one of its quarters:

    q, k    rows go on with the tiles      columns begin as many quarters earlier, so that a tile's are always
                                           at the same place
    v       groups of keys do              a step reads another byte, of this atom's columns or the next one's
"""

from __future__ import annotations

from dataclasses import dataclass

from ...block_scaled import ATOM_GROUPS, ATOM_ROWS, BlockScaledProblem

WORDS = 64  # of an atom, 8 bytes each, as TMA moves them
ATOM_BYTES = 8 * WORDS
QUARTER = ATOM_ROWS // 4  # rows of a quarter of an atom; of v keys, a group of them
COLUMNS = ATOM_ROWS // 32  # of tensor memory that an atom takes


@dataclass(frozen=True)
class Factors:
    """Of the tiles of one operand.

    moving: rows of q and k, or keys of v, from one tile to the next. across: atoms in the other direction.
    places: of tiles in shared memory. of_v: groups go on with the tiles, not rows. steps: of the product's k,
    that share an atom. scale: the dtype of a factor.
    """

    moving: int
    across: int
    places: int
    of_v: bool
    steps: int
    scale: str

    @staticmethod
    def of(problem: BlockScaledProblem, rows: int, places: int) -> Factors:
        """Of tiles of q or k."""
        form = problem.quantization
        steps = ATOM_GROUPS * form.group // problem.precision.k_step
        return Factors(rows, problem.group_atoms, places, False, steps, form.scale.name)

    @staticmethod
    def of_values(problem: BlockScaledProblem, keys: int, places: int) -> Factors:
        """Of tiles of v."""
        across = -(-problem.head_dim_v // ATOM_ROWS)
        return Factors(keys, across, places, True, ATOM_GROUPS, problem.v_quantization.scale.name)

    @property
    def span(self) -> int:
        """Atoms that a tile may reach into."""
        return 1 if ATOM_ROWS % self.moving == 0 else 2

    @property
    def margin(self) -> int:
        """Columns before a tile's own, that quarters of others fall into."""
        begins = range(0, ATOM_ROWS * self.moving, self.moving)
        return 0 if self.of_v else max(first % ATOM_ROWS // QUARTER for first in begins)

    @property
    def pitch(self) -> int:
        """Columns from the atoms of some groups to those of the next; of v, from some groups to the next."""
        return COLUMNS * self.across if self.of_v else self.margin + COLUMNS * self.span

    @property
    def columns(self) -> int:
        """Of tensor memory that a tile takes."""
        return self.pitch * (self.span if self.of_v else self.across)

    @property
    def bytes(self) -> int:
        """Of shared memory, what a tile's copy transfers."""
        return ATOM_BYTES * self.span * self.across

    @property
    def box(self) -> tuple[int, int, int]:
        """(words, inner atoms, outer atoms) of a tile, in the order of global memory."""
        return (WORDS, self.span, self.across) if self.of_v else (WORDS, self.across, self.span)
