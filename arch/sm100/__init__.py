"""Kernels for Blackwell: tcgen05 and tensor memory; and those of the sm80 tree for what they do not serve."""

from __future__ import annotations

from .. import sm80
from .forward import FORWARD

KERNELS = (FORWARD, *sm80.KERNELS)
