"""What tcgen05.mma multiplies: instruction descriptors, element formats, and which lane holds which row.

Instruction descriptors are those of the PTX ISA's tables for kind::f16, tf32, f8f6f4 and for the
block-scaled kinds. Sparse matrices, .ashift and kind::i8 have no model.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from ..base.errors import UnmodelledInstruction
from ..base.formats import bf16_to_f32
from ..base.narrow_floats import E2M1, FORMATS, UE4M3, UE8M0
from .descriptors import CHUNK, Tile

F8F6F4 = {0: "e4m3", 1: "e5m2", 3: "e2m3", 4: "e3m2", 5: "e2m1"}


class Kind(NamedTuple):
    """A kind of product. k: elements per row; bits: of an element in shared memory; formats by their code.

    accumulators: formats of D by code; scales: how many scale factors a row may have (none: not scaled).
    """

    k: int
    bits: int
    formats: dict[int, str]
    accumulators: dict[int, str]
    scales: tuple[int, ...] = ()


_BOTH, _F32 = {0: "f16", 1: "f32"}, {1: "f32"}
KINDS = {
    "f16": Kind(16, 16, {0: "f16", 1: "bf16"}, _BOTH),
    "tf32": Kind(8, 32, {2: "tf32"}, _F32),
    "f8f6f4": Kind(32, 8, F8F6F4, _BOTH),
    "mxf8f6f4": Kind(32, 8, F8F6F4, _F32, (1,)),
    "mxf4": Kind(64, 4, {1: "e2m1"}, _F32, (2,)),
    "mxf4nvf4": Kind(64, 4, {1: "e2m1"}, _F32, (2, 4)),
}


class Matrix(NamedTuple):
    """Operand A or B. rows: those of one CTA; scale: byte of a word that holds its first scale factor."""

    format: str
    tile: Tile
    negate: bool
    scale: int = 0


class Form(NamedTuple):
    """One tcgen05.mma. n: columns of D in all; half: D is f16; scales: factors per row; ue8m0: their type.

    stationary: a weight-stationary product (.ws).
    """

    kind: str
    ctas: int
    n: int
    a: Matrix
    b: Matrix
    half: bool = False
    scales: int = 0
    ue8m0: bool = False
    stationary: bool = False


@lru_cache(maxsize=256)
def form(word: int, kind: str, ctas: int, scales: int, stationary: bool = False) -> Form:
    """Decode an instruction descriptor. scales: factors per row of a block-scaled kind, else 0.

    stationary: of a weight-stationary product.

    Raises UnmodelledInstruction for fields or shapes that the instruction does not have.
    """
    traits, field = KINDS[kind], _Fields(word, kind)
    reserved = 0x8700004F if traits.scales else 0x2080004F | 3 << 30
    if traits.bits == 4:
        reserved |= 1 << 12 | 3 << 15
    if word & reserved:
        raise field.refuse(f"bits {word & reserved:#x} set")
    n, m = field.at(17, 6) * 8, field.at(27, 2) * 128 if traits.scales else field.at(24, 5) * 16
    sizes = (128,) if traits.scales else (64, 128)
    if ctas == 2:
        sizes = (256,) if traits.scales else (128, 256)
    widths = range(8 * ctas, 257, 8 * ctas)
    if stationary:
        sizes, widths = (32, 64, 128), (64, 128, 256)
    if m not in sizes or n not in widths:
        raise field.refuse(f"M {m} and N {n} with {ctas} CTA{'s'[: ctas - 1]}")
    d = "f32" if traits.scales else traits.accumulators.get(field.at(4, 2))
    formats = [traits.formats.get(field.at(7, 3)), traits.formats.get(field.at(10, 3 - (traits.bits == 4)))]
    if d is None or None in formats or (kind == "f16" and d == "f16" and formats != ["f16", "f16"]):
        raise field.refuse("this combination of formats")
    turned = [bool(field.at(15, 1)), bool(field.at(16, 1))]
    for name, mn_major in zip(formats, turned, strict=True):
        if mn_major and name in ("e2m3", "e3m2", "e2m1", "tf32"):
            raise field.refuse(f"a transposed matrix of {name}")
    if turned[1] and traits.bits == 8 and n % (16 * ctas):
        raise field.refuse(f"N {n} with a transposed matrix B of 8 bits")
    ids = (field.at(29, 2), field.at(4, 2)) if traits.scales else (0, 0)
    if any(i % scales for i in ids if scales):
        raise field.refuse(f"scale factor IDs {ids}")
    ue8m0 = bool(field.at(23, 1))
    if traits.scales and not ue8m0 and (kind, scales) != ("mxf4nvf4", 4):
        raise field.refuse("scale factors of ue4m3")
    a, b = (
        Matrix(name, Tile(rows // ctas, traits.k, traits.bits, mn_major), bool(field.at(bit, 1)), scale)
        for name, rows, mn_major, bit, scale in zip(formats, (m, n), turned, (13, 14), ids, strict=True)
    )
    return Form(kind, ctas, n, a, b, d == "f16", scales, ue8m0, stationary)


class _Fields(NamedTuple):
    word: int
    kind: str

    def at(self, bit: int, width: int) -> int:
        return self.word >> bit & (1 << width) - 1

    def refuse(self, what: str) -> UnmodelledInstruction:
        return UnmodelledInstruction(f"instruction descriptor {self.word:#010x} of kind::{self.kind}: {what}")


# Elements.


def numbers(raw: np.ndarray, matrix: Matrix) -> np.ndarray:
    """float32 (rows, k) of the elements as `descriptors.read` gives them."""
    values = _DECODERS[matrix.format, matrix.tile.bits](raw)
    return -values if matrix.negate else values


def _tf32(raw: np.ndarray) -> np.ndarray:
    return (raw & np.uint32(0xFFFFE000)).view(np.float32)


def _half(raw: np.ndarray) -> np.ndarray:
    return raw.view(np.float16).astype(np.float32)


def _table(name: str) -> Callable:
    table = FORMATS[name].table
    return lambda raw: table[raw]


def _padded(name: str) -> Callable:
    """Sixteen elements of fewer than 8 bits lie at the start of a 16-byte chunk, the first one lowest."""
    narrow = FORMATS[name]
    table = narrow.table[: 1 << narrow.bits]
    weights = 1 << np.arange(narrow.bits)

    def decode(raw: np.ndarray) -> np.ndarray:
        chunks = np.ascontiguousarray(raw).reshape(len(raw), -1, CHUNK)
        bits = np.unpackbits(chunks, axis=2, bitorder="little")[:, :, : CHUNK * narrow.bits]
        codes = bits.reshape(len(raw), -1, narrow.bits).astype(np.int64) @ weights
        return table[codes]

    return decode


def _fours(raw: np.ndarray) -> np.ndarray:
    return E2M1[raw].reshape(len(raw), -1)


_DECODERS: dict[tuple[str, int], Callable] = {
    ("f16", 16): _half,
    ("bf16", 16): bf16_to_f32,
    ("tf32", 32): _tf32,
    ("e4m3", 8): _table("e4m3"),
    ("e5m2", 8): _table("e5m2"),
    ("e2m3", 8): _padded("e2m3"),
    ("e3m2", 8): _padded("e3m2"),
    ("e2m1", 8): _padded("e2m1"),
    ("e2m1", 4): _fours,
}


def from_words(words: np.ndarray, matrix: Matrix) -> np.ndarray:
    """float32 (rows, k) of a matrix in tensor memory: words (rows, k * bits / 32), the low bits first."""
    raw = np.ascontiguousarray(words).view(f"u{max(matrix.tile.bits, 8) // 8}")
    return numbers(raw, matrix)


def scale_factors(words: np.ndarray, matrix: Matrix, form: Form) -> np.ndarray:
    """float32 (rows, scales) of words that each hold one row's factors."""
    raw = np.ascontiguousarray(words).view(np.uint8).reshape(-1, 4)
    return (UE8M0 if form.ue8m0 else UE4M3)[raw[:, matrix.scale : matrix.scale + form.scales]]


# Places.


class Piece(NamedTuple):
    """Rows of one CTA's part of D (and of A in tensor memory) that lie in neighbouring lanes.

    columns: which of D's columns; they begin at the operand's first column.
    """

    rows: slice
    columns: slice
    lanes: slice


@lru_cache(maxsize=64)
def pieces(rows: int, ctas: int, n: int, stationary: bool = False) -> tuple[Piece, ...]:
    """Where the rows of one CTA go (PTX ISA, data path layouts A, B, D, E, F and G)."""
    if rows == 128 or ctas == 2 or stationary:
        # All lanes are used: fewer rows than lanes take turns with their share of the columns.
        width = n * rows // 128
        return tuple(
            Piece(slice(0, rows), slice(k * width, (k + 1) * width), slice(k * rows, (k + 1) * rows))
            for k in range(128 // rows)
        )
    return tuple(
        Piece(slice(r, r + 16), slice(0, n), slice(2 * r, 2 * r + 16)) for r in range(0, 64, 16)
    )
