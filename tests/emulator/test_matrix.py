"""mma, ldmatrix and stmatrix on random floats, in runs, in part of a CTA's warps, and refused forms.

vectors/ holds the exact layouts; here the emulator's own ways (runs of mma become one product) are compared
with plain products of the same matrices.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from cute_flash.emulator import EmulatorError, Program, UnmodelledInstruction

from .evaluate import aligned, evaluate, launch, module
from .values import integers

MMA = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"


def bf16_words(seed: int, count: int) -> np.ndarray:
    """Random pairs of bf16 near 1."""
    values = np.random.default_rng(seed).standard_normal(2 * count).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint32)


def halves(words: np.ndarray) -> np.ndarray:
    return (words.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def matrix_a(words: list[np.ndarray]) -> np.ndarray:
    """(16, 16) from four registers of one warp, element by element."""
    a = np.zeros((16, 16))
    for i, word in enumerate(words):
        for lane in range(32):
            group, t = divmod(lane, 4)
            a[group + 8 * (i % 2), 2 * t + 8 * (i // 2) :][:2] = halves(word)[2 * lane : 2 * lane + 2]
    return a


def matrix_b(words: list[np.ndarray]) -> np.ndarray:
    b = np.zeros((16, 8))
    for i, word in enumerate(words):
        for lane in range(32):
            group, t = divmod(lane, 4)
            b[2 * t + 8 * i : 2 * t + 8 * i + 2, group] = halves(word)[2 * lane : 2 * lane + 2]
    return b


def place(matrix: np.ndarray) -> list[np.ndarray]:
    """The four result registers of one warp."""
    lanes = np.arange(32)
    group, t = lanes // 4, lanes % 4
    return [matrix[group + 8 * (i // 2), 2 * t + i % 2] for i in range(4)]


def test_a_run_of_products():
    """Two A, two B, a chain of accumulators and an overwritten A in one run equal the same products one by
    one.
    """
    words = [bf16_words(k, 64) for k in range(12)]
    load = "".join(f"ld.global.b32 %r{k}, [%d1+{256 * k}];\n" for k in range(12))
    vector = lambda first, n: "{" + ", ".join(f"%r{first + k}" for k in range(n)) + "}"  # noqa: E731
    zero = "{0f00000000, 0f00000000, 0f00000000, 0f00000000}"
    run = [
        (12, 0, 8, zero),  # D0 = A0 B0
        (16, 0, 10, zero),  # D1 = A0 B1
        (20, 4, 8, zero),  # D2 = A1 B0
        (24, 4, 10, vector(16, 4)),  # D3 = A1 B1 + D1
        (28, 0, 8, vector(24, 4)),  # D4 = A0 B0 + D3
        (0, 4, 8, vector(28, 4)),  # A0's registers = A1 B0 + D4
        (12, 4, 10, vector(12, 4)),  # D0 = A1 B1 + D0
    ]
    products = "".join(f"{MMA} {vector(d, 4)}, {vector(a, 4)}, {vector(b, 2)}, {c};\n" for d, a, b, c in run)
    between = products.replace(";\n", ";\nmov.u32 %x, 0;\n")
    stores = "".join(f"st.global.b32 [%d2+{256 * k}], %r{k};\n" for k in [*range(4), *range(12, 32)])
    head = """
        .reg .b32 %t, %x, %r<32>;
        .reg .b64 %d<3>;
        mov.u32 %t, %tid.x;
        ld.param.u64 %d1, [in];
        ld.param.u64 %d2, [out];
        mad.wide.u32 %d1, %t, 4, %d1;
        mad.wide.u32 %d2, %t, 4, %d2;
    """
    results = []
    for body in (products, between):
        target = np.zeros((32, 64), np.uint32)
        text = module(head + load + body + stores, ".param .u64 in, .param .u64 out")
        for options in ({}, {"schedule": "random"}):
            launch(text, [np.concatenate(words), target], block=64, **options)
            results.append(target.view(np.float32).copy())
        steps = Program(text).code("k").steps
        assert sum(len(s.instructions) for s in steps if s.where.opcode == MMA) == 7
        assert sum(s.where.opcode == MMA for s in steps) == (1 if body is products else 7)
    for warp in range(2):
        expected = products_of([w[32 * warp : 32 * warp + 32] for w in words])
        for got, (row, values) in itertools.product(results, expected.items()):
            assert np.abs(got[row, 32 * warp : 32 * warp + 32] - values).max() < 1e-3
    assert all(np.array_equal(results[0][12:], r[12:]) for r in results)


def products_of(words: list[np.ndarray]) -> dict[int, np.ndarray]:
    """What the run above leaves in each register of one warp."""
    a0, a1 = matrix_a(words[:4]), matrix_a(words[4:8])
    b0, b1 = matrix_b(words[8:10]), matrix_b(words[10:])
    d1, d2 = a0 @ b1, a1 @ b0
    d3 = a1 @ b1 + d1
    d4 = a0 @ b0 + d3
    matrices = {12: a0 @ b0 + a1 @ b1, 16: d1, 20: d2, 24: d3, 28: d4, 0: a1 @ b0 + d4}
    return {first + i: v for first, matrix in matrices.items() for i, v in enumerate(place(matrix))}


def test_a_label_inside_a_run():
    """D = A B once, then twice more: the second mma is where a loop begins."""
    words = [bf16_words(30 + k, 64) for k in range(6)]
    zero = "{0f00000000, 0f00000000, 0f00000000, 0f00000000}"
    code = f"""
        .reg .pred %p;
        .reg .b32 %n;
        mov.u32 %n, 0;
        {MMA} {{%x, %y, %z, %u}}, {{%a, %b, %c, %d}}, {{%e, %f}}, {zero};
        AGAIN:
        {MMA} {{%x, %y, %z, %u}}, {{%a, %b, %c, %d}}, {{%e, %f}}, {{%x, %y, %z, %u}};
        add.u32 %n, %n, 1;
        setp.lt.u32 %p, %n, 2;
        @%p bra AGAIN;
    """
    got = evaluate(code, *words, outputs=(np.float32,) * 4)
    expected = place(3 * matrix_a([w[:32] for w in words[:4]]) @ matrix_b([w[:32] for w in words[4:]]))
    for mine, values in zip(got, expected, strict=True):
        assert np.allclose(mine[:32], values, atol=1e-3)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("transposed", ["", ".trans"])
def test_stmatrix_undoes_ldmatrix(count, transposed):
    words = [integers("u32", k, 64) for k in range(count)]
    names = ", ".join(f"%{'abcd'[k]}" for k in range(count))
    results = ", ".join(f"%{'xyzu'[k]}" for k in range(count))
    code = f"""
        .shared .align 128 .b8 tile[1024];
        .reg .b32 %base, %row;
        and.b32 %row, %i1, 31;
        shr.u32 %base, %i1, 5;
        shl.b32 %base, %base, 9;
        add.u32 %base, %base, tile;
        mad.lo.u32 %base, %row, 16, %base;
        stmatrix.sync.aligned.m8n8.x{count}{transposed}.shared.b16 [%base], {{{names}}};
        bar.warp.sync -1;
        ldmatrix.sync.aligned.m8n8.x{count}{transposed}.shared::cta.b16 {{{results}}}, [%base];
    """
    got = evaluate(code, *words, outputs=(np.uint32,) * count, target="sm_90")
    for mine, theirs in zip(got, words, strict=True):
        assert (mine == theirs).all()


def test_some_warps_of_a_cta():
    """Warps 1 and 3 multiply, the others do not."""
    words = [bf16_words(20 + k, 128) for k in range(6)]
    code = f"""
        .reg .pred %p;
        .reg .b32 %w;
        mov.b32 %x, 0; mov.b32 %y, 0; mov.b32 %z, 0; mov.b32 %u, 0;
        shr.u32 %w, %i0, 5;
        and.b32 %w, %w, 1;
        setp.eq.u32 %p, %w, 0;
        @%p bra DONE;
        {MMA} {{%x, %y, %z, %u}}, {{%a, %b, %c, %d}}, {{%e, %f}}, {{%x, %y, %z, %u}};
        DONE:
    """
    got = evaluate(code, *words, outputs=(np.float32,) * 4)
    for warp in range(4):
        one = [w[32 * warp : 32 * warp + 32] for w in words]
        expected = place(matrix_a(one[:4]) @ matrix_b(one[4:]) * (warp % 2))
        for mine, values in zip(got, expected, strict=True):
            assert np.allclose(mine[32 * warp : 32 * warp + 32], values, atol=1e-4)


def test_special_values_pass_through():
    a = np.full(32, 0x3F803F80, np.uint32)
    b = np.full(32, 0x00007F80, np.uint32)  # inf, 0 in every column
    got = evaluate(f"{MMA} {{%x, %y, %z, %u}}, {{%a, %a, %a, %a}}, {{%b, %b}}, {{%c, %c, %c, %c}};",
                   a, b, np.zeros(32, np.float32), outputs=(np.float32,) * 4)  # fmt: skip
    assert all(np.isinf(v).all() for v in got)
    got = evaluate(f"{MMA} {{%x, %y, %z, %u}}, {{%b, %b, %b, %b}}, {{%c, %c}}, {{%a, %a, %a, %a}};",
                   a, b, np.zeros(32, np.float32), outputs=(np.float32,) * 4)  # fmt: skip
    assert all(np.isnan(v).all() for v in got)


def test_an_incomplete_warp():
    code = f"""
        .reg .b32 %r<4>;
        .reg .pred %p;
        mov.u32 %r0, %tid.x;
        setp.eq.u32 %p, %r0, 7;
        @%p exit;
        {MMA} {{%r0, %r1, %r2, %r3}}, {{%r0, %r0, %r0, %r0}}, {{%r0, %r0}}, {{%r0, %r0, %r0, %r0}};
    """
    with pytest.raises(EmulatorError, match="wait for the warp's other lanes.*mma.sync"):
        launch(module(code), [])


@pytest.mark.parametrize(
    "opcode",
    [
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32",
        "mma.sync.aligned.m16n8k16.row.row.f32.bf16.bf16.f32",
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.f16.f32",
        "mma.sync.aligned.m16n8k16.row.col.f16.bf16.bf16.f16",
        "mma.sp.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
    ],
)
def test_forms_without_a_model(opcode):
    code = f".reg .b32 %r;\n{opcode} {{%r, %r, %r, %r}}, {{%r, %r, %r, %r}}, {{%r, %r}}, {{%r, %r, %r, %r}};"
    with pytest.raises(UnmodelledInstruction, match=opcode):
        Program(module(code))


def test_row_addresses_are_checked():
    code = """
        .reg .b32 %r<4>;
        mov.u32 %r0, %tid.x;
        mad.lo.u32 %r0, %r0, 16, {first};
        st.shared.v4.b32 [{first}], {0, 0, 0, 0};
        ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r1}, [%r0];
    """
    from cute_flash.emulator import Misaligned, UninitializedRead

    with pytest.raises(UninitializedRead, match="byte 0x10 .* lane 1"):
        launch(module(code.replace("{first}", "0")), [aligned(np.zeros(4))], shared=512)
    with pytest.raises(Misaligned):
        launch(module(code.replace("{first}", "8")), [aligned(np.zeros(4))], shared=1024)


BYTES_HEAD = """
    .shared .align 128 .b8 tile[1024];
    .reg .b32 %base, %row, %out<4>;
    and.b32 %row, %i1, 31;
    shl.b32 %row, %row, 4;
    mov.b32 %base, tile;
    add.u32 %base, %base, %row;
"""


@pytest.mark.parametrize("count", [1, 2])
def test_transposed_matrices_of_bytes(count):
    """ldmatrix.m16n16.trans: register i of lane (g, t) holds column g + 8 (i % 2), rows 4t to 4t + 3."""
    rows = np.random.default_rng(1).integers(0, 256, (32, 16), dtype=np.uint8)
    words = list(np.ascontiguousarray(rows.view(np.uint32).T))
    results = ", ".join(f"%{'xyzu'[k]}" for k in range(2 * count))
    code = BYTES_HEAD + f"""
        st.shared.v4.b32 [%base], {{%a, %b, %c, %d}};
        bar.warp.sync -1;
        ldmatrix.sync.aligned.m16n16.x{count}.trans.shared.b8 {{{results}}}, [%base];
    """
    got = evaluate(code, *words, outputs=(np.uint32,) * (2 * count), target="sm_100a", block=32)
    for i, lane in itertools.product(range(2 * count), range(32)):
        group, t = divmod(lane, 4)
        matrix = rows[16 * (i // 2) : 16 * (i // 2) + 16]
        column = matrix[4 * t : 4 * t + 4, group + 8 * (i % 2)]
        assert list(int(got[i][lane]).to_bytes(4, "little")) == column.tolist()


@pytest.mark.parametrize("count", [1, 2, 4])
def test_matrices_of_bytes_are_stored_by_their_columns(count):
    """stmatrix.m16n8.trans: byte i of lane (g, t) goes to row 2t + i % 2 in memory, byte g + 8 (i / 2)."""
    words = [integers("u32", k, 32) for k in range(count)]
    names = ", ".join(f"%{'abcd'[k]}" for k in range(count))
    code = BYTES_HEAD + f"""
        mov.b32 %out0, -1;
        st.shared.v4.b32 [%base], {{%out0, %out0, %out0, %out0}};
        bar.warp.sync -1;
        stmatrix.sync.aligned.m16n8.x{count}.trans.shared.b8 [%base], {{{names}}};
        bar.warp.sync -1;
        ld.shared.v4.b32 {{%x, %y, %z, %u}}, [%base];
    """
    got = evaluate(code, *words, outputs=(np.uint32,) * 4, target="sm_100a", block=32)
    memory = np.stack(got, axis=1).view(np.uint8).reshape(32, 16)
    expected = np.full((32, 16), 0xFF, np.uint8)
    for k, lane, i in itertools.product(range(count), range(32), range(4)):
        group, t = divmod(lane, 4)
        expected[8 * k + 2 * t + i % 2, group + 8 * (i // 2)] = int(words[k][lane]) >> 8 * i & 0xFF
    assert (memory == expected).all()


@pytest.mark.parametrize("form", ["m16n16.x1.shared.b8", "m16n16.x4.trans.shared.b8",
                                  "m16n16.x2.trans.shared.b16", "m8n8.x2.trans.shared.b8",
                                  "m8n16.x1.shared.b8x16.b4x16_p64"])  # fmt: skip
def test_matrices_of_bytes_that_there_are_not(form):
    registers = ", ".join(f"%{'xyzu'[k]}" for k in range(4 if "m16n16" in form else 2))
    with pytest.raises(UnmodelledInstruction):
        code = BYTES_HEAD + f"ldmatrix.sync.aligned.{form} {{{registers}}}, [%base];"
        evaluate(code, integers("u32", 0, 32), outputs=(np.uint32,) * 4, target="sm_100a", block=32)
