"""Formats of the numbers in tiles: what shared memory, copies and matrix instructions ask about a dtype."""

from __future__ import annotations

from dataclasses import dataclass

K_BYTES = 32  # of a row that one matrix instruction takes: mma.sync, wgmma and tcgen05, whatever the format
SWIZZLED_BYTES = (128, 64, 32)  # of a row: the widths of swizzled parts, widest first


@dataclass(frozen=True)
class Precision:
    """A format. name: of the dtype, as torch has it. bits: of an element."""

    name: str
    bits: int

    @property
    def k_step(self) -> int:
        """Elements along k of one matrix instruction."""
        return K_BYTES * 8 // self.bits

    def nbytes(self, elements: int) -> int:
        """What so many elements take."""
        return elements * self.bits // 8

    def padded(self, dim: int, parts: int = 1) -> int:
        """Columns that a head dim takes in shared memory: whole k steps, of all its equal parts together."""
        whole = self.k_step * parts
        return -(-dim // whole) * whole

    def swizzle_width(self, columns: int) -> int:
        """Columns of a swizzled part: of the widest ones that whole rows of `columns` divide into."""
        widths = (8 * nbytes // self.bits for nbytes in SWIZZLED_BYTES)
        return next(width for width in widths if columns % width == 0)


PRECISIONS = {found.name: found for found in (Precision("float16", 16), Precision("bfloat16", 16))}
