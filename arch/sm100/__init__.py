"""Kernels for Blackwell: tcgen05 and tensor memory; and those of the sm80 tree for what they do not serve."""

from __future__ import annotations

from ..sm80 import Forward as Sm80Forward
from .forward import Forward

KERNELS = (Forward, Sm80Forward)
