"""Block-scaled tcgen05.mma, and tcgen05.cp, which brings scale factors to tensor memory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from cute_flash.emulator import OutOfBounds, TensorMemoryError, UninitializedRead, UnmodelledInstruction

from . import tensor
from .test_convert_narrow import value
from .test_mbarrier import ORDERS
from .test_tcgen05_mma import A_AT, D_AT, ELEMENTS, PLACES, Layout, codes, packed

SCALE_AT = (320, 336)  # columns of the scale factors of A and B
# kind -> (K, factors per row -> modifier)
KINDS = {
    "mxf8f6f4": (32, {1: ("scale_vec::1X", "block32")}),
    "mxf4": (64, {2: ("scale_vec::2X", "block32")}),
    "mxf4nvf4": (64, {2: ("scale_vec::2X", "block32"), 4: ("scale_vec::4X", "block16")}),
}


@dataclass(frozen=True)
class Case:
    """One block-scaled product. ids: scale factor IDs of A and B; ue4m3: the factors' format."""

    kind: str = "mxf8f6f4"
    a: str = "e4m3"
    b: str = "e4m3"
    n: int = 64
    ctas: int = 1
    scales: int = 1
    ids: tuple[int, int] = (0, 0)
    ue4m3: bool = False
    modifier: str = ""
    add: bool = True
    negate: tuple[bool, bool] = (False, False)
    a_in_tensor_memory: bool = False

    @property
    def descriptor(self) -> int:
        fours = self.kind != "mxf8f6f4"
        formats = (1, 1) if fours else (ELEMENTS[self.a][1], ELEMENTS[self.b][1])
        word = self.ids[1] << 4 | formats[0] << 7 | formats[1] << 10
        word |= self.negate[0] << 13 | self.negate[1] << 14 | self.n // 8 << 17
        return word | (not self.ue4m3) << 23 | self.ctas << 27 | self.ids[0] << 29


def factors(case: Case, rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(bytes, values) of scale factors: powers of two, or small numbers in ue4m3. Shape (rows, scales)."""
    random = np.random.default_rng(seed)
    if case.ue4m3:
        patterns = random.choice([0x30, 0x38, 0x3C, 0x40], (rows, case.scales))
        return patterns, np.vectorize(lambda c: value(int(c), "e4m3"))(patterns)
    patterns = random.integers(125, 130, (rows, case.scales))
    return patterns, 2.0 ** (patterns - 127)


def matrix(case: Case, name: str, rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows as bytes of shared memory, values)."""
    k = KINDS[case.kind][0]
    patterns, exact = codes(name, (rows, k), seed)
    if k == 64:
        return (patterns[:, ::2] | patterns[:, 1::2] << 4).astype(np.uint8), exact
    return packed(patterns, name), exact


def prepare(case: Case) -> tuple[str, np.ndarray, np.ndarray, np.ndarray]:
    """(code, shared images, tensor memories before, and after)."""
    k = KINDS[case.kind][0]
    random = np.random.default_rng(5)
    images = random.integers(0, 256, (case.ctas, tensor.IMAGE), np.uint8)
    before = random.integers(0, 1 << 32, (case.ctas, 128, 512), np.uint32)
    d = random.integers(-40, 41, (case.ctas, 128, case.n)).astype(np.float32)
    before[:, :, D_AT : D_AT + case.n] = d.view(np.uint32)
    scale_b, sf_b = factors(case, case.n, 1)
    a, b, words = [], [], [0, 0]
    for cta in range(case.ctas):
        scale_a, sf_a = factors(case, 128, 2 + cta)
        raw, exact = matrix(case, case.a, 128, 10 + cta)
        a.append((exact.reshape(128, case.scales, -1) * sf_a[:, :, None]).reshape(128, k))
        words[0] = Layout().store(images[cta], PLACES[0], raw)
        before[cta, :, A_AT : A_AT + raw.shape[1] // 4] = raw.view(np.uint32)
        raw, exact = matrix(case, case.b, case.n // case.ctas, 20 + cta)
        words[1] = Layout().store(images[cta], PLACES[1], raw)
        b.append(exact)
        for side, patterns in enumerate((scale_a, scale_b)):
            put_scales(before[cta], SCALE_AT[side], case.ids[side], patterns)
    sign = (-1 if case.negate[0] else 1) * (-1 if case.negate[1] else 1)
    every = np.concatenate(b).reshape(case.n, case.scales, -1) * sf_b[:, :, None]
    after = before.copy()
    for cta in range(case.ctas):
        total = sign * a[cta] @ every.reshape(case.n, k).T + (d[cta] if case.add else 0)
        after[cta, :, D_AT : D_AT + case.n] = total.astype(np.float32).view(np.uint32)
    return issue(case, *words), images, before, after


def put_scales(words: np.ndarray, column: int, first: int, patterns: np.ndarray) -> None:
    """Factor b of row r: byte first + b of column r / 32, lane r % 32 of each quarter."""
    raw = words.view(np.uint8).reshape(128, 512, 4)
    for r, b in np.ndindex(*patterns.shape):
        raw[r % 32 :: 32, column + r // 32, first + b] = patterns[r, b]


def issue(case: Case, a: int, b: int) -> str:
    operand = "[%r1]" if case.a_in_tensor_memory else "%s0"
    dot = f".{case.modifier}" if case.modifier else ""
    form = f"tcgen05.mma.cta_group::{case.ctas}.kind::{case.kind}.block_scale{dot}"
    return f"""
    mov.b64 %s0, {a:#x};
    mov.b64 %s1, {b:#x};
    add.u32 %r0, %tm, {D_AT};
    add.u32 %r1, %tm, {A_AT};
    mov.b32 %r2, {case.descriptor:#x};
    add.u32 %r3, %tm, {SCALE_AT[0] | case.ids[0] << 30};
    add.u32 %r4, %tm, {SCALE_AT[1] | case.ids[1] << 30};
    setp.eq.u32 %p0, {int(case.add)}, 1;
    @%issuer {form} [%r0], {operand}, %s1, %r2, [%r3], [%r4], %p0;
    {tensor.commit(case.ctas)}
    """


FOURS = {"a": "e2m1", "b": "e2m1"}
CASES = [
    Case(),
    Case(ids=(1, 3), n=256, add=False),
    Case(a="e5m2", b="e3m2", ids=(2, 0), n=40),
    Case(a="e2m1", b="e2m3", negate=(True, False), modifier="scale_vec::1X"),
    Case(a="e4m3", b="e5m2", modifier="block32", a_in_tensor_memory=True, n=8),
    Case(ctas=2, n=128, ids=(3, 1)),
    Case("mxf4", scales=2, **FOURS),
    Case("mxf4", scales=2, ids=(2, 0), n=256, modifier="scale_vec::2X", **FOURS),
    Case("mxf4", scales=2, ids=(0, 2), ctas=2, n=64, modifier="block32", a_in_tensor_memory=True, **FOURS),
    Case("mxf4nvf4", scales=2, modifier="block32", ids=(2, 2), **FOURS),
    Case("mxf4nvf4", scales=4, modifier="block16", ue4m3=True, n=128, **FOURS),
    Case("mxf4nvf4", scales=4, modifier="scale_vec::4X", **FOURS),
    Case("mxf4nvf4", scales=4, modifier="block16", ue4m3=True, ctas=2, n=256, negate=(True, True), **FOURS),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_products(case):
    code, images, before, after = prepare(case)
    got = tensor.run(code, images, before, case.ctas)
    wrong = np.argwhere(got != after)
    assert not len(wrong), [tuple(int(v) for v in w) for w in wrong[:4]]


def test_copies_of_the_scales_of_b_must_agree():
    code, images, before, _ = prepare(Case())
    before[0, 70, SCALE_AT[1]] ^= 1
    with pytest.raises(TensorMemoryError, match="different scale factors of B from column 336"):
        tensor.run(code, images, before)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (Case(modifier="scale_vec::2X"), "scale_vec::2X with kind::mxf8f6f4"),
        (Case("mxf4", scales=2, modifier="block16", **FOURS), "block16 with kind::mxf4"),
        (Case("mxf4nvf4", scales=4, **FOURS), "the form without one of"),
        (Case("mxf4", scales=2, ids=(1, 0), **FOURS), "scale factor IDs"),
        (Case("mxf4nvf4", scales=4, modifier="block16", ids=(2, 0), **FOURS), "scale factor IDs"),
        (Case(ue4m3=True), "scale factors of ue4m3"),
        (Case("mxf4", scales=2, a="e4m3", b="e2m1", ue4m3=True), "scale factors of ue4m3"),
    ],
)
def test_refused(case, words):
    with pytest.raises(UnmodelledInstruction, match=words):
        tensor.run(issue(case, 1 << 46, 1 << 46))


# Copies.

# form -> (rows, bytes per row, which lanes row r goes to)
COPIES = {
    "128x256b": (128, 32, lambda r: [r]),
    "128x128b": (128, 16, lambda r: [r]),
    "64x128b.warpx2::02_13": (64, 16, lambda r: [r, r + 64]),
    "64x128b.warpx2::01_23": (64, 16, lambda r: [r % 32 + 64 * (r // 32), r % 32 + 64 * (r // 32) + 32]),
    "32x128b.warpx4": (32, 16, lambda r: [r, r + 32, r + 64, r + 96]),
}


@pytest.mark.parametrize("options", ORDERS, ids=str)
@pytest.mark.parametrize("ctas", [1, 2])
@pytest.mark.parametrize("layout", [Layout(16), Layout(128, offset=64)], ids=str)
@pytest.mark.parametrize("form", COPIES)
def test_copy(form, layout, ctas, options):
    check_copy(form, layout, ctas, **options)


@pytest.mark.parametrize("form", [form for form, (_, width, _) in COPIES.items() if width == 16])
@pytest.mark.parametrize("layout", [Layout(128, offset=112), Layout(32, offset=16)], ids=str)
def test_a_copy_of_16_bytes_may_end_where_the_pattern_ends(form, layout):
    check_copy(form, layout, 1)


def test_a_copy_of_32_bytes_may_not():
    with pytest.raises(UnmodelledInstruction, match="crosses the swizzle's width from byte 112"):
        check_copy("128x256b", Layout(128, offset=112), 1)


def check_copy(form: str, layout: Layout, ctas: int, **options) -> None:
    rows, width, lanes = COPIES[form]
    random = np.random.default_rng(7)
    images = random.integers(0, 256, (ctas, tensor.IMAGE), np.uint8)
    before = random.integers(0, 1 << 32, (ctas, 128, 512), np.uint32)
    after = before.copy()
    for cta in range(ctas):
        lines = random.integers(0, 256, (rows, width), np.uint8)
        word = layout.store(images[cta], PLACES[1], lines)
        for r in range(rows):
            after[cta, lanes(r), 40 : 40 + width // 4] = lines[r].view(np.uint32)
    code = f"""
    mov.b64 %s0, {word:#x};
    add.u32 %r0, %tm, 40;
    @%issuer tcgen05.cp.cta_group::{ctas}.{form} [%r0], %s0;
    {tensor.commit(ctas)}
    """
    assert np.array_equal(tensor.run(code, images, before, ctas, **options), after)


def test_a_product_follows_the_copy_of_its_scale_factors():
    """NVIDIA's layout of scale factors: atoms of 512 bytes, [row % 32][row / 32][4 blocks of K]."""
    case = Case("mxf4nvf4", scales=4, modifier="block16", ue4m3=True, n=128, **FOURS)
    code, images, before, after = prepare(case)
    plain = before.copy()
    copies = ""
    for side in (0, 1):
        atom = before[0, :32, SCALE_AT[side] : SCALE_AT[side] + 4].copy()
        plain[0, :, SCALE_AT[side] : SCALE_AT[side] + 4] = 0xFFFFFFFF
        at = 50 * 1024 + 512 * side
        images[0, at : at + 512] = atom.view(np.uint8).reshape(-1)
        word = tensor.IMAGE_AT + at >> 4 | 16 >> 4 << 16 | 128 >> 4 << 32 | 1 << 46
        copies += f"mov.b64 %s2, {word:#x};\nadd.u32 %r5, %tm, {SCALE_AT[side]};\n"
        copies += "@%issuer tcgen05.cp.cta_group::1.32x128b.warpx4 [%r5], %s2;\n"
    for options in ORDERS:
        assert np.array_equal(tensor.run(copies + code, images, plain, **options), after)


@pytest.mark.parametrize(
    ("form", "error", "words"),
    [
        ("4x256b", UnmodelledInstruction, "the form without one of"),
        ("64x128b", UnmodelledInstruction, "64x128b is not modelled"),
        ("128x256b.warpx4", UnmodelledInstruction, "128x256b.warpx4 is not modelled"),
        ("128x128b.b8x16.b6x16_p32", UnmodelledInstruction, "modifier .b8x16"),
    ],
)
def test_copies_that_there_are_not(form, error, words):
    with pytest.raises(error, match=words):
        tensor.run(f"mov.b64 %s0, 0;\n@%issuer tcgen05.cp.cta_group::1.{form} [%tm], %s0;")


@pytest.mark.parametrize(
    ("at", "error", "words"),
    [
        (tensor.IMAGE_AT + tensor.IMAGE - 512, UninitializedRead, "of an operand was never written"),
        (0x20000, OutOfBounds, "an operand's bytes at shared 0x20000"),
    ],
)
def test_a_copy_reads_what_was_written(at, error, words):
    code = f"""
    mov.b64 %s0, {at >> 4 | 1 << 16 | 8 << 32 | 1 << 46:#x};
    @%issuer tcgen05.cp.cta_group::1.128x128b [%tm], %s0;
    {tensor.commit()}
    """
    with pytest.raises(error, match=words):
        tensor.run(code)
