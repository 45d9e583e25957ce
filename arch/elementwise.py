"""Elementwise functions that rules may use on host numbers, torch tensors and device values alike.

A rule (a mask or a score) is written once and evaluated by the kernels, by the torch reference and by
brute-force tests on plain integers. Operators and comparisons already mean the same in all three
worlds; these functions are the rest.
"""

from __future__ import annotations

import math


def _world(*values) -> str:
    for value in values:
        module = type(value).__module__.partition(".")[0]
        if module == "torch":
            return "torch"
        if module not in ("builtins", "numpy"):
            return "device"
    return "host"


def minimum(a, b):
    """The smaller of two integers (or floats), elementwise."""
    world = _world(a, b)
    if world == "host":
        return min(a, b)
    if world == "torch":
        return where(a < b, a, b)
    from cutlass import min as device_min

    return device_min(a, b)


def maximum(a, b):
    """The larger of two integers (or floats), elementwise."""
    world = _world(a, b)
    if world == "host":
        return max(a, b)
    if world == "torch":
        return where(a > b, a, b)
    from cutlass import max as device_max

    return device_max(a, b)


def where(condition, a, b):
    """`a` where `condition` holds, else `b`; neither side may have effects."""
    world = _world(condition, a, b)
    if world == "host":
        return a if condition else b
    if world == "torch":
        import torch

        return torch.where(condition, a, b)
    return _select(condition, a, b)


def _select(condition, a, b):
    """`where` on device values: select_ takes no Python bool and neither promotes nor wraps its operands."""
    from cutlass import as_numeric, select_

    if isinstance(condition, bool):
        return a if condition else b
    a, b = as_numeric(a), as_numeric(b)
    dtype = a.dtype if a.dtype is b.dtype else (a + b).dtype
    return dtype(select_(condition, a.to(dtype), b.to(dtype)))


def absolute(x):
    """|x|."""
    return where(x < 0, -x, x)


def to_float(x):
    """An integer as a floating-point number: fp32 on the device, fp64 elsewhere."""
    world = _world(x)
    if world == "host":
        return float(x)
    if world == "torch":
        return x.double()
    from cutlass import Float32

    return Float32(x)


def exp(x):
    """e**x; on the device one multiplication and one ex2."""
    world = _world(x)
    if world == "host":
        return math.exp(x)
    if world == "torch":
        return x.exp()
    from cutlass.cute.math import exp2

    return exp2(x * math.log2(math.e), fastmath=True)


def tanh(x):
    """tanh(x).

    On the device 1 - 2 / (exp(2x) + 1): one ex2 and one rcp, absolute error below 1e-6, where the
    hardware's own tanh.approx is off by 5e-4, too much for a softcap of 30 in half precision.
    """
    world = _world(x)
    if world == "host":
        return math.tanh(x)
    if world == "torch":
        return x.tanh()
    from cutlass.cute.arch import rcp_approx
    from cutlass.cute.math import exp2

    return 1.0 - 2.0 * rcp_approx(exp2(x * (2.0 * math.log2(math.e)), fastmath=True) + 1.0)


def load(table, *index):
    """table[index], each index clamped into its dimension.

    Kernels evaluate rules on the padding rows and columns of a tile too; the clamp keeps those reads
    inside the table, and their results are never used.
    """
    shape = table.shape
    clamped = [maximum(minimum(i, n - 1), 0) for i, n in zip(index, shape, strict=True)]
    return table[tuple(clamped)]
