"""Writes isa.npz: what the PTX ISA's definitions say the cases' results are, computed lane by lane on exact
numbers.

    python -m tests.emulator.vectors.derive

Nothing of the emulator is used, and no GPU: these are derived from the ISA, not from hardware.
"""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from pathlib import Path

import numpy as np

from ..definitions import FORMATS, decode, encode
from ..tiles import Tile, canonical, swizzled
from .cases import A_AT, B_AT, CASES, FORMS, LANES, WORDS, Case, Wgmma

FILE = Path(__file__).with_name("isa.npz")


def half(word: int, upper: int, kind: str) -> float:
    return decode(word >> 16 * upper & 0xFFFF, FORMATS[kind])


def operands(words: list[list[int]], in_a: int, in_b: int, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """A (16, 8k) and B (8k, 8) of one warp; element i of a lane is half i % 2 of its register i / 2."""
    a, b = np.zeros((16, 4 * in_a)), np.zeros((8 * in_b, 8))
    for lane in range(32):
        group, t = divmod(lane, 4)
        for i in range(2 * in_a):
            row, column = group + 8 * (i // 2 % 2), 2 * t + i % 2 + 8 * (i // 4)
            a[row, column] = half(words[i // 2][lane], i % 2, kind)
        for i in range(2 * in_b):
            b[2 * t + i % 2 + 8 * (i // 2), group] = half(words[in_a + i // 2][lane], i % 2, kind)
    return a, b


def mma(name: str, case: Case) -> list[np.ndarray]:
    """D = A B + C, with the fragment layouts of the ISA's figures for m16n8k8 and m16n8k16."""
    _, shape, accumulator, kind = name.split(".")
    in_a, in_b = {"m16n8k16": (4, 2), "m16n8k8": (2, 1)}[shape]
    results = [np.zeros(LANES, np.uint32) for _ in case.outputs]
    for first, lane in itertools.product(range(0, LANES, 32), range(32)):
        words = [v[first : first + 32].tolist() for v in case.inputs]
        a, b = operands(words, in_a, in_b, kind)
        start = words[in_a + in_b :]
        for i in range(4):
            row, column = lane // 4 + 8 * (i // 2), 2 * (lane % 4) + i % 2
            product = a[row] @ b[:, column]  # whole numbers far below 2**53: exact
            if accumulator == "f32":
                value = product + decode(start[i][lane], FORMATS["f32"])
                results[i][first + lane] = encode(value, FORMATS["f32"])
            else:
                value = product + half(start[i // 2][lane], i % 2, "f16")
                results[i // 2][first + lane] |= np.uint32(encode(value, FORMATS["f16"]) << 16 * (i % 2))
    return results


def ldmatrix(name: str, case: Case) -> list[np.ndarray]:
    """Row r of matrix j is at the address of lane 8j + r; lane l receives elements 2 (l % 4) and + 1 of row
    l / 4.
    """
    transposed, count = name.endswith("trans"), len(case.outputs)
    results = [np.zeros(LANES, np.uint32) for _ in range(count)]
    *words, order = case.inputs
    for first in range(0, LANES, 32):
        rows = [[int(w[first + lane]) for w in words] for lane in range(32)]
        for j in range(count):
            picked = [rows[order[first + 8 * j + r]] for r in range(8)]
            matrix = [[row[c // 2] >> 16 * (c % 2) & 0xFFFF for c in range(8)] for row in picked]
            for lane in range(32):
                group, t = divmod(lane, 4)
                low, high = (
                    (matrix[2 * t + e][group] if transposed else matrix[group][2 * t + e]) for e in (0, 1)
                )
                results[j][first + lane] = low | high << 16
    return results


def operand(form: Wgmma, which: int, image: bytes) -> np.ndarray:
    """A (64, k) or B (n, k) from shared memory, element by element."""
    bits = FORMATS[form.kinds[which]].bits
    rows, k = (64, form.n)[which], 256 // bits
    tile, width = Tile(rows, k, bits, bool(form.major[which])), form.widths[which]
    result = np.zeros((rows, k))
    for row, column in itertools.product(range(rows), range(k)):
        place = (A_AT, B_AT)[which] + canonical(row, column, tile, width, form.strides(which))
        at = swizzled(place, width)
        pattern = int.from_bytes(image[at : at + bits // 8], "little")
        result[row, column] = decode(pattern, FORMATS[form.kinds[which]])
    return result


def fragment_a(form: Wgmma, words: list[np.ndarray]) -> np.ndarray:
    """A (64, k) from four registers per thread, with the figure of m64nNk16 (m64nNk32 for bytes)."""
    bits = FORMATS[form.kinds[0]].bits
    each = 32 // bits
    result = np.zeros((64, 256 // bits))
    for thread, i, part in itertools.product(range(128), range(4), range(each)):
        row = thread // 32 * 16 + thread % 32 // 4 + 8 * (i % 2)
        column = each * (thread % 4) + part + 4 * each * (i // 2)
        pattern = int(words[i][thread]) >> bits * part & (1 << bits) - 1
        result[row, column] = decode(pattern, FORMATS[form.kinds[0]])
    return result


def wgmma(name: str, case: Case) -> list[np.ndarray]:
    """D = A B + D, with the ISA's canonical layouts and the figure of m64nNk16's D."""
    form, words = FORMS[name], case.inputs[:WORDS]
    image = b"".join(
        int(words[(j + i) % WORDS][thread]).to_bytes(4, "little")
        for j in range(8) for thread in range(128) for i in range(4)
    )  # fmt: skip
    a = operand(form, 0, image) if form.widths[0] else fragment_a(form, words)
    d = form.scales[0] * form.scales[1] * (a @ operand(form, 1, image).T)  # whole numbers: exact
    results = [np.zeros(128, np.uint32) for _ in range(4)]
    single = form.result == "f32"
    for thread, i in itertools.product(range(128), range(4 if single else 8)):
        row = thread // 32 * 16 + thread % 32 // 4 + 8 * (i // 2 % 2)
        value = d[row, 8 * (i // 4) + 2 * (thread % 4) + i % 2]
        start = case.inputs[WORDS:]
        if single:
            value += decode(int(start[i][thread]), FORMATS["f32"])
            results[i][thread] = encode(float(value), FORMATS["f32"])
        else:
            value += half(int(start[i // 2][thread]), i % 2, "f16")
            results[i // 2][thread] |= np.uint32(encode(float(value), FORMATS["f16"]) << 16 * (i % 2))
    return results


def to_integer(value: float, bits: int, signed: bool, mode: str) -> int:
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
    if math.isnan(value):
        return 0
    if math.isinf(value):
        return high if value > 0 else low
    function = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}[mode]
    return max(low, min(high, function(value)))


def conversion(name: str, case: Case) -> list[np.ndarray]:
    _, *modes, to, source = name.split(".")
    mode = modes[0] if modes else "rn"
    columns = [v.tolist() for v in case.inputs]
    if source in FORMATS:
        columns = [[decode(bits, FORMATS[source]) for bits in column] for column in columns]
    if to.endswith("x2"):
        form = FORMATS[to[:-2]]
        values = [encode(a, form, mode) << 16 | encode(b, form, mode) for a, b in zip(*columns, strict=True)]
    elif to == "tf32":
        form = FORMATS["f32"]._replace(bits=19, precision=11)
        values = [0x7FFFFFFF if math.isnan(v) else encode(v, form, mode) << 13 for v in columns[0]]
    elif to in FORMATS:
        exact = columns[0] if source in FORMATS else map(Fraction, columns[0])
        values = [encode(v, FORMATS[to], mode) for v in exact]
    elif source in FORMATS:
        values = [to_integer(v, int(to[1:]), to[0] == "s", mode) for v in columns[0]]
    else:
        values = [(v & 0xFF) - (v & 0x80) * 2 for v in columns[0]]
    return [np.array(values, np.int64).astype(case.outputs[0])]


def results(name: str) -> list[np.ndarray]:
    """Results of a case by definition, one array per output."""
    derive = {"mma": mma, "ldmatrix": ldmatrix, "cvt": conversion, "wgmma": wgmma}[name.split(".")[0]]
    return derive(name, CASES[name])


def main() -> None:
    arrays = {f"{name}:{k}": array for name in CASES for k, array in enumerate(results(name))}
    np.savez_compressed(FILE, **arrays)


if __name__ == "__main__":
    main()
