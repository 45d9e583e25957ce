"""Kernels for Hopper: for now those of the sm80 tree, whose instructions Hopper runs as well.

`forward` holds Hopper's own kernel. It compiles, but is not listed: what is listed has been executed,
and the emulator does not execute TMA and warpgroup MMA yet.
"""

from __future__ import annotations

from ..sm80 import Forward

KERNELS = (Forward,)
