"""Kernels for Hopper: TMA, warpgroup MMA, specialised warpgroups; and those of the sm80 tree for the rest."""

from __future__ import annotations

from ..sm80 import Forward as Sm80Forward
from .forward import Forward

KERNELS = (Forward, Sm80Forward)
