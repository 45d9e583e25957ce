"""Tensor memory: its allocator, every shape of load and store, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from cute_flash import emulator
from cute_flash.emulator import (
    Deadlock,
    EmulatorError,
    Options,
    OutOfBounds,
    TensorMemoryError,
    UndefinedRegister,
    UninitializedRead,
    UnmodelledInstruction,
)

from . import tensor
from .evaluate import module
from .test_mbarrier import ORDERS

# Fragments as CuTe's layouts of the copy atoms give them: (thread, value) -> lane * width + column, as lists
# of (extent, stride), fastest first; n the repetitions, width the columns per lane. Packed: two values per
# register.
PLAIN = {
    "32x32b": lambda n: (n, [(32, n)], [(n, 1)]),
    "16x64b": lambda n: (2 * n, [(2, 16 * n), (2, 1), (8, 2 * n)], [(n, 2)]),
    "16x128b": lambda n: (4 * n, [(4, 1), (8, 4 * n)], [(2, 32 * n), (n, 4)]),
    "16x256b": lambda n: (8 * n, [(4, 2), (8, 8 * n)], [(2, 1), (2, 64 * n), (n, 8)]),
    "16x32bx2": lambda n: (2 * n, [(16, 2 * n), (2, n)], [(n, 1)]),
}
PACKED = {
    "32x32b": lambda n: (2 * n, [(32, 2 * n)], [(2 * n, 1)]),
    "16x64b": lambda n: (4 * n, [(2, 32 * n), (2, 2), (8, 4 * n)], [(2, 1), (n, 4)]),
    "16x128b": lambda n: (8 * n, [(4, 2), (8, 8 * n)], [(2, 1), (2, 64 * n), (n, 8)]),
    "16x256b": lambda n: (16 * n, [(4, 4), (8, 16 * n)], [(4, 1), (2, 128 * n), (n, 16)]),
    "16x32bx2": lambda n: (4 * n, [(16, 4 * n), (2, 2 * n)], [(2 * n, 1)]),
}
MOST = {"32x32b": 128, "16x64b": 128, "16x128b": 64, "16x256b": 32, "16x32bx2": 128}
CASES = [
    (shape, n, packed)
    for shape, most in MOST.items()
    for n in (1, 2, 4, 8, 16, 32, 64, 128)
    for packed in (False, True)
    if n <= most
]


def walk(index: int, modes: list[tuple[int, int]]) -> int:
    offset = 0
    for extent, stride in modes:
        offset += index % extent * stride
        index //= extent
    return offset


def words(shape: str, n: int, packed: bool) -> np.ndarray:
    """(lane, column) offsets of each register's parts: int (registers, halves, 32, 2)."""
    width, threads, values = (PACKED if packed else PLAIN)[shape](n)
    count = int(np.prod([extent for extent, _ in values]))
    at = np.array([[walk(t, threads) + walk(v, values) for t in range(32)] for v in range(count)])
    at = at.reshape(-1, 2 if packed else 1, 32)
    return np.stack([at // width, at % width], axis=-1)


def registers(count: int) -> str:
    return ", ".join(f"%u{k}" for k in range(count))


def plain(verb: str, count: int, column: int) -> str:
    """Move %u0 … to or from the warp's own lanes, register j at column + j: a 32x32b of any size."""
    code, k = [], 0
    while k < count:
        n = 1 << (count - k).bit_length() - 1
        names = "{" + ", ".join(f"%u{j}" for j in range(k, k + n)) + "}"
        address = f"[%mine+{column + k}]"
        operands = f"{names}, {address}" if verb == "ld" else f"{address}, {names}"
        code.append(f"tcgen05.{verb}.sync.aligned.32x32b.x{n}.b32 {operands};")
        k += n
    return "\n".join(code)


def both(shape: str, n: int, packed: bool, upper: int) -> tuple[str, str, np.ndarray]:
    """(ld, st, words) of a shape that starts in lane `upper` of each warp's quarter."""
    at = words(shape, n, packed)
    split = f", {(2 if packed else 1) * n}" if shape == "16x32bx2" else ""
    names, address = "{" + registers(len(at)) + "}", f"[%r0+{start(shape, n, packed)}]"
    half = (".pack::16b", ".unpack::16b") if packed else ("", "")
    load = f"tcgen05.ld.sync.aligned.{shape}.x{n}{half[0]}.b32 {names}, {address}{split};"
    store = f"tcgen05.st.sync.aligned.{shape}.x{n}{half[1]}.b32 {address}{split}, {names};"
    setup = f"""
    .reg .b32 %u<128>;
    shl.b32 %mine, %w, 21;
    add.u32 %mine, %mine, %tm;
    add.u32 %r0, %mine, {upper << 16};
    """
    return setup + load, setup, store, at


def start(shape: str, n: int, packed: bool) -> int:
    """The first column that the load or store under test touches: 64 if it then fits."""
    return 64 if 64 + (PACKED if packed else PLAIN)[shape](n)[0] <= tensor.COLUMNS else 0


@pytest.mark.parametrize(("shape", "n", "packed"), CASES)
def test_load(shape, n, packed):
    """Registers of the load under test go back to columns 0 …, register by register."""
    first = start(shape, n, packed)
    upper = 16 if n % 4 == 2 and shape != "32x32b" else 0
    load, _, _, at = both(shape, n, packed, upper)
    before = np.random.default_rng(n).integers(0, 1 << 32, (1, 128, 512), np.uint32)
    code = f"{load}\ntcgen05.wait::ld.sync.aligned;\n{plain('st', len(at), 0)}\n"
    after = tensor.run(code + "tcgen05.wait::st.sync.aligned;", tensor=before)[0]
    for warp in range(4):
        for j, (part,) in enumerate(zip(at, strict=True)):
            lane, column = 32 * warp + upper + part[..., 0], first + part[..., 1]
            value = before[0, lane, column]
            expected = value[0] & 0xFFFF | value[1] << 16 if packed else value[0]
            assert np.array_equal(after[32 * warp : 32 * warp + 32, j], expected), (warp, j)


@pytest.mark.parametrize(("shape", "n", "packed"), CASES)
def test_store(shape, n, packed):
    """Registers come from columns 0 …; nothing but the shape's words changes."""
    first = start(shape, n, packed)
    upper = 16 if n % 4 == 2 and shape != "32x32b" else 0
    _, setup, store, at = both(shape, n, packed, upper)
    before = np.random.default_rng(n).integers(0, 1 << 32, (1, 128, 512), np.uint32)
    code = f"{setup}\n{plain('ld', len(at), 0)}\ntcgen05.wait::ld.sync.aligned;\n{store}\n"
    after = tensor.run(code + "tcgen05.wait::st.sync.aligned;", tensor=before, asynchrony="late")[0]
    expected = before[0].copy()
    for warp in range(4):
        for j in range(len(at)):
            value = before[0, 32 * warp : 32 * warp + 32, j]
            for half, part in enumerate(at[j]):
                lane, column = 32 * warp + upper + part[:, 0], first + part[:, 1]
                expected[lane, column] = value >> 16 * half & 0xFFFF if packed else value
    assert np.array_equal(after, expected)


def test_the_second_half_may_be_anywhere():
    code = """
    .reg .b32 %u<4>;
    shl.b32 %mine, %w, 21;
    tcgen05.ld.sync.aligned.16x32bx2.x2.b32 {%u0, %u1}, [%mine+100], 300;
    tcgen05.st.sync.aligned.32x32b.x2.b32 [%mine], {%u0, %u1};
    tcgen05.wait::st.sync.aligned;
    """
    before = np.random.default_rng(1).integers(0, 1 << 32, (1, 128, 512), np.uint32)
    after = tensor.run(code, tensor=before)[0].reshape(4, 32, 512)
    before = before.reshape(4, 32, 512)
    assert np.array_equal(after[:, :16, :2], before[:, :16, 100:102])
    assert np.array_equal(after[:, 16:, :2], before[:, :16, 400:402])


@pytest.mark.parametrize("kind", ["max.f32", "min.f32", "max.abs.f32", "min.NaN.f32", "min.u32", "max.s32"])
def test_load_with_reduction(kind):
    """The registers as ever, and the extreme of each lane's columns."""
    name, *flags, view = kind.split(".")
    code = f"""
    .reg .b32 %u<9>;
    shl.b32 %mine, %w, 21;
    tcgen05.ld.red.sync.aligned.32x32b.x8.{kind} {{{registers(8)}}}, %u8, [%mine+100];
    {plain("st", 8, 0)}
    tcgen05.st.sync.aligned.32x32b.x1.b32 [%mine+8], {{%u8}};
    tcgen05.wait::st.sync.aligned;
    """
    before = np.random.default_rng(3).standard_normal((1, 128, 512), np.float32)
    before[0, 5, 101], before[0, 6, 100:108] = np.nan, np.nan
    words = before.view(np.uint32)
    got = tensor.run(code, tensor=words)[0]
    assert np.array_equal(got[:, :8], words[0, :, 100:108])
    numbers = words.view({"f32": np.float32, "u32": np.uint32, "s32": np.int32}[view])[0, :, 100:108]
    numbers = np.abs(numbers) if "abs" in flags else numbers
    if view == "f32":
        clean = np.where(np.isnan(numbers), np.inf if name == "min" else -np.inf, numbers)
        expected = getattr(clean, name)(axis=1)
        lost = np.isnan(numbers).any(axis=1) if "NaN" in flags else np.isnan(numbers).all(axis=1)
        expected[lost] = np.nan
        assert np.array_equal(got[:, 8].view(np.float32), expected, equal_nan=True)
    else:
        assert np.array_equal(got[:, 8].view(numbers.dtype), getattr(numbers, name)(axis=1))


@pytest.mark.parametrize("options", ORDERS, ids=str)
def test_lane_bits_of_the_quarter_may_be_left_out(options):
    code = """
    .reg .b32 %u<2>;
    tcgen05.ld.sync.aligned.32x32b.x1.b32 {%u0}, [%tm+7];
    tcgen05.st.sync.aligned.32x32b.x1.b32 [%tm+9], {%u0};
    tcgen05.wait::st.sync.aligned;
    """
    before = np.random.default_rng(2).integers(0, 1 << 32, (1, 128, 512), np.uint32)
    after = tensor.run(code, tensor=before, **options)[0]
    assert np.array_equal(after[:, 9], before[0, :, 7])


LD = "tcgen05.ld.sync.aligned"
MINE = ".reg .b32 %u<128>;\nshl.b32 %mine, %w, 21;\n"


@pytest.mark.parametrize(
    ("code", "error", "words"),
    [
        (f"xor.b32 %mine, %mine, {1 << 21};\n{LD}.32x32b.x1.b32 {{%u0}}, [%mine];",
         TensorMemoryError, "lane 32 of tensor memory; this warp reaches lanes 0 to 31"),
        (f"add.u32 %mine, %mine, {16 << 16};\n{LD}.32x32b.x1.b32 {{%u0}}, [%mine];",
         TensorMemoryError, "in steps of 32"),
        (f"add.u32 %mine, %mine, {8 << 16};\n{LD}.16x64b.x1.b32 {{%u0}}, [%mine];",
         TensorMemoryError, "in steps of 16"),
        (f"{LD}.32x32b.x2.b32 {{%u0, %u1}}, [%mine+511];", OutOfBounds, r"columns \[511, 513\)"),
        (f"{LD}.16x32bx2.x1.b32 {{%u0}}, [%mine], 512;", OutOfBounds, r"columns \[512, 513\)"),
        (f"add.u32 %mine, %mine, %l;\n{LD}.32x32b.x1.b32 {{%u0}}, [%mine];",
         TensorMemoryError, "different addresses"),
        (f"{LD}.32x32b.x2.b32 {{%u0}}, [%mine];", UnmodelledInstruction, "1 registers"),
        (f"{LD}.16x256b.x64.b32 {{{registers(128)}}}, [%mine];", UnmodelledInstruction, "x64"),
        (f"{LD.replace('ld', 'ld.red', 1)}.16x32bx2.x2.max.f32 {{%u0, %u1}}, %u2, [%mine], 2;",
         UnmodelledInstruction, "this reduction"),
        (f"{LD.replace('ld', 'ld.red', 1)}.32x32b.x1.max.f32 {{%u0}}, %u2, [%mine];",
         UnmodelledInstruction, "a reduction of x1"),
        (f"{LD.replace('ld', 'ld.red', 1)}.32x32b.x2.pack::16b.max.f32 {{%u0, %u1}}, %u2, [%mine];",
         UnmodelledInstruction, "pack::16b"),
        ("tcgen05.alloc.cta_group::2.sync.aligned.shared::cta.b32 [%slot], 32;",
         UnmodelledInstruction, "a kernel that uses the other one"),
    ],
)  # fmt: skip
def test_refused(code, error, words):
    with pytest.raises(error, match=words):
        tensor.run(MINE + code)


def test_undefined_registers_are_stored_as_poison():
    """Kernels store blocks of registers of which they use a part; an undefined address is still refused."""
    before = np.zeros((1, 128, 512), np.uint32)
    code = "tcgen05.st.sync.aligned.32x32b.x2.b32 [%mine], {%t, %u7};\ntcgen05.wait::st.sync.aligned;"
    after = tensor.run(MINE + code, tensor=before)[0]
    assert after[:, 0].tolist() == list(range(128))
    assert (after[:, 1] == 0xFFFFFFFF).all()
    with pytest.raises(UndefinedRegister, match="%u7"):
        tensor.run(MINE + code.replace("[%mine]", "[%u7]"), tensor=before)


# Allocation.

ALLOCATE = "tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [{slot}], {n};"
FREE = "tcgen05.dealloc.cta_group::1.sync.aligned.b32 {address}, {n};"
RELINQUISH = "tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;"


def allocate(code: str, block: int = 32, group: int = 1, grid: int = 1, **options) -> list[int]:
    """Run `code`; what it has stored at out + 4 k, by CTA, is returned."""
    out = np.zeros((grid, 8), np.uint32)
    head = """
    .reg .b32 %t, %w, %r<10>, %a, %rank;
    .reg .b64 %out;
    .reg .pred %p<4>;
    mov.u32 %t, %tid.x;
    shr.u32 %w, %t, 5;
    mov.u32 %rank, %cluster_ctarank;
    ld.param.u64 %out, [out];
    mov.u32 %a, %ctaid.x;
    mad.wide.u32 %out, %a, 32, %out;
    mov.b32 %a, slots;
    """
    text = module(head + code, ".param .u64 out", "sm_100a", ".shared .align 16 .b8 slots[64];")
    memory = emulator.GlobalMemory()
    memory.add(out.ctypes.data, out.nbytes, "out")
    params = int(out.ctypes.data).to_bytes(8, "little")
    one = emulator.Launch("k", (grid, 1, 1), (block, 1, 1), (group, 1, 1), 0, params)
    emulator.run(emulator.Program(text), one, memory, Options(**options))
    return out.tolist()


def keep(k: int) -> str:
    """Load the address of allocation k and store it."""
    return f"ld.shared.b32 %r{k}, [%a+{4 * k}];\nst.global.b32 [%out+{4 * k}], %r{k};"


def take(k: int, n: int) -> str:
    return ALLOCATE.format(slot=f"%a+{4 * k}", n=n) + "\n" + keep(k)


def give(k: int, n: int) -> str:
    return FREE.format(address=f"%r{k}", n=n)


def test_first_fit_by_size():
    sizes = (256, 64, 64, 32)
    code = "\n".join(take(k, n) for k, n in enumerate(sizes))
    code += "\n" + give(1, 64) + "\n" + take(4, 32) + "\n" + take(5, 32)
    code += "\n" + "\n".join(give(k, n) for k, n in ((0, 256), (2, 64), (3, 32), (4, 32), (5, 32)))
    assert allocate(code)[0][:6] == [0, 256, 320, 384, 256, 288]


@pytest.mark.parametrize("options", ORDERS, ids=str)
def test_allocation_waits_for_room(options):
    """Warp 1 gets the columns that warp 0 has given back; 512 fit only then."""
    code = f"""
    setp.ne.u32 %p0, %w, 0;
    @%p0 bra other;
    {take(0, 512)}
    bar.sync 1, 64;
    {give(0, 512)}
    bra end;
    other:
    bar.sync 1, 64;
    {take(1, 256)}
    {give(1, 256)}
    end:
    """
    assert allocate(code, block=64, **options)[0][:2] == [0, 0]


def test_a_pair_allocates_the_same_columns():
    """Each CTA has its own way to its allocation; both get the same columns, freed ones too."""
    pair = lambda text: text.replace("cta_group::1", "cta_group::2")  # noqa: E731
    code = f"""
    setp.eq.u32 %p0, %rank, 0;
    @%p0 bra meet;
    mov.b32 %r9, 5;
    meet:
    {pair(take(0, 256))}
    {pair(take(1, 128))}
    {pair(give(0, 256))}
    {pair(take(2, 32))}
    {pair(give(1, 128))}
    {pair(give(2, 32))}
    barrier.cluster.arrive.aligned;
    barrier.cluster.wait.aligned;
    """
    for options in ORDERS:
        assert [row[:3] for row in allocate(code, group=2, grid=4, **options)] == [[0, 256, 0]] * 4


@pytest.mark.parametrize(
    ("code", "error", "words"),
    [
        (take(0, 48), TensorMemoryError, "48 columns; allowed: a power of two from 32 to 512"),
        (take(0, 16), TensorMemoryError, "16 columns"),
        (take(0, 1024), TensorMemoryError, "1024 columns"),
        (take(0, 32), TensorMemoryError, "exits without deallocating 32 columns of tensor memory at 0"),
        (f"{take(0, 32)}\n{take(1, 64)}", TensorMemoryError, "64 columns after 32: allocations may not grow"),
        (f"{RELINQUISH}\n{take(0, 32)}", TensorMemoryError, "after it has relinquished"),
        (f"{take(0, 64)}\n{give(0, 32)}", TensorMemoryError, "deallocates 32 columns at 0x0; allocated: 64"),
        (f"{take(0, 32)}\n{give(0, 32)}\n{give(0, 32)}", TensorMemoryError, "allocated: none"),
        (f"{take(0, 512)}\n{take(1, 32)}", Deadlock, r"wait for tensor memory of CTA \(0, 0, 0\)"),
        (f"{take(0, 32)}\nadd.u32 %r0, %r0, 1;\n{give(0, 32)}", TensorMemoryError, "at 0x1"),
        ("tcgen05.alloc.cta_group::2.sync.aligned.shared::cta.b32 [%a], 32;", TensorMemoryError, "no peer"),
        (f"mov.u32 %r0, %laneid;\n{ALLOCATE.format(slot='%a', n='%r0')}", TensorMemoryError, "different num"),
        (f"{take(0, 32)}\ntcgen05.ld.sync.aligned.32x32b.x1.b32 {{%r1}}, [%r0+32];",
         OutOfBounds, r"allocated: \[0, 32\)"),
        (f"{take(0, 32)}\ntcgen05.ld.sync.aligned.32x32b.x1.b32 {{%r1}}, [%r0+31];",
         UninitializedRead, "lane 0, column 31 of tensor memory, which was never written"),
    ],
)  # fmt: skip
def test_allocator_refuses(code, error, words):
    with pytest.raises(error, match=words):
        allocate(code)


def test_a_lone_warp_of_a_pair_waits_for_ever():
    code = """
    setp.eq.u32 %p0, %rank, 0;
    @%p0 tcgen05.alloc.cta_group::2.sync.aligned.shared::cta.b32 [%a], 32;
    """
    with pytest.raises(Deadlock, match="tensor memory of CTA"):
        allocate(code, group=2, grid=2)


def test_a_load_that_does_not_wait_for_a_store():
    """Without tcgen05.wait::st nothing is there yet."""
    code = f"""
    {take(0, 32)}
    tcgen05.st.sync.aligned.32x32b.x1.b32 [%r0], {{%t}};
    tcgen05.ld.sync.aligned.32x32b.x1.b32 {{%r1}}, [%r0];
    {give(0, 32)}
    """
    allocate(code)
    with pytest.raises(UninitializedRead):
        allocate(code, asynchrony="late")
    with pytest.raises(EmulatorError, match=r"no tcgen05.wait::st has waited for"):
        allocate(code, races=True)
