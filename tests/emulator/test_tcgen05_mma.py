"""tcgen05.mma against exact products: every kind, format, shape, layout, source and option."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

from cute_flash.emulator import EmulatorError, OutOfBounds, TensorMemoryError, UnmodelledInstruction

from . import tensor
from .definitions import FORMATS, decode, encode
from .test_convert_narrow import NARROW, value
from .test_mbarrier import ORDERS

# format -> (bits in shared memory, its code as A and B, kind of product, K)
ELEMENTS = {
    "f16": (16, 0, "f16", 16),
    "bf16": (16, 1, "f16", 16),
    "tf32": (32, 2, "tf32", 8),
    "e4m3": (8, 0, "f8f6f4", 32),
    "e5m2": (8, 1, "f8f6f4", 32),
    "e2m3": (8, 3, "f8f6f4", 32),
    "e3m2": (8, 4, "f8f6f4", 32),
    "e2m1": (8, 5, "f8f6f4", 32),
}
SWIZZLES = {16: 0, 32: 6, 64: 4, 128: 2}  # width in bytes -> code
D_AT, A_AT = 64, 400  # columns of D, and of A in tensor memory
PLACES = (0, 24 * 1024)  # of A and B in the shared image


# Operands.


def codes(name: str, shape: tuple[int, int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(patterns, float64 values): numbers whose products add up exactly in float32."""
    random = np.random.default_rng(seed)
    if name in NARROW:
        every = np.arange(1 << sum(NARROW[name][:2]) + 1)
        numbers = np.array([value(int(c), name) for c in every])
        with np.errstate(invalid="ignore"):
            fit = every[(np.abs(numbers) <= 4) & (numbers * 4 % 1 == 0)]
        chosen = random.choice(fit, shape)
        return chosen.astype(np.uint8), numbers[chosen]
    numbers = random.integers(-4, 5, shape).astype(np.float64)
    if name == "tf32":
        bits = numbers.astype(np.float32).view(np.uint32)
        return bits | random.integers(0, 1 << 13, shape, np.uint32), numbers
    bits = np.array([encode(float(v), FORMATS[name]) for v in numbers.reshape(-1)], np.uint16)
    return bits.reshape(shape), numbers


def packed(patterns: np.ndarray, name: str) -> np.ndarray:
    """Patterns (rows, k) as bytes of shared memory (rows, bytes), 16 elements of 4 and 6 bits to 16 bytes."""
    bits = sum(NARROW[name][:2]) + 1 if name in NARROW else 8
    if bits == 8:
        return np.ascontiguousarray(patterns).view(np.uint8).reshape(len(patterns), -1)
    held = np.zeros((len(patterns), patterns.shape[1] // 16, 16), np.uint8)
    for r, c, e in np.ndindex(len(patterns), patterns.shape[1] // 16, 16):
        code, at = int(patterns[r, 16 * c + e]), e * bits
        for b in range(bits):
            held[r, c, (at + b) // 8] |= (code >> b & 1) << (at + b) % 8
    return held.reshape(len(patterns), -1)


@dataclass(frozen=True)
class Layout:
    """How an operand lies in shared memory: swizzle width (16: none), direction, first byte within a row."""

    width: int = 128
    mn_major: bool = False
    offset: int = 0

    def strides(self) -> tuple[int, int]:
        """(leading, stride) byte offsets with room between the parts of an operand."""
        if self.width == 16:
            return (160, 800) if self.mn_major else (4096, 256)
        return (3072 if self.mn_major else 16), 8 * self.width

    def address(self, r: int, byte: int) -> int:
        """PTX's canonical layouts: r counts lines across (rows if K-major, k if MN-major)."""
        leading, stride = self.strides()
        if self.width == 16:
            far, near = (leading, stride) if self.mn_major else (stride, leading)
            return r % 8 * 16 + r // 8 * far + byte // 16 * near + byte % 16
        at = r % 8 * self.width + r // 8 * stride + byte % self.width + byte // self.width * leading
        at += self.offset
        return at ^ (at >> 7 & self.width // 16 - 1) << 4

    def store(self, image: np.ndarray, base: int, lines: np.ndarray) -> int:
        """Write lines (count, bytes) into an image; returns the descriptor."""
        for r, byte in np.ndindex(*lines.shape):
            image[base + self.address(r, byte)] = lines[r, byte]
        leading, stride = self.strides()
        start = tensor.IMAGE_AT + base + self.offset
        return start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | 1 << 46 | SWIZZLES[self.width] << 61


@dataclass(frozen=True)
class Case:
    """One product: formats, shape, layouts and options. shift: scale-input-d; skip: disable-output-lane.

    stationary: .ws, with what follows it.
    """

    a: str = "bf16"
    b: str = "bf16"
    m: int = 128
    n: int = 64
    ctas: int = 1
    a_layout: Layout = Layout()
    b_layout: Layout = Layout()
    a_in_tensor_memory: bool = False
    add: bool = True
    half: bool = False
    negate: tuple[bool, bool] = (False, False)
    shift: int | None = None
    skip: bool = False
    lane: int = 0
    stationary: bool = False

    @property
    def kind(self) -> str:
        return ELEMENTS[self.a][2]

    @property
    def descriptor(self) -> int:
        """The instruction descriptor."""
        word = (0 if self.half else 1) << 4 | ELEMENTS[self.a][1] << 7 | ELEMENTS[self.b][1] << 10
        word |= self.negate[0] << 13 | self.negate[1] << 14
        word |= self.a_layout.mn_major << 15 | self.b_layout.mn_major << 16
        return word | self.n // 8 << 17 | self.m // 16 << 24

    def lanes(self) -> list[tuple[int, int, int, int]]:
        """(row of the CTA, first column of D, columns, lane) of every row piece of a CTA's part of D."""
        rows = self.m // self.ctas
        if rows == 128:
            return [(r, 0, self.n, r) for r in range(128)]
        if self.stationary and rows == 32:
            quarter = self.n // 4
            return [(r, h * quarter, quarter, 32 * h + r) for h in range(4) for r in range(32)]
        if self.ctas == 2 or self.stationary:
            half = self.n // 2
            return [(r, h * half, half, 64 * h + r) for h in (0, 1) for r in range(64)]
        return [(r, 0, self.n, r // 16 * 32 + r % 16 + self.lane) for r in range(64)]


def prepare(case: Case) -> tuple[str, np.ndarray, np.ndarray, np.ndarray]:
    """(code, shared images, tensor memories before, and after)."""
    random = np.random.default_rng(3)
    images = random.integers(0, 256, (case.ctas, tensor.IMAGE), np.uint8)
    before = random.integers(0, 1 << 32, (case.ctas, 128, 512), np.uint32)
    d = random.integers(-40, 41, (case.ctas, 128, case.n)).astype(np.float32)
    before[:, :, D_AT : D_AT + case.n] = as_words(d, case.half)
    skipped = random.integers(0, 2, (case.ctas, 128)).astype(bool) if case.skip else None
    a, b, words = [], [], (0, 0)
    for cta in range(case.ctas):
        words = tuple(operand(case, side, cta, images, before) for side in ((0, a), (1, b)))
    after, b_all = before.copy(), np.concatenate(b) * (-1 if case.negate[1] else 1)
    for cta in range(case.ctas):
        exact = a[cta] * (-1 if case.negate[0] else 1) @ b_all.T
        for r, first, count, lane in case.lanes():
            total = exact[r, first : first + count]
            if case.add:
                total = total + d[cta, lane, :count] * 2.0 ** -(case.shift or 0)
            if skipped is None or not skipped[cta, lane]:
                after[cta, lane, D_AT : D_AT + count] = as_words(total, case.half)
    return issue(case, *words, skipped), images, before, after


def as_words(numbers: np.ndarray, half: bool) -> np.ndarray:
    """Elements of D as tensor memory holds them."""
    return numbers.astype(np.float16).view(np.uint16) if half else numbers.astype(np.float32).view(np.uint32)


def operand(
    case: Case, side: tuple[int, list], cta: int, images: np.ndarray, before: np.ndarray
) -> int:
    """Put A (side 0) or B (1) of a CTA in its place and its numbers in a list; returns the descriptor."""
    number, numbers = side
    name, layout = ((case.a, case.a_layout), (case.b, case.b_layout))[number]
    count = (case.m, case.n)[number] // case.ctas
    patterns, exact = codes(name, (count, ELEMENTS[name][3]), 10 * number + cta)
    numbers.append(exact)
    if number == 0 and case.a_in_tensor_memory:
        words = packed(patterns, name).view(np.uint32)
        for r, _, _, lane in case.lanes():
            before[cta, lane, A_AT : A_AT + words.shape[1]] = words[r]
    lines = packed(patterns.T if layout.mn_major else patterns, name)
    return layout.store(images[cta], PLACES[number], lines)


def issue(case: Case, a: int, b: int, skipped: np.ndarray | None = None) -> str:
    """The instruction, by one thread, and the wait for it."""
    mask = ""
    if skipped is not None:
        words = np.packbits(skipped.reshape(-1), bitorder="little").view(np.uint32)
        mask = ", {" + ", ".join(f"{w:#x}" for w in words) + "}"
    operand = "[%r1]" if case.a_in_tensor_memory else "%s0"
    tail = "" if case.shift is None else f", {case.shift}"
    form = f"tcgen05.mma{'.ws' if case.stationary else ''}.cta_group::{case.ctas}.kind::{case.kind}"
    return f"""
    mov.b64 %s0, {a:#x};
    mov.b64 %s1, {b:#x};
    add.u32 %r0, %tm, {case.lane << 16 | D_AT};
    add.u32 %r1, %tm, {case.lane << 16 | A_AT};
    mov.b32 %r2, {case.descriptor:#x};
    setp.eq.u32 %p0, {int(case.add)}, 1;
    @%issuer {form} [%r0], {operand}, %s1, %r2{mask}, %p0{tail};
    {tensor.commit(case.ctas)}
    """


def check(case: Case, **options) -> None:
    code, images, before, after = prepare(case)
    got = tensor.run(code, images, before, case.ctas, **options)
    wrong = np.argwhere(got != after)
    assert not len(wrong), [tuple(int(v) for v in w) for w in wrong[:4]]


PAIRS = [
    ("f16", "f16"), ("bf16", "bf16"), ("f16", "bf16"), ("tf32", "tf32"), ("e4m3", "e4m3"), ("e4m3", "e5m2"),
    ("e5m2", "e2m1"), ("e2m1", "e3m2"), ("e2m3", "e4m3"), ("e3m2", "e2m3"),
]  # fmt: skip


@pytest.mark.parametrize(("a", "b"), PAIRS)
def test_formats(a, b):
    check(Case(a, b))
    check(Case(a, b, ctas=2, m=256, negate=(True, False), add=False))


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize(("ctas", "m", "n"), [
    (1, 64, 8), (1, 64, 256), (1, 128, 8), (1, 128, 24), (1, 128, 256),
    (2, 128, 16), (2, 128, 96), (2, 256, 32), (2, 256, 256),
])  # fmt: skip
def test_shapes(ctas, m, n, add):
    check(Case(ctas=ctas, m=m, n=n, add=add))


LAYOUTS = [Layout(w) for w in SWIZZLES] + [Layout(64, offset=32), Layout(128, offset=96)]
LAYOUTS += [Layout(w, mn_major=True) for w in SWIZZLES]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_layouts(layout):
    """Either operand in each layout, 16-bit elements and 8-bit ones."""
    for name in ("bf16", "e4m3"):
        check(Case(name, name, a_layout=layout))
        check(Case(name, name, b_layout=layout, n=128))


@pytest.mark.parametrize("name", ["bf16", "f16", "tf32", "e4m3", "e5m2"])
@pytest.mark.parametrize(
    ("ctas", "m", "lane"), [(1, 64, 0), (1, 64, 16), (1, 128, 0), (2, 128, 0), (2, 256, 0)]
)
def test_a_in_tensor_memory(name, ctas, m, lane):
    check(Case(name, name, ctas=ctas, m=m, lane=lane, a_in_tensor_memory=True))


@pytest.mark.parametrize(
    "case",
    [
        Case("f16", "f16", half=True),
        Case("f16", "f16", half=True, m=64, add=False),
        Case("e4m3", "e5m2", half=True),
        Case(negate=(True, True)),
        Case(negate=(False, True)),
        Case(shift=3),
        Case("tf32", "tf32", shift=15),
        Case(shift=0, skip=True),
        Case(skip=True, ctas=2, m=256),
        Case(skip=True, ctas=2, m=128),
        Case(skip=True, add=False, a_in_tensor_memory=True),
    ],
    ids=str,
)
def test_options(case):
    check(case)


@pytest.mark.parametrize("options", ORDERS, ids=str)
@pytest.mark.parametrize("case", [Case(), Case(ctas=2, m=256), Case(a_in_tensor_memory=True)], ids=str)
def test_any_order(case, options):
    check(case, **options)


@pytest.mark.parametrize("usage", ["fill", "use", "lastuse", "discard"])
def test_collector_usage(usage):
    """A use needs the fill of the same matrix; the numbers are those of the matrix in memory."""
    code, images, before, after = prepare(Case(add=False))
    line = next(line for line in code.splitlines() if "tcgen05.mma" in line)
    marked = line.replace("kind::f16", f"kind::f16.collector::a::{usage}")
    if usage in ("use", "lastuse"):
        with pytest.raises(TensorMemoryError, match="no product has filled in"):
            tensor.run(code.replace(line, marked), images, before)
        marked = f"{line.replace('kind::f16', 'kind::f16.collector::a::fill')}\n{marked}"
    assert np.array_equal(tensor.run(code.replace(line, marked), images, before), after)


def test_products_of_one_thread_add_up_in_order():
    case = Case()
    code, images, before, after = prepare(case)
    line = next(line for line in code.splitlines() if "tcgen05.mma" in line)
    wiped = line.replace("%p0", "0")
    first, _, _, fresh = prepare(replace(case, add=False))
    for options in ORDERS:
        got = tensor.run(code.replace(line, f"{line}\n{wiped}\n{line}"), images, before, **options)
        once = fresh[0, :, D_AT : D_AT + case.n].view(np.float32)
        assert np.array_equal(got[0, :, D_AT : D_AT + case.n].view(np.float32), 2 * once)


@pytest.mark.parametrize(
    ("old", "new", "error", "words"),
    [
        ("mov.b32 %r2, 0x", "mov.b32 %r2, 0x8", UnmodelledInstruction, "bits"),
        ("%tm, 64;", "%tm, 449;", OutOfBounds, r"columns \[449, 513\)"),
        ("%tm, 64;", "%tm, 2097216;", TensorMemoryError, "D begins in lane 32"),
        (", %p0;", ", %p0, 16;", UnmodelledInstruction, "scale-input-d 16"),
        ("kind::f16", "kind::f16.ws", UnmodelledInstruction, "modifier .ws"),
        ("kind::f16", "kind::f16.ashift", UnmodelledInstruction, "ashift"),
        ("kind::f16", "kind::f16.block_scale", UnmodelledInstruction, "with .block"),
        ("kind::f16", "kind::i8", UnmodelledInstruction, "kind"),
        ("%r2, %p0", "%r2, {%t, %t}, %p0", UnmodelledInstruction, "disable-output"),
        ("[%bar]", "[%bar+-8]", EmulatorError, "no mbarrier was initialised"),
        ("mov.b32 %r2", "xor.b64 %s1, %s1, 0x400000000000;\nmov.b32 %r2", EmulatorError, "descriptor"),
    ],
)
def test_refused(old, new, error, words):
    code, images, before, _ = prepare(Case())
    assert old in code
    with pytest.raises(error, match=words):
        tensor.run(code.replace(old, new), images, before)


@pytest.mark.parametrize("case", [
    Case(m=32), Case(n=4), Case(n=264), Case(ctas=2, m=64), Case(ctas=2, m=256, n=24), Case(m=256),
    Case("tf32", "tf32", half=True), Case("bf16", "bf16", half=True),
])  # fmt: skip
def test_shapes_and_formats_that_there_are_not(case):
    code = issue(case, 1 << 46, 1 << 46)
    with pytest.raises(UnmodelledInstruction, match="instruction descriptor"):
        tensor.run(code, ctas=case.ctas)


def test_a_of_fewer_than_8_bits_in_tensor_memory():
    with pytest.raises(EmulatorError, match="e2m1 in tensor memory"):
        tensor.run(issue(Case("e2m1", "e2m1", a_in_tensor_memory=True), 0, 1 << 46 | 2 << 61))


def test_the_result_is_that_of_decode():
    """The helpers here and the definitions agree about what a pattern stands for."""
    patterns, numbers = codes("bf16", (4, 16), 1)
    assert [decode(int(p), FORMATS["bf16"]) for p in patterns.reshape(-1)] == numbers.reshape(-1).tolist()


# Weight-stationary products.

STATIONARY = Case(stationary=True)


@pytest.mark.parametrize("m", [32, 64, 128])
@pytest.mark.parametrize("n", [64, 128, 256])
@pytest.mark.parametrize("add", [False, True])
def test_stationary_shapes(m, n, add):
    check(replace(STATIONARY, m=m, n=n, add=add))


@pytest.mark.parametrize("case", [
    Case("f16", "f16", half=True), Case("tf32", "tf32"), Case("e4m3", "e5m2", negate=(True, False)),
    Case("e2m3", "e4m3", add=False), Case(a_layout=Layout(128, True)), Case(b_layout=Layout(16)),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("m", [32, 64])
def test_stationary_formats_and_layouts(case, m):
    check(replace(case, stationary=True, m=m))


@pytest.mark.parametrize("name", ["bf16", "tf32", "e4m3"])
@pytest.mark.parametrize("m", [32, 64, 128])
def test_stationary_a_in_tensor_memory(name, m):
    """Each part of the lanes has its own copy of A."""
    case = Case(name, name, stationary=True, m=m, a_in_tensor_memory=True)
    check(case)
    if m == 32:
        code, images, before, after = prepare(case)
        before[0, 96:, A_AT] ^= 0x80808080  # another A for the last quarter of the columns
        got = tensor.run(code, images, before)
        assert (got[0, :96] == after[0, :96]).all() and (got[0, 96:, D_AT:] != after[0, 96:, D_AT:]).any()


@pytest.mark.parametrize("options", ORDERS, ids=str)
def test_stationary_in_any_order(options):
    check(replace(STATIONARY, m=32), **options)
    check(replace(STATIONARY, m=64, a_in_tensor_memory=True), **options)


@pytest.mark.parametrize("usage", ["use", "lastuse"])
def test_stationary_collectors(usage):
    """Four buffers hold matrices B; a use needs the fill of the same matrix in the same one."""
    code, images, before, after = prepare(replace(STATIONARY, add=False))
    line = next(line for line in code.splitlines() if "tcgen05.mma" in line)
    use = line.replace("kind::f16", f"kind::f16.collector::b2::{usage}")
    for other in ("", line.replace("kind::f16", "kind::f16.collector::b1::fill")):
        with pytest.raises(TensorMemoryError, match=f"b2::{usage} of a matrix B that no product"):
            tensor.run(code.replace(line, f"{other}\n{use}"), images, before)
    fill = line.replace("kind::f16", "kind::f16.collector::b2::fill")
    assert np.array_equal(tensor.run(code.replace(line, f"{fill}\n{use}"), images, before), after)


def test_stationary_zero_column_masks():
    """Bit 39 of the descriptor says whether any column of B is left out."""
    code, images, before, after = prepare(STATIONARY)
    for word in (0, 1 << 38, 1 << 40):
        masked = code.replace(", %p0;", f", %p0, {word};")
        assert np.array_equal(tensor.run(masked, images, before), after)
    with pytest.raises(UnmodelledInstruction, match="a zero-column mask"):
        tensor.run(code.replace(", %p0;", f", %p0, {1 << 39};"), images, before)


@pytest.mark.parametrize("case", [
    replace(STATIONARY, n=32), replace(STATIONARY, n=192), replace(STATIONARY, m=16),
    replace(STATIONARY, ctas=2, m=256), replace(STATIONARY, skip=True),
], ids=str)  # fmt: skip
def test_stationary_forms_that_there_are_not(case):
    skipped = np.zeros(128 * case.ctas, bool) if case.skip else None
    with pytest.raises(UnmodelledInstruction):
        tensor.run(issue(case, 1 << 46, 1 << 46, skipped), ctas=case.ctas)
    with pytest.raises(TensorMemoryError, match="D begins in lane 16"):
        tensor.run(issue(replace(STATIONARY, m=64, lane=16), 1 << 46, 1 << 46))
