"""The quantizing kernel: a block of rows of one head, from 16-bit numbers to elements and scales.

Some neighbouring lanes of a warp hold a row, each 8 columns of it, and 64 numbers of several rows in all. The
Walsh–Hadamard transform is butterflies: of distances below 8 within a thread, of larger ones between lanes.
The largest magnitude is found in a group's lanes, in the whole block, or for each column in the warps that
hold a group of rows; scales follow from it alone.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint8, Uint32, Uint64, const_expr, range_constexpr
from cutlass._mlir.dialects import arith

from ..elementwise import where
from ..quantize import ATOM_ROWS, CHUNK, QuantizeConfig, QuantizeOperands, QuantizeProblem
from .element import element_type
from .memory import SmemAllocator
from .schedule import OneTile

LEAST = 2.0**-100  # what the largest magnitude of a group counts as, at least
# Of e4m3 and e5m2: the compiler's type, fraction bits, exponent bias, the largest pattern.
FORMATS = {
    "float8_e4m3fn": (cutlass.Float8E4M3FN, 3, 7, 0x7E),
    "float8_e5m2": (cutlass.Float8E5M2, 2, 15, 0x7B),
}


class QuantizeKernel:
    """The kernel for one problem: `cute.compile(kernel, *operands, stream)`."""

    def __init__(self, problem: QuantizeProblem, config: QuantizeConfig):
        self.problem, self.config = problem, config
        self.threads, self.form = 32 * config.warps, problem.quantization
        self.steps = problem.block * config.lanes // self.threads
        self.warp_rows = 32 // config.lanes  # that a warp takes in a step
        # From a row of a thread to its next: neighbours' rows lie between them, or those of its warp alone,
        # where a scale is that of neighbouring rows.
        self.per_step = self.warp_rows * (config.warps if problem.axis == "head_dim" else 1)

    @cute.jit
    def __call__(self, *operands_and_stream):
        *operands, stream = operands_and_stream
        call = QuantizeOperands(*operands)
        batches, rows, heads, _ = call.x.shape
        schedule = OneTile(cute.ceil_div(rows, self.problem.block), heads, batches)
        self.kernel(call, schedule).launch(grid=schedule.grid(), block=(self.threads, 1, 1), stream=stream)

    @cute.kernel
    def kernel(self, call: QuantizeOperands, schedule: OneTile):
        block, head, batch, _ = schedule.tile(cute.arch.block_idx()[0])
        thread = cute.arch.thread_idx()[0]
        lane, first = thread % self.config.lanes, block * self.problem.block + self.first_row(thread)
        x, data = call.x[batch, None, head, None], call.data[batch, None, head, None]
        numbers = [cute.make_rmem_tensor(CHUNK, Float32) for _ in range(self.steps)]
        for step in range_constexpr(self.steps):
            self.load(x, numbers[step], first + step * self.per_step, lane)
        if const_expr(self.problem.rotated):
            self.rotate(call.signs, numbers, lane)
        if const_expr(self.problem.axis == "seqlen"):
            atoms = call.scale[batch, head, None, block, None, None, None]
            factors = [self.column_scales(atoms, numbers, x.shape[0] - block * ATOM_ROWS, lane)] * self.steps
        elif const_expr(self.form.group is None):
            tops = [self.largest(part) for part in numbers]
            factors = [[self.block_scale(call.scale[batch, head, None], tops, block)] * CHUNK] * self.steps
        else:
            tops = [self.largest(part) for part in numbers]
            atoms = call.scale[batch, head, block, None, None, None, None]
            factors = [
                [self.group_scale(atoms, tops[step], first + step * self.per_step, x.shape[0], lane)] * CHUNK
                for step in range(self.steps)
            ]
        for step in range_constexpr(self.steps):
            row = first + step * self.per_step
            if row < x.shape[0] and lane * CHUNK < self.problem.head_dim:
                data[row, lane] = self.elements(numbers[step], factors[step])

    def first_row(self, thread: Int32) -> Int32:
        """Of a thread's rows, in its block."""
        if self.problem.axis == "head_dim":
            return thread // self.config.lanes
        return thread // 32 * (self.steps * self.warp_rows) + thread % 32 // self.config.lanes

    @cute.jit
    def load(self, x: cute.Tensor, numbers: cute.Tensor, row: Int32, lane: Int32):
        """A lane's part of a row, 0 beyond rows and columns."""
        numbers.fill(0.0)
        if row < x.shape[0] and lane * CHUNK < self.problem.head_dim:
            found = cute.make_rmem_tensor(CHUNK, element_type(self.problem.precision))
            cute.autovec_copy(cute.local_tile(x[row, None], (CHUNK,), (lane,)), found)
            numbers.store(found.load().to(Float32))

    @cute.jit
    def rotate(self, signs: cute.Tensor, rows: list[cute.Tensor], lane: Int32):
        """Signs, then the transform of `width` neighbouring columns at a time."""
        width = self.problem.head_dim & -self.problem.head_dim
        mine = cute.make_rmem_tensor(CHUNK, Float32)
        mine.fill(0.0)
        if lane * CHUNK < self.problem.head_dim:
            cute.autovec_copy(cute.local_tile(signs, (CHUNK,), (lane,)), mine)
        for x in rows:
            for i in range(CHUNK):
                x[i] *= mine[i]
            for distance in (1, 2, 4):
                for i in range(CHUNK):
                    if not i & distance:
                        a, b = x[i], x[i + distance]
                        x[i], x[i + distance] = a + b, a - b
            for distance in (1 << j for j in range((width // CHUNK).bit_length() - 1)):
                upper = (lane & distance) != 0
                for i in range(CHUNK):
                    other = cute.arch.shuffle_sync_bfly(x[i], distance)
                    x[i] = where(upper, other - x[i], x[i] + other)
            for i in range(CHUNK):
                x[i] *= width**-0.5

    @cute.jit
    def largest(self, x: cute.Tensor):
        """Magnitude of a thread's part of a row; a NaN has none."""
        top = Float32(0.0)
        for i in range_constexpr(CHUNK):
            top = cute.arch.fmax(top, cute.math.absf(x[i]))
        return top

    @cute.jit
    def block_scale(self, scales: cute.Tensor, tops: list[Float32], block: Int32):
        """What the block's numbers are multiplied by; its scale is written."""
        top = tops[0]
        for other in tops[1:]:
            top = cute.arch.fmax(top, other)
        top = cute.arch.warp_reduction_max(top)
        of_warps = SmemAllocator().allocate_tensor(Float32, cute.make_layout(self.config.warps), 4)
        warp = cute.arch.warp_idx()  # by a shuffle, which all lanes take part in
        if cute.arch.lane_idx() == 0:
            of_warps[warp] = top
        cute.arch.sync_threads()
        for i in range_constexpr(self.config.warps):
            top = cute.arch.fmax(top, of_warps[i])
        top = cute.arch.fmax(top, LEAST)
        if cute.arch.thread_idx()[0] == 0:
            scales[block] = top / self.form.largest
        return Float32(self.form.largest) / top

    @cute.jit
    def group_scale(self, atoms: cute.Tensor, top: Float32, row: Int32, rows: Int32, lane: Int32):
        """What a group's numbers are multiplied by; its scale, a byte, is written into its row's atom."""
        lanes = self.form.group // CHUNK
        for j in range_constexpr(lanes.bit_length() - 1):
            top = cute.arch.fmax(top, cute.arch.shuffle_sync_bfly(top, 1 << j))
        exponent = self.exponent(top)
        group, place = lane // lanes, row % ATOM_ROWS
        if lane % lanes == 0:
            stored = where(row < rows and lane * CHUNK < self.problem.head_dim, exponent, 0)
            atoms[group // 4, place % 32, place // 32, group % 4] = Uint8(stored)
        return _inverse(exponent)

    @cute.jit
    def column_scales(self, atoms: cute.Tensor, numbers: list[cute.Tensor], rows: Int32, lane: Int32):
        """What numbers of each column are multiplied by; scales are written into the columns' atoms.

        Several warps hold the rows of a group. rows: from the block's first one on.
        """
        tops = cute.make_rmem_tensor(CHUNK, Float32)
        for i in range_constexpr(CHUNK):
            tops[i] = self.column_largest(numbers, i)
        layout = cute.make_ordered_layout((self.config.warps, self.problem.columns), (1, 0))
        of_warps = SmemAllocator().allocate_tensor(Float32, layout, 16)
        warp, in_warp = cute.arch.warp_idx(), cute.arch.lane_idx()
        if in_warp < self.config.lanes:
            cute.autovec_copy(tops, cute.local_tile(of_warps[warp, None], (CHUNK,), (lane,)))
        cute.arch.sync_threads()
        sharing = self.form.group // (self.steps * self.warp_rows)
        group, found = warp // sharing, cute.make_rmem_tensor(CHUNK, Float32)
        for j in range_constexpr(sharing):
            others = of_warps[group * sharing + j, None]
            cute.autovec_copy(cute.local_tile(others, (CHUNK,), (lane,)), found)
            for i in range_constexpr(CHUNK):
                tops[i] = cute.arch.fmax(tops[i], found[i])
        exponents = [self.exponent(tops[i]) for i in range(CHUNK)]
        if warp % sharing == 0 and in_warp < self.config.lanes:
            there = group * self.form.group < rows and lane * CHUNK < self.problem.head_dim
            for i in range_constexpr(CHUNK):
                column = lane * CHUNK + i
                place = column % ATOM_ROWS
                stored = Uint8(where(there, exponents[i], 0))
                atoms[column // ATOM_ROWS, place % 32, place // 32, group] = stored
        return [_inverse(exponent) for exponent in exponents]

    @cute.jit
    def column_largest(self, numbers: list[cute.Tensor], i: cutlass.Constexpr[int]):
        """Magnitude of column `i` of a lane, in the rows of its warp."""
        top = Float32(0.0)
        for x in numbers:
            top = cute.arch.fmax(top, cute.math.absf(x[i]))
        for j in range_constexpr(self.warp_rows.bit_length() - 1):
            top = cute.arch.fmax(top, cute.arch.shuffle_sync_bfly(top, self.config.lanes << j))
        return top

    def exponent(self, top: Float32) -> Int32:
        """Of a group's scale, as ue8m0 has it: float32's own, one higher where there is a fraction."""
        return _bits(cute.arch.fmax(top, LEAST) / self.form.largest) + 0x7FFFFF >> 23

    @cute.jit
    def elements(self, x: cute.Tensor, factors: list[Float32]) -> Int64:
        """Eight elements, the first in the lowest byte."""
        dtype, *form = FORMATS[self.form.element.name]
        scaled = cute.make_rmem_tensor(CHUNK, Float32)
        for i in range_constexpr(CHUNK):
            scaled[i] = x[i] * factors[i]
        if const_expr(self.config.converts):
            rounded = cute.make_rmem_tensor(CHUNK, dtype)
            rounded.store(scaled.load().to(dtype))
            return cute.recast_tensor(rounded, Int64)[0]
        word = Uint64(0)
        for i in range_constexpr(CHUNK):
            word |= Uint64(_rounded(scaled[i], *form)) << 8 * i
        return Int64(word)


def _rounded(x: Float32, fraction: int, bias: int, largest: int) -> Uint32:
    """The pattern of an 8-bit float, to nearest even, the largest one beyond it: `cvt.rn.satfinite`."""
    bits = Uint32(_bits(x))
    size = bits & 0x7FFFFFFF
    drop = 23 - fraction
    normal = (size + ((1 << drop - 1) - 1) + (size >> drop & 1) >> drop) - (127 - bias << fraction)
    # Below the smallest normal number: adding this leaves multiples of the format's least number.
    shift = 2.0 ** (24 - bias - fraction)
    small = Uint32(_bits(_floating(Int32(size)) + shift)) & 0xFF
    code = where(size < Uint32(128 - bias << 23), small, normal)
    code = where(code > largest, Uint32(largest), code) | (bits >> 24 & 0x80)
    return where(size > 0x7F800000, Uint32(0x7F), code)


def _inverse(exponent: Int32) -> Float32:
    """Of a power of two whose exponent is given as ue8m0 has it."""
    return _floating(254 - exponent << 23)


def _bits(x: Float32) -> Int32:
    return Int32(arith.bitcast(Int32.mlir_type, Float32(x).ir_value()))


def _floating(x: Int32) -> Float32:
    return Float32(arith.bitcast(Float32.mlir_type, Int32(x).ir_value()))
