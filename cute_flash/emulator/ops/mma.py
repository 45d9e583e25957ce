"""mma.sync on 16-bit floats, ldmatrix and stmatrix.

Products of two 16-bit floats are exact in float32; sums are float32 in numpy's order. PTX leaves both the
order and the precision of the sums open ("at least single precision").
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..base import fragments
from ..core.code import Step
from ..core.state import LANES
from ..translate.translation import Operation, operation
from .memory import Access, read, write

if TYPE_CHECKING:
    from ..core.machine import Machine
    from ..core.state import Threads

# shape -> registers of A and of B
SHAPES = {"m16n8k16": (4, 2), "m16n8k8": (2, 1)}


@dataclass(frozen=True)
class Multiply:
    """One mma: rows of its fragments in the b32 bank, and the formats. half: the accumulators are f16."""

    d: tuple[int, ...]
    a: tuple[int, ...]
    b: tuple[int, ...]
    c: tuple[int, ...]
    bf16: bool
    half: bool


@operation("mma.sync.aligned")
def mma(x: Operation) -> Step:
    """D = A B + C for m16n8k8 and m16n8k16, f16 or bf16 inputs, f32 or (f16 inputs) f16 accumulators."""
    shape = x.one_of(*SHAPES)
    x.one_of("row")
    x.one_of("col")
    types = [x.type("f32", "f16"), x.type("f16", "bf16"), x.type("f16", "bf16"), x.type("f32", "f16")]
    if types[1] != types[2] or types[0] != types[3] or (types[0] == "f16" and types[1] == "bf16"):
        raise x.unmodelled(f".{'.'.join(types)}")
    half = types[0] == "f16"
    in_a, in_b, in_d = *SHAPES[shape], 2 if half else 4
    d = tuple(x.dest_of(item, "u32") for item in _items(x, 0, in_d))
    a, b, c = (_rows(x, k, n) for k, n in ((1, in_a), (2, in_b), (3, in_d)))
    multiply = Multiply(d, a, b, c, types[1] == "bf16", half)
    step = x.converged(_run_layers([[multiply]]))
    step.multiply = multiply
    return step


def fold(steps: list[Step]) -> Step:
    """One step for a run of mma steps. Those that share A become one wide product."""
    layers: list[list[Multiply]] = []
    written: set[int] = set()
    for multiply in (step.multiply for step in steps):
        fresh = not layers or layers[-1][0].bf16 != multiply.bf16 or layers[-1][0].half != multiply.half
        if fresh or written.intersection((*multiply.a, *multiply.b, *multiply.c, *multiply.d)):
            layers.append([])
            written = set()
        layers[-1].append(multiply)
        written.update(multiply.d)
    instructions = tuple(i for step in steps for i in step.instructions)
    return Step(_run_layers(layers), steps[0].kind, None, steps[0].where, instructions)


def _run_layers(layers: list[list[Multiply]]) -> Callable:
    """A step that runs independent mmas of each layer together, grouped by their A fragment."""
    products = []
    for layer in layers:
        groups: dict[tuple[int, ...], list[Multiply]] = {}
        for multiply in layer:
            groups.setdefault(multiply.a, []).append(multiply)
        products.append([_product(group) for group in groups.values()])

    def step(m: Machine, g: Threads) -> None:
        bank = m.banks[32]
        for layer in products:
            # All products of a layer are computed before any is written: an mma may overwrite another one's
            # input.
            for rows, words in [product(bank, g) for product in layer]:
                g.scatter(bank, rows, words)

    return step


def _product(group: list[Multiply]) -> Callable:
    """A function (bank, threads) -> (rows, words) of mmas with one A: A times all their B side by side."""
    first, count = group[0], len(group)
    a = np.array(first.a)
    b, c, d = (np.array([row for multiply in group for row in getattr(multiply, name)]) for name in "bcd")
    unchanged_c = len(set(c.tolist())) == 1

    def product(bank: np.ndarray, g: Threads) -> tuple[np.ndarray, np.ndarray]:
        left = fragments.matrix_a(g.gather(bank, a), first.bf16)
        right = fragments.matrix_b(g.gather(bank, b), first.bf16, count)
        total = fragments.registers_d(left @ right.swapaxes(1, 2))
        start = g.gather(bank, c[:1] if unchanged_c else c)
        if first.half:
            pairs = start.view(np.float16).reshape(-1, g.warps, 32, 2).astype(np.float32)
            total = total.reshape(-1, 2, g.warps, 32).transpose(0, 2, 3, 1) + pairs
            return d, total.astype(np.float16).view(np.uint32).reshape(-1, g.warps, 32)
        total += start.view(np.float32)
        return d, total.view(np.uint32)

    return product


def _items(x: Operation, position: int, count: int) -> tuple:
    items = x.vector(position)
    if len(items) != count:
        raise x.unmodelled(f"{len(items)} registers in operand {position + 1}")
    return items


def _rows(x: Operation, position: int, count: int) -> tuple[int, ...]:
    return tuple(x.bank_row(item, "u32") for item in _items(x, position, count))


def _matrix_form(x: Operation, byte_shape: str) -> tuple[bool, int, bool]:
    """(whether elements are bytes, number of matrices, transposed). byte_shape: that of matrices of bytes."""
    of_bytes = x.one_of("m8n8", byte_shape) == byte_shape
    count = {"x1": 1, "x2": 2, "x4": 4}[x.one_of("x1", "x2", "x4")]
    transposed = x.flag("trans")
    x.one_of("shared", "shared::cta", default="shared")
    x.type("b8" if of_bytes else "b16")
    if of_bytes and not transposed:
        raise x.unmodelled(f".{byte_shape} without .trans")
    return of_bytes, count, transposed


def _matrix_addresses(m: Machine, g: Threads, access: Access, rows: int) -> tuple[Threads, np.ndarray]:
    """The threads that supply row addresses (lanes 0 .. rows - 1 of each warp) and those addresses."""
    address = access.of(m, g)
    if rows == LANES:
        return g, address
    suppliers = g.lane < rows
    return m.sets.select(g, suppliers.reshape(g.shape)), address[suppliers]


@operation("ldmatrix.sync.aligned")
def ldmatrix(x: Operation) -> Step:
    """Load 8x8 matrices of 16-bit elements, or 16x16 ones of bytes, row by row.

    Of matrices with n rows, lane n j + r supplies the address of row r of matrix j.
    """
    of_bytes, count, transposed = _matrix_form(x, "m16n16")
    if of_bytes and count == 4:
        raise x.unmodelled(".m16n16.x4")
    registers, height = (2 * count, 16) if of_bytes else (count, 8)
    dests = np.array([x.dest_of(item, "u32") for item in _items(x, 0, registers)])
    access = Access(x, 1, "shared", 16)

    def step(m: Machine, g: Threads) -> None:
        suppliers, address = _matrix_addresses(m, g, access, height * count)
        rows = read(m, suppliers, "shared", address, 4, 4).reshape(g.warps, count, height, 4)
        if of_bytes:
            words = fragments.byte_rows_to_lanes(rows.view(np.uint8))
        else:
            words = fragments.rows_to_lanes(rows, transposed)
        g.scatter(m.banks[32], dests, words)

    return x.converged(step)


@operation("stmatrix.sync.aligned")
def stmatrix(x: Operation) -> Step:
    """Store 8x8 matrices of 16-bit elements, the inverse of ldmatrix, or 16x8 ones of bytes by columns."""
    of_bytes, count, transposed = _matrix_form(x, "m16n8")
    access = Access(x, 0, "shared", 16)
    sources = np.array(_rows(x, 1, count))

    def step(m: Machine, g: Threads) -> None:
        suppliers, address = _matrix_addresses(m, g, access, 8 * count)
        words = g.gather(m.banks[32], sources)
        rows = fragments.lanes_to_byte_rows(words) if of_bytes else fragments.lanes_to_rows(words, transposed)
        write(m, suppliers, "shared", address, rows.reshape(-1, 4))

    return x.converged(step)
