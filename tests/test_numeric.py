"""The kernels' own arithmetic, run on the CPU: exponentials without the exponential unit."""

from __future__ import annotations

import numpy as np
import pytest

cutlass = pytest.importorskip("cutlass")

import cutlass.cute as cute  # noqa: E402
from cutlass import Float32, Int32  # noqa: E402
from cutlass.cute.runtime import make_fake_tensor  # noqa: E402

from cute_flash.arch.common import numeric  # noqa: E402
from cute_flash.arch.common.numeric import EXP2, EXP2_ERROR, SPAN, Arithmetic, in_span  # noqa: E402
from cute_flash.arch.common.numeric import EXP2_LOWEST as LOWEST  # noqa: E402
from cute_flash.arch.common.numeric import exp2_pair as pair_of_powers  # noqa: E402
from cute_flash.arch.elementwise import maximum, minimum  # noqa: E402
from cute_flash.arch.sm100.forward.rows import THRESHOLD  # noqa: E402

SCALAR = Arithmetic(
    fma=lambda a, b, c: tuple(x * y + z for x, y, z in zip(a, b, c, strict=True)),
    add=lambda a, b: tuple(x + y for x, y in zip(a, b, strict=True)),
    saturated=lambda a, b, c: tuple(minimum(maximum(x, 0.0), 1.0) for x in SCALAR.fma(a, b, c)),
)
HIGHEST = LOWEST + SPAN


@cute.jit
def powers(x: cute.Tensor, y: cute.Tensor, pairs: Int32):
    one = in_span(Float32(1.0), Float32(0.0))
    for i in cutlass.range(pairs, unroll=1):
        y[2 * i], y[2 * i + 1] = pair_of_powers((x[2 * i], x[2 * i + 1]), *one, SCALAR)


def compiled():
    """`exp2_pair` as a function of float32 arrays."""
    cpu = cute.AddressSpace.generic
    x, y = (make_fake_tensor(Float32, (cute.sym_int32(),), (1,), memspace=cpu, assumed_align=4) for _ in "xy")
    function = cute.compile(powers, x, y, Int32(1), options="--enable-tvm-ffi")

    def run(x: np.ndarray) -> np.ndarray:
        even = np.append(x, x[-1:] if len(x) % 2 else x[:0])
        y = np.empty_like(even)
        function(even, y, len(even) // 2)
        return y[: len(x)]

    return run


@pytest.fixture(scope="module")
def exp2():
    return compiled()


def worst(exp2, x: np.ndarray) -> float:
    """The largest relative error over `x`."""
    exact = np.exp2(x.astype(np.float64))
    return float(np.abs(exp2(x) / exact - 1).max())


def test_every_reduced_argument(exp2):
    """What is left of any x of magnitude 1/2 or more, less its integer, is a multiple of 2**-24."""
    found = max(
        worst(exp2, (np.arange(first, first + 2**20) / 2**24).astype(np.float32))
        for first in range(-(2**23), 2**23, 2**20)
    )
    assert found < EXP2_ERROR
    assert found > 0.8 * EXP2_ERROR, f"EXP2_ERROR promises less than it could: the largest is {found:.2e}"


def test_every_exponent(exp2):
    """Every integer part, with fractions on either side of the rounding."""
    fractions = np.array([-0.5, -0.49999, -0.25, -1e-7, 0, 1e-7, 0.25, 0.49999, 0.5])
    x = (np.arange(LOWEST, HIGHEST + 1)[:, None] + fractions).astype(np.float32).ravel()
    assert worst(exp2, x[(x >= LOWEST) & (x <= HIGHEST)]) < EXP2_ERROR


def test_powers_of_two_are_exact(exp2):
    n = np.arange(LOWEST, HIGHEST + 1)
    assert (exp2(n.astype(np.float32)) == np.exp2(n).astype(np.float32)).all()


def test_beyond_the_span(exp2):
    below = np.array([LOWEST, -126.5, -1000.0, -np.inf], np.float32)
    assert (exp2(below) == np.float32(2.0**LOWEST)).all()
    above = np.array([HIGHEST, HIGHEST + 0.5, 1000.0, np.inf], np.float32)
    assert (exp2(above) == np.float32(2.0**HIGHEST)).all()


def test_the_span_holds_every_exponent_of_p():
    """P is at most 2**THRESHOLD: the maximum is raised where it would be more."""
    assert HIGHEST >= THRESHOLD


def test_a_wrong_coefficient_is_noticed(monkeypatch):
    monkeypatch.setattr(numeric, "EXP2", (*EXP2[:-1], EXP2[-1] * 1.01))
    assert worst(compiled(), np.linspace(-0.5, 0.5, 1000, dtype=np.float32)) > EXP2_ERROR
