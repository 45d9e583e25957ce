"""Sums of 8-bit products as Hopper's tensor cores keep them: in fewer bits than the float32 they end up in.

    the products of a step and the accumulator are cut to the bits that the largest of them leaves,
    added exactly, and the sum is cut to as many bits behind its first

NVIDIA documents none of it. Published: 14 bits of each product after alignment, 32 products at a time, and as
many in registers (DeepSeek-AI 2024, DeepSeek-V3, section 3.5.2); an accumulator of 8 exponent and 13 fraction
bits (Zhang et al. 2024, SageAttention2); cut, not rounded (Khattak and Mikaitis 2025, arXiv 2512.07004).
"""

from __future__ import annotations

import numpy as np

FRACTION_BITS = 13  # behind the first bit of the largest term, and of the sum
PRODUCTS = 32  # that are added at a time: the k of a wgmma of 8-bit elements


def accumulate(
    start: np.ndarray, a: np.ndarray, b: np.ndarray, *, fraction_bits: int = FRACTION_BITS,
    products: int = PRODUCTS,
) -> np.ndarray:
    """start + a bᵀ: float32 (..., m, n), (..., m, k) and (..., n, k), k a multiple of `products`."""
    total = start.astype(np.float32)
    for first in range(0, a.shape[-1], products):
        part = slice(first, first + products)
        terms = a[..., :, None, part] * b[..., None, :, part]
        total = _cut(_aligned_sum(terms, total, fraction_bits), fraction_bits)
    return total


def _aligned_sum(terms: np.ndarray, total: np.ndarray, fraction_bits: int) -> np.ndarray:
    """terms (..., products) and total (...), each cut to a multiple of one unit, added."""
    largest = np.maximum(np.abs(terms).max(axis=-1), np.abs(total))
    _, exponent = np.frexp(np.where(np.isfinite(largest), largest, np.float32(1)))
    unit = np.ldexp(np.float32(1), np.maximum(exponent - 1, -100) - fraction_bits)
    # In units all terms are integers below 2**(fraction_bits + 1): float32 adds 33 of them exactly.
    with np.errstate(invalid="ignore"):
        return (np.trunc(terms / unit[..., None]).sum(axis=-1) + np.trunc(total / unit)) * unit


def _cut(values: np.ndarray, fraction_bits: int) -> np.ndarray:
    """float32 numbers without the fraction bits beyond these. Infinities and NaN stay."""
    mask = np.uint32(0xFFFFFFFF << 23 - fraction_bits & 0xFFFFFFFF)
    bits = values.astype(np.float32).view(np.uint32)
    return np.where(np.isfinite(values), bits & mask, bits).view(np.float32)
