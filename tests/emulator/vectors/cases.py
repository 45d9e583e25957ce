"""The instructions that have vectors: their PTX, and seeded inputs."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..evaluate import BLOCK
from ..tiles import descriptor
from ..values import float_bits, integers

WARPS = 2
LANES = 32 * WARPS


class Case(NamedTuple):
    """code runs once per thread on the inputs %a, %b, …; outputs: types of %x, %y, …; see evaluate.py.

    any_nan: the result is an f32 whose NaN payload the ISA leaves open. block: threads of a block.
    """

    code: str
    inputs: tuple[np.ndarray, ...]
    outputs: tuple
    target: str = "sm_80"
    any_nan: bool = False
    block: int = BLOCK


def small_numbers(kind: str, count: int, seed: int, limit: int = 4) -> np.ndarray:
    """Words of two floats that are whole numbers up to `limit`: sums of their products are exact in any
    order.
    """
    numbers = np.random.default_rng(seed).integers(-limit, limit + 1, 2 * count).astype(np.float32)
    if kind in BYTES:
        sizes = np.random.default_rng(seed).integers(-4, 5, 4 * count)
        patterns = np.array(BYTES[kind])[np.abs(sizes)] | np.where(sizes < 0, 0x80, 0)
        return patterns.astype(np.uint8).view(np.uint32)
    halves = numbers.astype(np.float16).view(np.uint16) if kind == "f16" else numbers.view(np.uint32) >> 16
    return halves.astype(np.uint16).view(np.uint32)


# Patterns of 0 to 4 in the 8-bit formats.
BYTES = {"e4m3": (0, 0x38, 0x40, 0x44, 0x48), "e5m2": (0, 0x3C, 0x40, 0x42, 0x44)}


def mma(shape: str, kind: str, accumulator: str) -> Case:
    in_a, in_b = {"m16n8k16": (4, 2), "m16n8k8": (2, 1)}[shape]
    words = [small_numbers(kind, LANES, seed) for seed in range(in_a + in_b)]
    if accumulator == "f32":
        start = [np.random.default_rng(50 + k).integers(-99, 99, LANES).astype(np.float32) for k in range(4)]
        start = [v.view(np.uint32) for v in start]
    else:
        start = [small_numbers("f16", LANES, 60 + k, limit=99) for k in range(2)]
    names = iter("abcdefghjklm")
    a, b, c = (", ".join(f"%{next(names)}" for _ in range(n)) for n in (in_a, in_b, len(start)))
    d = ", ".join(f"%{name}" for name in "xyzu"[: len(start)])
    opcode = f"mma.sync.aligned.{shape}.row.col.{accumulator}.{kind}.{kind}.{accumulator}"
    code = f"{opcode} {{{d}}}, {{{a}}}, {{{b}}}, {{{c}}};"
    return Case(code, (*words, *start), (np.uint32,) * len(start))


def ldmatrix(count: int, transposed: bool) -> Case:
    """Each warp stores 512 random bytes, its lanes' 16-byte rows, and loads matrices from rows in a
    mixed-up order.
    """
    words = tuple(integers("u32", 70 + k, LANES) for k in range(4))
    order = np.concatenate([np.random.default_rng(80 + w).permutation(32) for w in range(WARPS)]).astype(
        np.uint32
    )
    d = ", ".join(f"%{name}" for name in "xyzu"[:count])
    trans = ".trans" if transposed else ""
    code = f"""
        .shared .align 128 .b8 tile[{512 * WARPS}];
        .reg .b32 %base, %mine, %row;
        mov.u32 %base, tile;
        shr.u32 %row, %i1, 5;
        mad.lo.u32 %base, %row, 512, %base;
        and.b32 %row, %i1, 31;
        mad.lo.u32 %mine, %row, 16, %base;
        st.shared.v4.b32 [%mine], {{%a, %b, %c, %d}};
        bar.warp.sync -1;
        mad.lo.u32 %row, %e, 16, %base;
        ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{d}}}, [%row];
    """
    return Case(code, (*words, order), (np.uint32,) * count)


class Wgmma(NamedTuple):
    """A form of wgmma.mma_async. widths: of the swizzles of A and B, A's 0 where it is in registers."""

    kinds: tuple[str, str]
    result: str = "f32"
    widths: tuple[int, int] = (128, 128)
    major: tuple[int, int] = (0, 0)
    scales: tuple[int, int] = (1, 1)

    @property
    def name(self) -> str:
        operands = "_".join(f"{w}{'mn' if m else 'k'}" for w, m in zip(self.widths, self.major, strict=True))
        sign = "" if self.scales == (1, 1) else ".neg"
        return f"wgmma.{self.result}.{'.'.join(self.kinds)}.{operands}{sign}"

    @property
    def n(self) -> int:
        return 8 if self.result == "f32" else 16

    def strides(self, which: int) -> tuple[int, int]:
        """(LBO, SBO) in bytes."""
        width = self.widths[which]
        if width > 16:
            return 4096, 8 * width
        return (1024, 128) if not self.major[which] else (2048, 128)


A_AT, B_AT = 0, 8192  # in 16 KB of shared memory
WORDS = 8


def wgmma(form: Wgmma) -> Case:
    """One warpgroup fills shared memory, each thread the chunks t, t + 128, … with its words in turn, and
    adds a product of two tiles there to an accumulator.
    """
    kind = form.kinds[0] if form.kinds[0] == form.kinds[1] else "e4m3"
    words = [small_numbers(kind, 128, 200 + k) for k in range(WORDS)]
    if form.result == "f32":
        start = [np.random.default_rng(220 + k).integers(-99, 99, 128).astype(np.float32) for k in range(4)]
    else:
        start = [small_numbers("f16", 128, 230 + k, limit=99) for k in range(4)]
    names = "abcdefgh"
    stores = "\n".join(
        f"st.shared.v4.b32 [%at+{2048 * j}], {{{', '.join(f'%{names[(j + i) % WORDS]}' for i in range(4))}}};"
        for j in range(8)
    )
    a, b = (int(descriptor("wgmma", at, *form.strides(i), max(form.widths[i], 16))[0])
            for i, at in ((0, A_AT), (1, B_AT)))  # fmt: skip
    narrow = form.kinds[0] in BYTES
    flags = form.major if form.widths[0] else form.major[1:]
    trans = "" if narrow else "".join(f", {m}" for m in flags)
    left = "%da" if form.widths[0] else "{%a, %b, %c, %d}"
    scales = ", ".join(map(str, form.scales))
    shape = f"m64n{form.n}k{32 if narrow else 16}"
    opcode = f"wgmma.mma_async.sync.aligned.{shape}.{form.result}.{'.'.join(form.kinds)}"
    code = f"""
        .shared .align 1024 .b8 tile[16384];
        .reg .b32 %at, %base;
        .reg .b64 %start, %da, %db;
        .reg .pred %add;
        mov.u32 %base, tile;
        mad.lo.u32 %at, %i1, 16, %base;
        {stores}
        fence.proxy.async.shared::cta;
        bar.sync 0;
        shr.u32 %base, %base, 4;
        cvt.u64.u32 %start, %base;
        add.s64 %da, %start, {a};
        add.s64 %db, %start, {b};
        mov.b32 %x, %j;
        mov.b32 %y, %k;
        mov.b32 %z, %l;
        mov.b32 %u, %m;
        mov.pred %add, 1;
        wgmma.fence.sync.aligned;
        {opcode} {{%x, %y, %z, %u}}, {left}, %db, %add, {scales}{trans};
        wgmma.commit_group.sync.aligned;
        wgmma.wait_group.sync.aligned 0;
    """
    inputs = (*words, *(v.view(np.uint32) for v in start))
    return Case(code, inputs, (np.uint32,) * 4, "sm_90a", block=128)


def conversion(opcode: str, source: str, result: type, operands: int = 1, target: str = "sm_80") -> Case:
    kinds = {"f16": "f16", "bf16": "bf16", "f32": "f32", "f64": "f64"}
    make = float_bits if source in kinds else integers
    inputs = tuple(make(source, 90 + k, 256) for k in range(operands))
    names = ", ".join(f"%{name}" for name in "ab"[:operands])
    return Case(f"{opcode} %x, {names};", inputs, (result,), target)


CASES: dict[str, Case] = {}
for _shape in ("m16n8k16", "m16n8k8"):
    for _kind, _accumulator in (("f16", "f32"), ("bf16", "f32"), ("f16", "f16")):
        CASES[f"mma.{_shape}.{_accumulator}.{_kind}"] = mma(_shape, _kind, _accumulator)
for _count in (1, 2, 4):
    for _transposed in (False, True):
        CASES[f"ldmatrix.x{_count}{'.trans' if _transposed else ''}"] = ldmatrix(_count, _transposed)
for _mode in ("rn", "rz"):
    for _kind in ("f16", "bf16"):
        CASES[f"cvt.{_mode}.{_kind}x2.f32"] = conversion(f"cvt.{_mode}.{_kind}x2.f32", "f32", np.uint32, 2)
for _mode in ("rni", "rzi", "rmi", "rpi"):
    CASES[f"cvt.{_mode}.s32.f32"] = conversion(f"cvt.{_mode}.s32.f32", "f32", np.int32)
for _mode in ("rn", "rz", "rm", "rp"):
    CASES[f"cvt.{_mode}.f32.s32"] = conversion(f"cvt.{_mode}.f32.s32", "s32", np.uint32)
CASES |= {
    "cvt.f32.f16": conversion("cvt.f32.f16", "f16", np.uint32)._replace(any_nan=True),
    "cvt.rn.f16.f32": conversion("cvt.rn.f16.f32", "f32", np.uint16),
    "cvt.rn.bf16.f32": conversion("cvt.rn.bf16.f32", "f32", np.uint16),
    "cvt.f32.bf16": conversion("cvt.f32.bf16", "bf16", np.uint32, target="sm_90")._replace(any_nan=True),
    "cvt.rna.tf32.f32": conversion("cvt.rna.tf32.f32", "f32", np.uint32),
    "cvt.rn.f32.u64": conversion("cvt.rn.f32.u64", "u64", np.uint32),
    "cvt.rzi.u32.f32": conversion("cvt.rzi.u32.f32", "f32", np.uint32),
    "cvt.s32.s8": conversion("cvt.s32.s8", "s32", np.int32),
}

WGMMA = [Wgmma(("f16", "f16"), widths=(width, width)) for width in (16, 32, 64, 128)]
WGMMA += [Wgmma(("bf16", "bf16"), widths=(width, width), major=(1, 1)) for width in (16, 32, 64, 128)]
WGMMA += [Wgmma(("bf16", "bf16"), major=major) for major in ((0, 0), (0, 1), (1, 0))]
WGMMA += [Wgmma((a, b)) for a in BYTES for b in BYTES]
WGMMA += [Wgmma((kind, kind), widths=(0, 128)) for kind in ("f16", "bf16", *BYTES)]
WGMMA += [Wgmma((kind, kind), "f16") for kind in ("f16", *BYTES)]
WGMMA += [Wgmma((kind, kind), "f16", widths=(0, 64)) for kind in ("f16", *BYTES)]
WGMMA += [Wgmma(("f16", "f16"), scales=(-1, 1)), Wgmma(("f16", "f16"), "f16", major=(0, 1))]
FORMS = {form.name: form for form in WGMMA}
CASES |= {name: wgmma(form) for name, form in FORMS.items()}
