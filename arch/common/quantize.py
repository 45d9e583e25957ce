"""The quantizing kernel: a block of rows of one head, from 16-bit numbers to elements and scales.

Some neighbouring lanes of a warp hold a row, each 8 columns of it, and 64 numbers of several rows in all.
Rotary embedding turns pairs of numbers, which a lane has, or two lanes of a row that exchange them. The
Walsh–Hadamard transform is butterflies: of distances below 8 within a thread, of larger ones between lanes.
The largest magnitude is found in a group's lanes, in the whole block, or for each column in the warps that
hold a group of rows. Scales follow from it, or from that of a whole head, its peak, or from both; peaks are
found by a launch before, in which every block raises its head's to its own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint8, Uint32, Uint64, const_expr, range_constexpr
from cutlass._mlir.dialects import arith

from ..elementwise import where
from ..quantize import ATOM_ROWS, CHUNK, QuantizeConfig, QuantizeOperands, QuantizeProblem
from .element import element_type
from .memory import SmemAllocator
from .rotary import turned_halves, turned_neighbours
from .schedule import OneTile

LEAST = 2.0**-100  # what the largest magnitude of a group counts as, at least


class Narrow(NamedTuple):
    """A format of few bits. dtype: the compiler's. fraction: bits of it. largest: the largest pattern."""

    dtype: Any
    bits: int
    fraction: int
    exponent_bias: int
    largest: int


E4M3 = Narrow(cutlass.Float8E4M3FN, 8, 3, 7, 0x7E)
FORMATS = {
    "float8_e4m3fn": E4M3,
    "float8_e5m2": Narrow(cutlass.Float8E5M2, 8, 2, 15, 0x7B),
    "float4_e2m1fn_x2": Narrow(cutlass.Float4E2M1FN, 4, 1, 1, 0x7),
}
WORDS = {8: (Int64, Uint64), 4: (Int32, Uint32)}  # which hold 8 elements of so many bits


class Place(NamedTuple):
    """Where a thread is: a block of a head's `rows`, the part of a row that it holds, its first row."""

    batch: Int32
    head: Int32
    block: Int32
    lane: Int32
    first: Int32
    rows: Int32


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
        x, data = (_of_head(tensor, batch, head) for tensor in (call.x, call.data))
        at = Place(batch, head, block, lane, first, x.shape[0])
        numbers = [cute.make_rmem_tensor(CHUNK, Float32) for _ in range(self.steps)]
        for step in range_constexpr(self.steps):
            self.load(x, numbers[step], first + step * self.per_step, lane)
            if const_expr(self.problem.rotary_dim > 0):
                self.turn(call, numbers[step], first + step * self.per_step, at)
        if const_expr(self.problem.rotated):
            self.rotate(call.signs, numbers, lane)
        if const_expr(self.problem.peaks == "found"):
            self.raise_peak(call, numbers, at)
        else:
            factors = self.factors(call, numbers, at)
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
            numbers.store(self.chunk(x[row, None], lane, CHUNK).load().to(Float32))

    @cute.jit
    def turn(self, call: QuantizeOperands, x: cute.Tensor, row: Int32, at: Place):
        """Rotary embedding of a lane's part of a row; of halves, another lane has the others."""
        half = self.problem.rotary_dim // 2 // CHUNK
        first, part, pairs = at.lane < half, at.lane, CHUNK // 2
        if const_expr(not self.problem.interleaved):
            part, pairs = where(first, at.lane, at.lane - half), CHUNK
            other = cute.make_rmem_tensor(CHUNK, Float32)
            partner = cute.arch.lane_idx() + where(first, half, -half)
            for i in range_constexpr(CHUNK):
                other[i] = cute.arch.shuffle_sync(x[i], partner)
        if row < at.rows and at.lane < 2 * half:
            position = row
            if const_expr(self.problem.offsets):
                position += call.seqlen_offsets[at.batch]
            tables = (call.rotary_cos[position, None], call.rotary_sin[position, None])
            cos, sin = (self.chunk(table, part, pairs).load().to(Float32) for table in tables)
            if const_expr(self.problem.interleaved):
                turned = turned_neighbours(x, cos, sin, pairs)
            else:
                turned = turned_halves(x, other, (cos, sin), first, pairs)
            for i in range_constexpr(CHUNK):
                x[i] = turned[i]

    @cute.jit
    def chunk(self, row: cute.Tensor, index: Int32, size: cutlass.Constexpr[int]):
        """Part `index` of a row, in registers."""
        registers = cute.make_rmem_tensor(size, element_type(self.problem.precision))
        cute.autovec_copy(cute.local_tile(row, (size,), (index,)), registers)
        return registers

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
    def block_largest(self, numbers: list[cute.Tensor]):
        """Magnitude of a block, for all of its threads."""
        tops = [self.largest(part) for part in numbers]
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
        return top

    @cute.jit
    def raise_peak(self, call: QuantizeOperands, numbers: list[cute.Tensor], at: Place):
        """A head's peak is a block's at least. Numbers from 0 on are ordered as their patterns are."""
        top = self.block_largest(numbers)
        if cute.arch.thread_idx()[0] == 0:
            group, _ = self.shared(call, at.head)
            cute.arch.atomic_max(call.peaks[at.batch, None].iterator + group, _bits(top))

    def shared(self, call: QuantizeOperands, head: Int32) -> tuple[Int32, Int32]:
        """(which peak a head has, its number among the neighbours that share it)."""
        sharing = Uint32(call.x.shape[2]) // Uint32(call.peaks.shape[1])
        return Int32(Uint32(head) // sharing), Int32(Uint32(head) % sharing)

    @cute.jit
    def factors(self, call: QuantizeOperands, numbers: list[cute.Tensor], at: Place):
        """What the numbers of each step and column are multiplied by; scales are written."""
        if const_expr(self.problem.axis == "seqlen"):
            return [self.column_factors(call, numbers, at)] * self.steps
        whole = None
        if const_expr(self.problem.peaks == "given"):
            whole = self.head_scale(call, at)
        if const_expr(self.form.group is None):
            top = self.block_scale(call, numbers, at) if whole is None else whole[0]
            return [[Float32(self.form.largest) / top] * CHUNK] * self.steps
        tops = [self.largest(part) for part in numbers]
        atoms = call.scale[at.batch, at.head, at.block, None, None, None, None]
        return [
            [self.group_factor(atoms, tops[step], whole, at.first + step * self.per_step, at)] * CHUNK
            for step in range(self.steps)
        ]

    @cute.jit
    def head_scale(self, call: QuantizeOperands, at: Place):
        """(peak of a head, the scale that follows from it), which the first CTA of all that use it writes."""
        (group, number), scales = self.shared(call, at.head), call.tensor_scale
        top = cute.arch.fmax(_floating(call.peaks[at.batch, group]), LEAST)
        scale = top / self.problem.peak_largest
        if const_expr(self.form.group is None):
            scales = call.scale
        if at.block == 0 and number == 0 and cute.arch.thread_idx()[0] == 0:
            scales[at.batch, group] = scale
        return top, scale

    @cute.jit
    def block_scale(self, call: QuantizeOperands, numbers: list[cute.Tensor], at: Place):
        """The largest magnitude of a block, whose scale is written."""
        top = cute.arch.fmax(self.block_largest(numbers), LEAST)
        if cute.arch.thread_idx()[0] == 0:
            call.scale[at.batch, at.head, at.block] = top / self.form.largest
        return top

    @cute.jit
    def group_factor(self, atoms: cute.Tensor, top: Float32, whole: Any, row: Int32, at: Place):
        """What a group's numbers are multiplied by; its scale, a byte, is written into its row's atom."""
        lanes = self.form.group // CHUNK
        for j in range_constexpr(lanes.bit_length() - 1):
            top = cute.arch.fmax(top, cute.arch.shuffle_sync_bfly(top, 1 << j))
        scale, factor = self.scale_of(top, whole)
        group, place = at.lane // lanes, row % ATOM_ROWS
        if at.lane % lanes == 0:
            there = row < at.rows and at.lane * CHUNK < self.problem.head_dim
            atoms[group // 4, place % 32, place // 32, group % 4] = Uint8(where(there, scale, 0))
        return factor

    @cute.jit
    def column_factors(self, call: QuantizeOperands, numbers: list[cute.Tensor], at: Place):
        """What numbers of each column are multiplied by; scales are written into the columns' atoms.

        Several warps hold the rows of a group.
        """
        tops = cute.make_rmem_tensor(CHUNK, Float32)
        for i in range_constexpr(CHUNK):
            tops[i] = self.column_largest(numbers, i)
        layout = cute.make_ordered_layout((self.config.warps, self.problem.columns), (1, 0))
        of_warps = SmemAllocator().allocate_tensor(Float32, layout, 16)
        warp, in_warp = cute.arch.warp_idx(), cute.arch.lane_idx()
        if in_warp < self.config.lanes:
            cute.autovec_copy(tops, cute.local_tile(of_warps[warp, None], (CHUNK,), (at.lane,)))
        cute.arch.sync_threads()
        sharing = self.form.group // (self.steps * self.warp_rows)
        group, found = warp // sharing, cute.make_rmem_tensor(CHUNK, Float32)
        for j in range_constexpr(sharing):
            others = of_warps[group * sharing + j, None]
            cute.autovec_copy(cute.local_tile(others, (CHUNK,), (at.lane,)), found)
            for i in range_constexpr(CHUNK):
                tops[i] = cute.arch.fmax(tops[i], found[i])
        scales = [self.scale_of(tops[i], None) for i in range(CHUNK)]
        if warp % sharing == 0 and in_warp < self.config.lanes:
            row = at.block * ATOM_ROWS + group * self.form.group
            there = row < at.rows and at.lane * CHUNK < self.problem.head_dim
            atoms = call.scale[at.batch, at.head, None, at.block, None, None, None]
            for i in range_constexpr(CHUNK):
                column = at.lane * CHUNK + i
                place = column % ATOM_ROWS
                stored = Uint8(where(there, scales[i][0], 0))
                atoms[column // ATOM_ROWS, place % 32, place // 32, group] = stored
        return [factor for _, factor in scales]

    @cute.jit
    def column_largest(self, numbers: list[cute.Tensor], i: cutlass.Constexpr[int]):
        """Magnitude of column `i` of a lane, in the rows of its warp."""
        top = Float32(0.0)
        for x in numbers:
            top = cute.arch.fmax(top, cute.math.absf(x[i]))
        for j in range_constexpr(self.warp_rows.bit_length() - 1):
            top = cute.arch.fmax(top, cute.arch.shuffle_sync_bfly(top, self.config.lanes << j))
        return top

    def scale_of(self, top: Float32, whole: tuple[Float32, Float32] | None) -> tuple[Any, Float32]:
        """A group's scale as it is stored, and what its numbers are multiplied by.

        whole: of a head, that e4m3 scales are relative to; None: scales are powers of two.
        """
        if whole is None:
            # float32's own exponent, one higher where it has a fraction, is ue8m0's; 254 - it the inverse's.
            exponent = _bits(cute.arch.fmax(top, LEAST) / self.form.largest) + 0x7FFFFF >> 23
            return exponent, _floating(254 - exponent << 23)
        code = _rounded(top / self.form.largest / whole[1], E4M3)
        # e4m3's bits are float32's highest ones but for the bias of the exponent, subnormal numbers' too.
        factor = _floating(Int32(code) << 20) * 2.0**120 * whole[1]
        return code, where(factor > 0.0, Float32(1.0) / factor, 0.0)

    @cute.jit
    def elements(self, x: cute.Tensor, factors: list[Float32]):
        """Eight elements, the first in the lowest bits."""
        form = FORMATS[self.form.element.name]
        word, unsigned = WORDS[form.bits]
        scaled = cute.make_rmem_tensor(CHUNK, Float32)
        for i in range_constexpr(CHUNK):
            scaled[i] = x[i] * factors[i]
        if const_expr(self.config.converts):
            rounded = cute.make_rmem_tensor(CHUNK, form.dtype)
            rounded.store(scaled.load().to(form.dtype))
            return cute.recast_tensor(rounded, word)[0]
        found = unsigned(0)
        for i in range_constexpr(CHUNK):
            found |= unsigned(_rounded(scaled[i], form)) << form.bits * i
        return word(found)


def _of_head(tensor: cute.Tensor | None, batch: Int32, head: Int32) -> cute.Tensor | None:
    """(rows, columns) of a tensor that there may be."""
    return None if tensor is None else tensor[batch, None, head, None]


def _rounded(x: Float32, form: Narrow) -> Uint32:
    """The pattern of a float of few bits, to nearest even, the largest one beyond it: `cvt.rn.satfinite`."""
    bits = Uint32(_bits(x))
    size = bits & 0x7FFFFFFF
    drop, bias = 23 - form.fraction, form.exponent_bias
    normal = (size + ((1 << drop - 1) - 1) + (size >> drop & 1) >> drop) - (127 - bias << form.fraction)
    # Below the smallest normal number: adding this leaves multiples of the format's least number.
    shift = 2.0 ** (24 - bias - form.fraction)
    small = Uint32(_bits(_floating(Int32(size)) + shift)) & 0xFF
    code = where(size < Uint32(128 - bias << 23), small, normal)
    sign = 1 << form.bits - 1
    code = where(code > form.largest, Uint32(form.largest), code) | (bits >> 32 - form.bits & sign)
    return where(size > 0x7F800000, Uint32(sign - 1), code)


def _bits(x: Float32) -> Int32:
    return Int32(arith.bitcast(Int32.mlir_type, Float32(x).ir_value()))


def _floating(x: Int32) -> Float32:
    return Float32(arith.bitcast(Float32.mlir_type, Int32(x).ir_value()))
