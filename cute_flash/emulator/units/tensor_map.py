"""Tensor maps: the 128-byte descriptors of TMA, read and written, and the box of a tensor that a copy moves.

The layout of the bits is no part of the PTX ISA. It is what the CuTe DSL's host code writes; only the first
64 bytes carry meaning.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ..base.errors import EmulatorError, OutOfBounds, UnmodelledInstruction
from ..core.events import Rows
from ..core.memory import GlobalMemory

# Element format -> (bytes per element, name)
FORMATS = {
    0: (1, "u8"), 1: (2, "u16"), 2: (4, "u32"), 4: (8, "u64"), 6: (2, "f16"), 7: (4, "f32"), 9: (8, "f64"),
    10: (2, "bf16"), 11: (1, "b4x2"),
}  # fmt: skip
FOURS = 11  # the format of 4-bit elements: two of them are one element here
SWIZZLES = {0: 0, 1: 32, 2: 64, 3: 128}  # code -> bytes of a swizzled row
MOST_BOX = 256
MOST_RANK = 5
# Format of the elements of a map -> its code here, by the driver's CUtensorMapDataType.
DATA_TYPES = {0: 0, 1: 1, 2: 2, 3: 2, 4: 4, 6: 6, 7: 7, 8: 9, 9: 10, 13: FOURS}
_ALWAYS = 1 << 1 | 1 << 18
_KNOWN = _ALWAYS | 7 << 4 | 15 << 7 | 3 << 13 | 1 << 21


@dataclass(frozen=True)
class TensorMap:
    """A decoded map. sizes, strides (bytes, dim 0 dense) and box: per dimension, dim 0 fastest.

    packed: how many of the program's elements are one element here, along dim 0.
    """

    address: int
    element: int
    format: str
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int
    packed: int = 1

    def place(self, at: tuple[int, ...]) -> tuple[int, ...]:
        """Coordinates as a program gives them, in elements of this map."""
        if at[0] % self.packed:
            raise EmulatorError(f"coordinate {at[0]} of {self.packed} elements that share a byte")
        return (at[0] // self.packed, *at[1:])

    @property
    def nbytes(self) -> int:
        """Bytes of a whole box, which is what a copy signals, zeros included."""
        return int(np.prod(self.box)) * self.element

    def clip(self, at: tuple[int, ...]) -> tuple[slice, ...]:
        """The part of a box at `at` that lies inside the tensor, outermost dimension first."""
        inside = []
        for first, size, extent in zip(at, self.sizes, self.box, strict=True):
            low, high = max(0, -first), min(extent, size - first)
            inside.append(slice(low, max(low, high)))
        return tuple(reversed(inside))

    def view(self, memory: GlobalMemory, at: tuple[int, ...], inside: tuple[slice, ...]) -> np.ndarray:
        """The elements of a clipped box where they lie in memory: unsigned, outermost dimension first."""
        low = [at[d] + part.start for d, part in enumerate(reversed(inside))]
        shape = [part.stop - part.start for part in inside]
        strides = [self.element, *self.strides]
        first = self.address + sum(n * s for n, s in zip(low, strides, strict=True))
        span = sum((n - 1) * s for n, s in zip(reversed(shape), strides, strict=True)) + self.element
        region = memory.find(first)
        if region is None or first + span > region.end:
            where = memory.describe(first if region is None else first + span)
            raise OutOfBounds(f"a tensor copy at {at} touches [{first:#x}, {first + span:#x}): {where}")
        typed = region.bytes[first - region.origin :][:span].view(f"u{self.element}")
        return np.lib.stride_tricks.as_strided(typed, shape, list(reversed(strides)))

    def rows(self, at: tuple[int, ...]) -> Rows:
        """The rows along dimension 0 of the clipped box at `at`."""
        *outer, inner = self.clip(at)
        address = np.array([self.address + (at[0] + inner.start) * self.element])
        for part, first, stride in zip(outer, reversed(at[1:]), reversed(self.strides), strict=True):
            steps = (first + np.arange(part.start, part.stop)) * stride
            address = (address[:, None] + steps).reshape(-1)
        nbytes = (inner.stop - inner.start) * self.element
        return Rows(address if nbytes > 0 else address[:0], nbytes)

    def read(self, memory: GlobalMemory, at: tuple[int, ...]) -> np.ndarray:
        """The bytes of the box at `at`, uint8 (nbytes,), zeros outside the tensor."""
        block = np.zeros(self.box[::-1], f"u{self.element}")
        inside = self.clip(at)
        if all(part.stop > part.start for part in inside):
            block[inside] = self.view(memory, at, inside)
        return block.reshape(-1).view(np.uint8)

    def chunks(self, address: int) -> np.ndarray:
        """Where in shared memory each 16-byte chunk of a box at `address` lies: int64 (nbytes / 16,)."""
        return swizzled(self.nbytes, address % PERIOD, self.swizzle) + (address - address % PERIOD)


PERIOD = 1024  # bytes after which every swizzle repeats


@lru_cache(maxsize=256)
def swizzled(nbytes: int, start: int, swizzle: int) -> np.ndarray:
    """Places of consecutive 16-byte chunks from `start` on under a swizzle of 0, 32, 64 or 128 bytes."""
    at = np.arange(start, start + nbytes, 16)
    bits = {0: 0, 32: 1, 64: 3, 128: 7}[swizzle]
    return at ^ (at >> 7 & bits) << 4


@lru_cache(maxsize=1024)
def decode(words: bytes) -> TensorMap:
    """Read a map. UnmodelledInstruction where it holds something that this decoder does not know."""
    word = struct.unpack("<16I", words[:64])
    flags = word[2]
    if flags & _ALWAYS != _ALWAYS or flags & ~_KNOWN:
        raise UnmodelledInstruction(f"a tensor map with the flags {flags:#x} is not modelled")
    rank = (flags >> 4 & 7) + 1
    code, swizzle = flags >> 7 & 15, SWIZZLES[flags >> 13 & 3]
    if code not in FORMATS or rank > 5:
        raise UnmodelledInstruction(f"a tensor map of element format {code} and rank {rank} is not modelled")
    if word[13] & 0xFFFFFF:
        raise UnmodelledInstruction("a tensor map with element strides is not modelled")
    element, name = FORMATS[code]
    high = [word[7] >> 4 * k & 15 for k in range(4)]
    strides = tuple((word[3 + k] | high[k] << 32) * 16 for k in range(rank - 1))
    sizes = tuple(word[8 + k] + 1 for k in range(rank))
    box = tuple(words[55 + k] + 1 for k in range(rank))
    packed = 2 if code == FOURS else 1
    if sizes[0] % packed or box[0] % packed:
        raise EmulatorError(f"rows of {sizes[0]} 4-bit elements in boxes of {box[0]} are not whole bytes")
    sizes, box = (sizes[0] // packed, *sizes[1:]), (box[0] // packed, *box[1:])
    inner = box[0] * element
    if inner % 16 or (swizzle and inner > swizzle):
        raise EmulatorError(f"a box of {box} {name} elements does not fit a swizzle of {swizzle} bytes")
    return TensorMap(word[0] | word[1] << 32, element, name, sizes, strides, box, swizzle, packed)


def encode(
    data_type: int, address: int, sizes: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...],
    swizzle: int,
) -> bytes:  # fmt: skip
    """A map as the driver makes it. data_type, swizzle: its codes; strides: bytes, of dimensions 1 and on.

    Raises ValueError for what the driver refuses, UnmodelledInstruction for element types without a model.
    """
    if data_type not in DATA_TYPES:
        raise UnmodelledInstruction(f"a tensor map of the driver's data type {data_type} is not modelled")
    rank = len(sizes)
    if not 1 <= rank <= MOST_RANK or swizzle not in SWIZZLES or address % 16:
        raise ValueError(f"a tensor map of rank {rank} and swizzle {swizzle} at {address:#x}")
    if not all(1 <= size <= 1 << 32 for size in sizes) or not all(1 <= n <= MOST_BOX for n in box):
        raise ValueError(f"a tensor map of sizes {sizes} in boxes of {box}")
    if any(stride % 16 or not 0 <= stride < 1 << 40 for stride in strides):
        raise ValueError(f"a tensor map of strides {strides}")
    units = [stride // 16 for stride in (*strides, *(0,) * (4 - len(strides)))]
    words = [address & 0xFFFFFFFF, address >> 32]
    words.append(_ALWAYS | rank - 1 << 4 | DATA_TYPES[data_type] << 7 | swizzle << 13)
    words += [unit & 0xFFFFFFFF for unit in units]
    words.append(sum((unit >> 32) << 4 * k for k, unit in enumerate(units)))
    words += [size - 1 for size in (*sizes, *(1,) * (MOST_RANK - rank))]
    held = bytearray(struct.pack("<13I", *words) + bytes(128 - 52))
    held[55 : 55 + rank] = bytes(n - 1 for n in box)
    return bytes(held)
