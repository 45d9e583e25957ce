"""Rotary embedding (Su et al. 2021) of a lane's part of a row: pairs of numbers, turned by their angles.

In fp32. Products of two 16-bit numbers are exact there, so that a number is rounded once, by its sum, however
products and sums are contracted.
"""

from __future__ import annotations

from typing import Any

from cutlass import Boolean

from ..elementwise import where


def turned_neighbours(x: Any, cos: Any, sin: Any, pairs: int) -> list:
    """Numbers (0, 1), (2, 3), … of x are pairs."""
    found = []
    for i in range(pairs):
        a, b = x[2 * i], x[2 * i + 1]
        found += [a * cos[i] - b * sin[i], a * sin[i] + b * cos[i]]
    return found


def turned_halves(x: Any, other: Any, angles: tuple[Any, Any], first: Boolean, pairs: int) -> list:
    """Number i of x and number i of `other` are a pair. first: x has the pairs' first numbers."""
    (cos, sin), found = angles, []
    for i in range(pairs):
        product = other[i] * sin[i]
        found.append(x[i] * cos[i] + where(first, -product, product))
    return found
