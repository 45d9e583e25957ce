"""The instructions that have vectors: their PTX, and seeded inputs."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..values import float_bits, integers

WARPS = 2
LANES = 32 * WARPS


class Case(NamedTuple):
    """code runs once per thread on the inputs %a, %b, …; outputs: types of %x, %y, …; see evaluate.py.

    any_nan: the result is an f32 whose NaN payload the ISA leaves open.
    """

    code: str
    inputs: tuple[np.ndarray, ...]
    outputs: tuple
    target: str = "sm_80"
    any_nan: bool = False


def small_numbers(kind: str, count: int, seed: int, limit: int = 4) -> np.ndarray:
    """Words of two floats that are whole numbers up to `limit`: sums of their products are exact in any
    order.
    """
    numbers = np.random.default_rng(seed).integers(-limit, limit + 1, 2 * count).astype(np.float32)
    halves = numbers.astype(np.float16).view(np.uint16) if kind == "f16" else numbers.view(np.uint32) >> 16
    return halves.astype(np.uint16).view(np.uint32)


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
