"""Incoherent processing: random signs and the Walsh–Hadamard transform, which spread outliers over a head.

A rotation is orthogonal, so q·k is the same where both are rotated alike, and 8 bits hold rotated numbers
better where few of them were large (Shah et al. 2024, FlashAttention-3, section 3.3; Chee et al. 2023).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rotation:
    """Of vectors of head_dim numbers: y = H (signs * x) / sqrt(width), width of them at a time.

    H: the Walsh–Hadamard matrix of the largest power of two that divides head_dim. signs: from `seed`.
    """

    head_dim: int
    seed: int

    @property
    def width(self) -> int:
        """Numbers that are mixed with each other."""
        return self.head_dim & -self.head_dim

    def signs(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """(head_dim,) float32: 1 or -1. The same on every device."""
        return _signs(self, torch.device(device))

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """Rotate the last dimension of a float tensor, in its dtype."""
        return self._mix(x * self.signs(x.device).to(x.dtype))

    def undo(self, y: torch.Tensor) -> torch.Tensor:
        """The inverse: H is its own, but for the factor."""
        return self._mix(y) * self.signs(y.device).to(y.dtype)

    def undo_by_product(self, y: torch.Tensor) -> torch.Tensor:
        """The inverse for rows of 16 bits, in one product with a matrix of 1 and -1, which is exact."""
        matrix = _matrix(self, y.device).to(y.dtype)
        flat = y.reshape(-1, self.head_dim)
        return torch.addmm(flat.new_zeros(1), flat, matrix, beta=0, alpha=self.width**-0.5).reshape(y.shape)

    def _mix(self, x: torch.Tensor) -> torch.Tensor:
        """The transform, by butterflies of neighbours, then of ever more distant ones, in `x`'s dtype."""
        shape, distance = x.shape, 1
        while distance < self.width:
            a, b = x.reshape(-1, 2, distance).unbind(1)
            x = torch.stack([a + b, a - b], dim=1)
            distance *= 2
        return x.reshape(shape) * self.width**-0.5


@functools.lru_cache(maxsize=64)
def _signs(rotation: Rotation, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rotation.seed)
    bits = torch.randint(0, 2, (rotation.head_dim,), generator=generator)
    return (1.0 - 2.0 * bits).to(device)


@functools.lru_cache(maxsize=64)
def _matrix(rotation: Rotation, device: torch.device) -> torch.Tensor:
    """(head_dim, head_dim) of 1, -1 and 0: a row times it, and width**-0.5, is the row rotated back."""
    return (rotation.undo(torch.eye(rotation.head_dim)) * rotation.width**0.5).round().to(device)
