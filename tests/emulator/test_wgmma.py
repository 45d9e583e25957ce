"""wgmma: numbers against float64 for every form."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from cute_flash.emulator import UnmodelledInstruction
from cute_flash.emulator.base.formats import matrix_values

from .wgmma import COMMIT, FENCE, MODES, WAIT, Case, registers_of

HALVES = [("f16", "f16"), ("bf16", "bf16")]
BYTES = [(a, b) for a in ("e4m3", "e5m2") for b in ("e4m3", "e5m2")]


@pytest.mark.parametrize("result", ["f32", "f16"])
@pytest.mark.parametrize("in_registers", [False, True], ids=["shared", "registers"])
@pytest.mark.parametrize("kinds", [*HALVES, *BYTES], ids="_".join)
def test_types(kinds, in_registers, result):
    if kinds[0] == "bf16" and result == "f16":
        with pytest.raises(UnmodelledInstruction, match="f16.bf16.bf16"):
            Case(8, kinds, result).run()
        return
    case = Case(24, kinds, result, in_registers=in_registers)
    case.check(case.run())


@pytest.mark.parametrize("major", [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("widths", [(128, 128), (64, 32), (32, 64), (16, 128), (128, 16)])
def test_layouts(widths, major):
    case = Case(64, ("bf16", "bf16"), widths=widths, major=major)
    case.check(case.run(asynchrony="late"))


@pytest.mark.parametrize("n", [8, 80, 96, 128, 256])
@pytest.mark.parametrize("options", MODES, ids=lambda o: "_".join(map(str, o.values())))
def test_shapes_and_orders(n, options):
    case = Case(n, ("f16", "f16"), in_registers=n != 80)
    case.check(case.run(races=True, **options))


@pytest.mark.parametrize("scales", [(1, -1), (-1, 1), (-1, -1)])
def test_negation(scales):
    case = Case(16, ("f16", "f16"), scales=scales)
    case.check(case.run())


@pytest.mark.parametrize("options", MODES, ids=lambda o: "_".join(map(str, o.values())))
@pytest.mark.parametrize("in_registers", [False, True], ids=["shared", "registers"])
def test_several_warpgroups_and_ctas(in_registers, options):
    """Three warpgroups with one B: all must be right, whoever runs together."""
    case = Case(32, ("bf16", "bf16"), steps=3, in_registers=in_registers)
    case.check(case.run(block=384, **options))


def test_a_sum_starts_from_the_registers():
    """scale-d holds from the first product on: D starts at 7, or at 1 in f16."""
    for result, start, value in (("f32", "0f40E00000", 7.0), ("f16", "0x3C003C00", 1.0)):
        case = Case(16, ("f16", "f16"), result, steps=1)
        begin = "".join(f"mov.b32 %f{k}, {start};\n" for k in range(case.count))
        middle = f"{begin}{FENCE}{case.product(0, '%yes')}{COMMIT}{WAIT}"
        plain, added = case.run(), None
        for options in MODES:
            added = case.run(case.code(middle), **options)
            view = np.float16 if result == "f16" else np.float32
            difference = added.view(view).astype(float) - plain.view(view).astype(float) - value
            assert np.abs(difference).max() < (0.05 if result == "f16" else 1e-5)


def test_a_predicate_that_only_the_run_knows():
    """scale-d from memory: the accumulator is added to in warpgroups whose first A register is odd."""
    case = Case(16, ("f16", "f16"), steps=1)
    set_up = "mov.b32 %r0, 128;\nsetp.ge.u32 %p0, %t, %r0;\n"
    begin = "".join(f"mov.b32 %f{k}, 0f40E00000;\n" for k in range(case.count))
    for name, add in (("%p0", (0, 7)), ("!%p0", (7, 0))):
        middle = f"{set_up}{begin}{FENCE}{case.product(0, name)}{COMMIT}{WAIT}"
        out = case.run(case.code(middle), block=256, asynchrony="late").view(np.float32)
        plain = case.run(block=256).view(np.float32)
        difference = out - plain
        assert np.allclose(difference[:128], add[0], atol=1e-5)
        assert np.allclose(difference[128:], add[1], atol=1e-5)


@pytest.mark.parametrize("row", [1, 4, 7])
@pytest.mark.parametrize("widths", [(128, 64), (32, 128)])
@pytest.mark.parametrize("major", [(False, False), (True, True)])
def test_operands_that_start_in_the_middle_of_a_pattern(row, widths, major):
    """The swizzle is an XOR on the whole address, wherever in its eight rows an operand starts."""
    case = Case(64, ("bf16", "bf16"), widths=widths, major=major, row=row)
    case.check(case.run())


def short_sum(start: float, a: list[float], b: list[float]) -> float:
    """One element of D with Hopper's accumulator, in Python's integers: 32 products at a time."""
    total = Fraction(start)
    for first in range(0, len(a), 32):
        pairs = zip(a[first : first + 32], b[first : first + 32], strict=True)
        terms = [total, *(Fraction(x) * Fraction(y) for x, y in pairs)]
        total = Fraction(0)
        if largest := max(map(abs, terms)):
            unit = Fraction(2) ** (math.frexp(largest)[1] - 1 - 13)
            total = sum(int(term / unit) for term in terms) * unit
        if total:
            unit = Fraction(2) ** (math.frexp(total)[1] - 1 - 13)
            total = int(total / unit) * unit
    return float(total)


@pytest.mark.parametrize("options", [MODES[0], MODES[2]], ids=["eager", "random"])
@pytest.mark.parametrize("in_registers", [False, True], ids=["shared", "registers"])
@pytest.mark.parametrize("kind", ["e4m3", "e5m2"])
def test_hoppers_accumulator(kind, in_registers, options):
    """Bit by bit, from registers that hold something, with both signs; f16 and 16-bit products as ever."""
    case = Case(8, (kind, kind), steps=3, in_registers=in_registers, scales=(1, -1))
    begin = "".join(f"mov.b32 %f{k}, 0f42F6E979;\n" for k in range(case.count))  # 123.456
    products = "".join(case.product(k, "%yes") for k in range(case.steps))
    code = case.code(f"{begin}{FENCE}{products}{COMMIT}{WAIT}")
    out = case.run(code, block=256, fp8_accumulator="hopper", **options).view(np.float32)
    a, b = (matrix_values(raw, kind).astype(float).tolist() for raw in case.raw)
    start = float(np.array(0x42F6E979, np.uint32).view(np.float32))
    expected = np.array([[short_sum(start, row, [-y for y in column]) for column in b] for row in a])
    for first in (0, 128):
        np.testing.assert_array_equal(out[first : first + 128], registers_of(expected))
    exact = case.run(code, **options).view(np.float32)
    assert (exact != out[:128]).mean() > 0.5
    assert np.abs(exact - out[:128]).max() < 100 * 2.0**-13 * registers_of(case.exact()[1]).max()
    for others in (("f16", "f16"), (kind, kind, "f16")):
        same = Case(8, others[:2], *others[2:], in_registers=in_registers)
        np.testing.assert_array_equal(same.run(fp8_accumulator="hopper"), same.run())


def test_an_accumulator_that_is_not_known():
    with pytest.raises(ValueError, match="fp8_accumulator is 'short'; allowed: float32, hopper"):
        Case(8, ("e4m3", "e4m3")).run(fp8_accumulator="short")
