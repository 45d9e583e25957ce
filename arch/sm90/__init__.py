"""Kernels for Hopper: TMA, warpgroup MMA, specialised warpgroups; and those of the sm80 tree for the rest."""

from __future__ import annotations

from .. import sm80
from .forward import FORWARD

KERNELS = (FORWARD, *sm80.KERNELS)
