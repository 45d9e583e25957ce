"""The accuracy rule: error against float64 <= 2 x that of the same lines in the input dtype + a rounding."""

from __future__ import annotations

import math

import torch

from tests.reference import attention, gradients

LSE_ATOL = 2e-5
GRADIENTS = ("dq", "dk", "dv", "dsink")


def assert_accurate(out, lse, tensors: tuple, *, lse_atol: float = LSE_ATOL, **call) -> None:
    """Hold `out` and `lse` of a call on `tensors` (q, k, v) to the rule; lse may be None.

    out: twice torch's error in the input dtype, plus half a unit in the last place of the largest output.
    lse: twice torch's error in float32, plus lse_atol.
    """
    exact, dtype = attention(*tensors, **call), tensors[0].dtype
    peer, _ = attention(*tensors, compute=dtype, **call)
    hold("out", out, exact[0], peer, half_a_unit(dtype, exact[0]))
    if lse is not None:
        _, peer = attention(*tensors, compute=torch.float32, **call)
        hold("lse", lse, exact[1], peer, lse_atol)


def assert_gradients_accurate(found, tensors: tuple, dout, dlse, **call) -> None:
    """Hold dq, dk, dv and, with a sink, dsink of a call on `tensors` (q, k, v) to the rule.

    Each: twice torch's error in the input dtype, plus half a unit in the last place of the largest gradient.
    """
    dtype = tensors[0].dtype
    exact = gradients(tensors, dout, dlse, **call)
    peer = gradients(tensors, dout, dlse, compute=dtype, **call)
    for name, *each in zip(GRADIENTS[: len(exact)], found, exact, peer, strict=True):
        hold(name, *each, half_a_unit(dtype, each[1]))


def half_a_unit(dtype: torch.dtype, exact) -> float:
    """What rounding the largest of these numbers to `dtype` may change it by."""
    return torch.finfo(dtype).eps / 2 * (exact.abs().max().item() if exact.numel() else 0.0)


def hold(name: str, ours, exact, peer, atol: float) -> None:
    """Assert error(ours) <= 2 error(peer) + atol; a NaN fails, an infinity must be met exactly."""
    assert ours.shape == exact.shape, f"{name} has shape {tuple(ours.shape)}, expected {tuple(exact.shape)}"
    error, bound = largest_error(ours, exact), 2 * largest_error(peer, exact) + atol
    assert math.isfinite(bound), f"{name}: torch in this dtype overflows, so its error bounds nothing"
    assert error <= bound, f"{name}: error {error:.3e} > {bound:.3e} (2 x torch's + {atol:.1e})"


def largest_error(got, exact) -> float:
    """Largest absolute difference; equal infinities count as equal, a NaN as NaN."""
    got = got.to(exact)
    difference = (got - exact).masked_fill(got == exact, 0.0).abs()
    return difference.max().item() if difference.numel() else 0.0
