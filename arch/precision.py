"""Formats of the numbers in tiles: what shared memory, copies and matrix instructions ask about a dtype.

    Precision     an element: its bits, and what follows from them
    Quantization  elements of few bits and the scales that they share
"""

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

FLOAT8_E4M3, FLOAT8_E5M2 = Precision("float8_e4m3fn", 8), Precision("float8_e5m2", 8)
FLOAT8_E8M0 = Precision("float8_e8m0fnu", 8)
FLOAT4_E2M1 = Precision("float4_e2m1fn_x2", 4)  # torch's name is that of a byte with two of them
FLOAT32 = Precision("float32", 32)


@dataclass(frozen=True)
class Quantization:
    """A number is an element times the scale of its group.

    name: as `cute_flash.quantize` has it. element: of the numbers; largest: its largest magnitude.
    scale: of the scales. group: so many neighbours along the axis that a product sums over share a scale,
    as tensor cores apply them; None: blocks of rows do, or all rows of a head, as kernels apply them.
    """

    name: str
    element: Precision
    largest: float
    scale: Precision = FLOAT32
    group: int | None = None


# e4m3, e5m2: Micikevicius et al. 2022, "FP8 formats for deep learning". mxfp8: OCP Microscaling Formats 1.0.
# nvfp4: NVIDIA's, whose scales of a byte are relative to one in float32.
QUANTIZATIONS = {
    found.name: found
    for found in (
        Quantization("e4m3", FLOAT8_E4M3, 448.0),
        Quantization("e5m2", FLOAT8_E5M2, 57344.0),
        Quantization("mxfp8", FLOAT8_E4M3, 448.0, FLOAT8_E8M0, 32),
        Quantization("nvfp4", FLOAT4_E2M1, 6.0, FLOAT8_E4M3, 16),
    )
}
QUANTIZATION_BLOCKS = (64, 128)  # rows that may share a scale
