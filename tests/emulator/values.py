"""Inputs for the tests of instructions: random values and the ones where mistakes hide."""

from __future__ import annotations

import numpy as np

from .definitions import FORMATS, infinity

COUNT = 192


def integers(kind: str, seed: int, count: int = COUNT) -> np.ndarray:
    """Integers of a PTX type such as "s32": the limits, small ones, and random ones of every size."""
    dtype = np.dtype(f"{'i' if kind[0] == 's' else 'u'}{int(kind[1:]) // 8}")
    info = np.iinfo(dtype)
    edges = [0, 1, 2, 3, info.max, info.max - 1, info.min, info.min + 1, 31, 32, 33, info.max // 2]
    random = np.random.default_rng(seed)
    bits = random.integers(0, 1 << 63, count, dtype=np.int64) << 1 | random.integers(0, 2, count)
    values = bits.view(np.uint64) >> random.integers(64 - info.bits, 64, count).astype(np.uint64)
    values = values.astype(np.dtype(f"u{dtype.itemsize}")).view(dtype)
    values[random.permutation(count)[: len(edges)]] = np.array(edges, dtype)
    return values


def float_bits(kind: str, seed: int, count: int = COUNT) -> np.ndarray:
    """Bit patterns of a float format: specials, subnormals, ties of narrower formats, and random ones."""
    form = FORMATS[kind]
    top, one = (
        1 << form.precision - 1,
        infinity(form) // 2 // (1 << form.precision - 1) * (1 << form.precision - 1),
    )
    edges = [
        0,
        1,
        top - 1,
        top,
        top + 1,
        one,
        one + 1,
        one - 1,
        infinity(form),
        infinity(form) - 1,
        infinity(form) + 3,
    ]
    edges += [e | 1 << form.bits - 1 for e in edges]
    random = np.random.default_rng(seed)
    dtype = np.dtype(f"u{form.bits // 8}")
    values = (
        random.integers(0, 1 << form.bits, count, dtype=dtype)
        if form.bits < 64
        else integers("u64", seed, count)
    )
    # A third lies near 1, so that sums and products stay in range and cancel.
    near = random.permutation(count)[: count // 3]
    spread = random.integers(-6, 7, len(near)) * (1 << form.precision - 1)
    mantissa = random.integers(0, top, len(near))
    sign = random.integers(0, 2, len(near)).astype(np.uint64) << np.uint64(form.bits - 1)
    values[near] = ((one + spread + mantissa).astype(np.uint64) | sign).astype(dtype)
    values[random.permutation(count)[: len(edges)]] = np.array(edges, dtype)
    return values
